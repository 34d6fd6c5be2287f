"""Methods side by side: the same text read by one model, once under each of them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from everlong.attention import POLICIES, Policy, Tier, make_policy, with_sinks
from everlong.errors import ConfigurationError
from everlong.evaluation.perplexity import Bucket, Chunk, bucketed, read_stream, write_on
from everlong.evaluation.resources import describe_machine
from everlong.evaluation.speed import step_seconds
from everlong.evaluation.streams import Stream, open_stream
from everlong.models.anatomy import decoder_of, training_length_of
from everlong.models.head import Head
from everlong.models.loading import LoadedModel
from everlong.reading.detokenize import Detokenizer
from everlong.reading.reports import Progress
from everlong.reading.sampling import Sampler, Sampling
from everlong.registry import unknown_name

STOCK = "stock"
"""The name of the model as it is, among the names of policies."""


@dataclass(frozen=True)
class Method:
    """One way of reading.

    Attributes
    ----------
    name : str
        What tables call it.
    policy : Policy or None
        None: the detached model with transformers' own cache.
    steps : int
        Tokens it goes on to write after the text.
    tier : Tier or None
        Where what leaves the policy's window goes, where it keeps that; None: RAM, in half precision.
    """

    name: str
    policy: Policy | None = None
    steps: int = 20
    tier: Tier | None = None


@dataclass(frozen=True)
class Plan:
    """How a text is read and continued.

    Attributes
    ----------
    chunk : int
        Tokens of one forward.
    width : int
        Positions of one bucket.
    sampling : Sampling
        How the continuation is chosen.
    """

    chunk: int = 512
    width: int = 2048
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("chunk", "width"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class MethodResult:
    """What one method made of the text.

    Attributes
    ----------
    name : str
        As in :class:`Method`.
    policy : str or None
        The policy's registered name; None: stock, or a policy that is not registered.
    options : dict
        The policy's options, resolved for the model.
    buckets : tuple of Bucket
        Perplexity by position.
    chunks : tuple of Chunk
        Seconds and bytes by position.
    decode_ms : float
        Milliseconds to write a token after the text, the mean: what a method does every few tokens counts.
        NaN if none was written. In results made before 2026-11-29, the median.
    continuation : str
        What was written.
    bytes : dict of str to int
        Held after the text, by tier.
    seen, kept, forgotten : int
        Tokens, after the text; pinned ones are among them.
    looks_ahead : bool
        Whether queries gained from later ones, with which they recalled: its perplexities are a little too
        good.
    """

    name: str
    policy: str | None
    options: dict[str, Any]
    buckets: tuple[Bucket, ...]
    chunks: tuple[Chunk, ...]
    decode_ms: float
    continuation: str
    bytes: dict[str, int]
    seen: int
    kept: int
    forgotten: int
    looks_ahead: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite becomes None."""
        finite: dict[str, Any] = _finite(dataclasses.asdict(self))
        return finite

    @classmethod
    def restored(cls, values: dict[str, Any]) -> MethodResult:
        """Return what :meth:`as_json` was made of; an interval that had no end becomes infinite again."""
        endless: dict[str, Any] = {"perplexity": math.inf, "low": 0.0, "high": math.inf}
        buckets: list[dict[str, Any]] = [
            {name: endless.get(name) if value is None else value for name, value in bucket.items()}
            for bucket in values["buckets"]
        ]
        parts = {
            "buckets": tuple(Bucket(**bucket) for bucket in buckets),
            "chunks": tuple(Chunk(**chunk) for chunk in values["chunks"]),
            "decode_ms": math.nan if values["decode_ms"] is None else values["decode_ms"],
        }
        return cls(**{**values, **parts})

    @property
    def tokens_per_second(self) -> float:
        """Of the whole text; scoring is not counted."""
        return sum(chunk.tokens for chunk in self.chunks) / sum(chunk.seconds for chunk in self.chunks)

    @property
    def last_tokens_per_second(self) -> float:
        """Of the last full chunks, up to four: their median, the rate where the text ends."""
        rates = [
            chunk.tokens / chunk.seconds for chunk in self.chunks if chunk.tokens == self.chunks[0].tokens
        ]
        return median(rates[-4:])


