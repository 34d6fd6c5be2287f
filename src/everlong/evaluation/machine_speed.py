"""Measures a machine's own speeds: stock and a policy at several depths, beside what it can do at best."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from everlong.attention import Policy
from everlong.errors import ConfigurationError
from everlong.evaluation.resources import allocated_bytes, describe_machine
from everlong.evaluation.rooflines import Floor, KernelFloor, Rooflines
from everlong.evaluation.speed import (
    Bookmark,
    decode_seconds,
    fill,
    prefill_seconds,
    random_ids,
    read_random,
    step_seconds,
)
from everlong.evaluation.speed_report import DepthSpeed, Side, SpeedPlan, SpeedReport
from everlong.evaluation.streams import PolicyStream, StockStream, Stream, open_stream
from everlong.evaluation.work import Work, twin_of, work_of
from everlong.models.files import human_bytes
from everlong.models.loading import LoadedModel
from everlong.models.packing import choose_weights, pack
from everlong.models.placement import available_bytes

_EFFICIENCY = 0.6  # of the rooflines, to say beforehand how long it will take
_COPIES = 4  # times a growing cache is read and written in a step
_RANDOM = 5e8  # bytes of random keys a second


def measure_speed(
    loaded: LoadedModel, policy: Policy, plan: SpeedPlan | None = None, *, weights: str = "auto"
) -> Generator[SpeedReport, None, None]:
    """Measure `loaded` as it is and under `policy`, and yield the report so far after every repeat.

    The first report has no rows: it says what the rest is expected to take. Stock and ours are two models
    that share their weights, so that neither is attached or packed anew between two measurements.

    Parameters
    ----------
    loaded : LoadedModel
        The model, detached; it stays so.
    policy : Policy
        What ours follows.
    plan : SpeedPlan, optional
        What is measured.
    weights : {"auto", "float", "int8", "int4"}
        How our decode steps read the weights.

    Raises
    ------
    ConfigurationError
        A depth whose stock cache does not fit into memory.
    UnsupportedUseError
        Weights that cannot be packed so here.
    """
    plan = plan or SpeedPlan()
    model = loaded.model
    work, twin = work_of(model), twin_of(model)
    _require_room(model, policy, plan, work)
    chosen = choose_weights(twin, weights)
    if chosen != "float":
        pack(twin, chosen)
    with open_stream(twin, policy) as ours:
        assert isinstance(ours, PolicyStream)
        yield from _Bench(loaded, twin, ours, chosen, plan, work).reports()


@dataclass
class _Samples:
    """What was timed at one depth: of stock and of ours, in turn, and of the machine between them."""

    prefill: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    decode: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    floors: list[Floor] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    def floor(self) -> Floor:
        """Return the medians of the kernels' times."""
        parts = (f.name for f in dataclasses.fields(Floor))
        return Floor(**{part: median(getattr(floor, part) for floor in self.floors) for part in parts})