@dataclass(frozen=True)
class Comparison:
    """Methods side by side.

    Attributes
    ----------
    model, text : str
        What was read by what, for people.
    tokens : int
        Of the text.
    plan : Plan
        How it was read.
    training_length : int or None
        Tokens the model was trained on.
    results : tuple of MethodResult
        In the order asked for.
    machine : dict
        See :func:`~everlong.evaluation.resources.describe_machine`.
    pinned : int
        Tokens read before the text, which positions do not count.
    """

    model: str
    text: str
    tokens: int
    plan: Plan
    training_length: int | None
    results: tuple[MethodResult, ...]
    machine: dict[str, Any]
    pinned: int = 0

    @property
    def trained_until(self) -> int | None:
        """Position in the text where the training length ends; None where the model does not name it."""
        return None if self.training_length is None else max(0, self.training_length - self.pinned)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite becomes None."""
        plain = dataclasses.asdict(self)
        for shown, result in zip(plain["results"], self.results, strict=True):
            shown["tokens_per_second"] = result.tokens_per_second
            shown["last_tokens_per_second"] = result.last_tokens_per_second
        finite: dict[str, Any] = _finite(plain)
        return finite


def make_methods(names: Sequence[str], options: dict[str, Any] | None = None) -> list[Method]:
    """Make methods from names: ``"stock"``, or a registered policy's.

    Parameters
    ----------
    names : sequence of str
        Each once.
    options : dict, optional
        Each is given to all methods that have it.

    Raises
    ------
    UnknownNameError
        An unknown method, or an option that none of them has.
    ConfigurationError
        No method, or one named twice.
    """
    options = {key.replace("-", "_"): value for key, value in (options or {}).items()}
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ConfigurationError(f"name at least one method: {', '.join([STOCK, *POLICIES])}")
    if len(set(names)) != len(names):
        raise ConfigurationError(f"each method is compared once: {', '.join(names)}")
    for name in names:
        if name != STOCK and name not in POLICIES:
            raise unknown_name("method", name, [STOCK, *POLICIES])
    known = {name: {f.name for f in dataclasses.fields(POLICIES[name])} for name in names if name != STOCK}
    for key in options:
        if not any(key in own for own in known.values()):
            raise unknown_name(f"option of {', '.join(names)}", key, sorted(set().union(*known.values())))
    return [
        Method(name, make_policy(name, {key: options[key] for key in options if key in known[name]}))
        if name in known
        else Method(name)
        for name in names
    ]


def compare_methods(
    loaded: LoadedModel,
    methods: Sequence[Method],
    ids: Tensor,
    *,
    text: str,
    plan: Plan | None = None,
    pinned: Tensor | None = None,
    progress: Callable[[str, Progress], None] | None = None,
    on_text: Callable[[str, str], None] | None = None,
    on_result: Callable[[MethodResult], None] | None = None,
) -> Comparison:
    """Read `ids` under each method, one after another, and go on writing from there.

    Parameters
    ----------
    loaded : LoadedModel
        The model, detached, with its tokenizer.
    methods : sequence of Method
        What to compare.
    ids : Tensor
        The text, shape (n,), n at least 2.
    text : str
        What it is, for people.
    plan : Plan, optional
        How it is read.
    pinned : Tensor, optional
        What comes before the text, shape (m,): read, but neither clocked nor in the buckets. Policies keep it
        as sinks.
    progress : callable, optional
        Told the method's name and its progress after each chunk.
    on_text : callable, optional
        Told the method's name and each piece of text it writes.
    on_result : callable, optional
        Told each result as soon as there is one.

    Raises
    ------
    NumericalError
        A method's surprisals are not finite.
    UnsupportedUseError
        A policy keeps no sinks, so that nothing can be pinned.
    ConfigurationError
        What is pinned leaves no room in a policy's window.
    """
    plan = plan or Plan()
    pinned = ids[:0] if pinned is None else pinned
    if len(pinned):
        methods = [_pinning(method, len(pinned), _training_length(loaded)) for method in methods]
    head = Head(loaded.model)
    results = []
    for method in methods:
        with open_stream(loaded.model, method.policy, tier=method.tier) as stream:
            told = None if progress is None else _with_name(progress, method.name)
            before = read_stream(stream, head, pinned, chunk=plan.chunk).last_hidden if len(pinned) else None
            reading = read_stream(stream, head, ids, chunk=plan.chunk, after=before, progress=told)
            policy, options = stream.described()
            accounts = (stream.bytes(), stream.seen, stream.kept, stream.forgotten)
            stream.end_reading()
            pieces, seconds = [], []
            prompt = torch.cat((pinned, ids))
            for piece, spent in _write(
                stream, head, reading.last_hidden, prompt, loaded.tokenizer, method.steps, plan
            ):
                pieces.append(piece)
                seconds.append(spent)
                if on_text is not None:
                    on_text(method.name, piece)
            results.append(
                MethodResult(
                    method.name,
                    policy,
                    options,
                    tuple(bucketed(reading.surprisal, plan.width)),
                    reading.chunks,
                    1000 * step_seconds(seconds[:-1]) if len(seconds) > 1 else math.nan,
                    "".join(pieces),
                    *accounts,
                    looks_ahead=method.policy is not None and method.policy.looks_ahead,
                )
            )
        if on_result is not None:
            on_result(results[-1])
    return gathered(loaded, results, tokens=len(ids), text=text, plan=plan, pinned=len(pinned))


def gathered(
    loaded: LoadedModel,
    results: Sequence[MethodResult],
    *,
    tokens: int,
    text: str,
    plan: Plan,
    pinned: int = 0,
) -> Comparison:
    """Put results on the same text together; parameters as of :class:`Comparison`."""
    length, machine = _training_length(loaded), describe_machine()
    return Comparison(loaded.name, text, tokens, plan, length, tuple(results), machine, pinned)


def _training_length(loaded: LoadedModel) -> int | None:
    return training_length_of(decoder_of(loaded.model).config)


def _pinning(method: Method, pinned: int, training_length: int | None) -> Method:
    """Return the method with a policy that keeps the first `pinned` tokens."""
    if method.policy is None:
        return method
    policy = with_sinks(method.policy.resolve(training_length), pinned)
    return dataclasses.replace(method, policy=policy)


def _write(
    stream: Stream, head: Head, hidden: Tensor, ids: Tensor, tokenizer: Any, steps: int, plan: Plan
) -> Iterator[tuple[str, float]]:
    """Yield text and seconds, step by step; at last what text is left, without a step."""
    generator = torch.Generator(device=hidden.device)
    generator.manual_seed(plan.sampling.seed or 0)
    sampler = Sampler(plan.sampling, generator)
    recent = ids.tolist()
    detokenizer = Detokenizer(tokenizer, recent)
    for _ in range(steps):
        started = time.perf_counter()
        logits = head.logits(hidden)
        token = sampler(logits[0], recent)
        hidden = write_on(stream, torch.tensor([token], device=hidden.device), logits)
        spent = time.perf_counter() - started
        recent.append(token)
        yield detokenizer.put(token), spent
    yield detokenizer.finish(), 0.0


def _with_name(progress: Callable[[str, Progress], None], name: str) -> Callable[[Progress], None]:
    return lambda at: progress(name, at)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