class _Bench:
    """One run: what its depths have in common."""

    def __init__(
        self,
        loaded: LoadedModel,
        twin: nn.Module,
        ours: PolicyStream,
        weights: str,
        plan: SpeedPlan,
        work: Work,
    ) -> None:
        model: Any = loaded.model
        embedding = model.get_input_embeddings().weight
        self.loaded, self.twin, self.ours, self.plan, self.work = loaded, twin, ours, plan, work
        self.weights = weights
        self.device, self.dtype = embedding.device, embedding.dtype
        self.heads = model.get_output_embeddings(), self.twin.get_output_embeddings()  # type: ignore[operator]
        self.rooflines = Rooflines(self.device, self.dtype)
        self.generator = torch.Generator().manual_seed(1)
        self.span = ours.cache.policy.span
        self.weight_bytes = KernelFloor(twin, work, 1).weight_bytes
        self.allocated: list[int | None] = [None, None]
        self.rows: list[DepthSpeed] = []

    def reports(self) -> Iterator[SpeedReport]:
        """Yield the report so far: before anything is measured, and after every repeat."""
        StockStream(self.loaded.model).read(random_ids(self.ours.decoder, self.plan.chunk))  # warms up
        self.rooflines.flops(), self.rooflines.bandwidth()
        rates = self.rooflines.flops(), self.rooflines.bandwidth()
        costs = [self._expected(depth, *rates) for depth in self.plan.depths]
        yield self._report(sum(costs), 0.0)
        for number, depth in enumerate(self.plan.depths):
            for row in self._at(depth):
                self.rows[number:] = [row]
                done = sum(costs[:number]) + costs[number] * row.repeats / self.plan.repeats
                yield self._report(sum(costs), done / sum(costs))

    def _at(self, depth: int) -> Iterator[DepthSpeed]:
        """Measure at one depth and yield the medians so far after every repeat."""
        stock = StockStream(self.loaded.model)
        before = allocated_bytes(self.device)
        fill(stock, depth)
        between = allocated_bytes(self.device)
        self._fill_ours(depth)
        after = allocated_bytes(self.device)
        if before is not None and between is not None and after is not None:
            self.allocated = [between - before, (self.allocated[1] or 0) + after - between]
        kept = depth if self.span is None else min(self.ours.seen, self.span)
        kernels, bookmark = KernelFloor(self.twin, self.work, kept), Bookmark(stock)
        samples = _Samples()
        for _ in range(self.plan.repeats):
            does_settle = self.ours.settles_at is not None
            for number, stream in enumerate((stock, self.ours if does_settle else self.ours.fork())):
                ids = random_ids(stream.decoder, self.plan.chunk + self.plan.steps, self.generator)
                samples.prefill[number].append(prefill_seconds(stream, ids[: self.plan.chunk]))
                steps = decode_seconds(stream, ids[self.plan.chunk :], self.heads[number])
                samples.decode[number].append(step_seconds(steps))
            bookmark.go_back()
            samples.floors.append(kernels.measure())
            samples.flops.append(self.rooflines.flops())
            samples.bandwidth.append(self.rooflines.bandwidth())
            yield DepthSpeed(
                depth=depth,
                repeats=len(samples.floors),
                stock=self._side(0, depth, stock, samples),
                ours=self._side(1, self.ours.seen, self.ours, samples),
                floor=samples.floor(),
                matrix_flops=median(samples.flops),
                bandwidth=median(samples.bandwidth),
                decode_bytes=self.weight_bytes + self.work.window_bytes(kept),
            )

    def _side(self, number: int, before: int, stream: Stream, samples: _Samples) -> Side:
        """Return the medians of stock (0) or ours (1), whose chunks came after `before` tokens."""
        chunk, seconds = self.plan.chunk, median(samples.prefill[number])
        needed = self.work.prefill_flops(before, chunk, (None, self.span)[number])
        share = needed / seconds / median(samples.flops) if self.work.is_complete else None
        return Side(
            decode_ms=1000 * median(samples.decode[number]),
            prefill_tokens_per_second=chunk / seconds,
            prefill_flops=needed,
            prefill_share=share,
            bytes=sum(stream.bytes().values()),
            allocated=self.allocated[number],
        )

    def _fill_ours(self, depth: int) -> None:
        """Fill a window that forgets, once; bring one that keeps everything on to `depth`."""
        if self.ours.settles_at is None:
            read_random(self.ours, depth - self.ours.seen, generator=self.generator)
        elif not self.ours.seen:
            read_random(self.ours, self.ours.settles_at + self.plan.chunk, generator=self.generator)

    def _expected(self, depth: int, flops: float, bandwidth: float) -> float:
        """Return the seconds that measuring at `depth` will take, about."""
        plan, work, span = self.plan, self.work, self.span
        held = depth if span is None else span
        chunks = work.prefill_flops(depth, plan.chunk, None) + work.prefill_flops(held, plan.chunk, span)
        floats = (work.weights + work.head) * self.dtype.itemsize
        a_step = (floats + _COPIES * work.state_bytes(depth)) + (self.weight_bytes + work.window_bytes(held))
        seconds: float = plan.repeats * (chunks / flops + plan.steps * a_step / bandwidth)
        if depth == plan.depths[0] or span is None:
            seconds += work.prefill_flops(0, held + plan.chunk, span) / flops
        return seconds / _EFFICIENCY + work.state_bytes(depth) / _RANDOM

    def _report(self, expected: float, done: float) -> SpeedReport:
        policy, options = self.ours.described()
        return SpeedReport(
            model=self.loaded.name,
            policy=policy,
            options=options,
            weights=self.weights,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            plan=self.plan,
            work=self.work,
            weight_bytes=self.weight_bytes,
            rows=tuple(self.rows),
            expected_seconds=expected,
            done=done,
            machine=describe_machine(),
        )


def _require_room(model: nn.Module, policy: Policy, plan: SpeedPlan, work: Work) -> None:
    """Raise if caches that grow would not fit: each is held twice for a moment in a step, and once more."""
    device = next(model.parameters()).device
    copies = 3 if policy.forgets else 6
    available, needed = available_bytes(device), copies * work.state_bytes(plan.depths[-1])
    if available is not None and needed > available:
        raise ConfigurationError(
            f"a depth of {plan.depths[-1]:,} tokens takes {human_bytes(needed)} while it is measured, and "
            f"{human_bytes(available)} of memory are available on {device}: choose smaller --depths"
        )
