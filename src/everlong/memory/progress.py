"""Where learning stands, what it took so far, and what one can go on from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from everlong.memory.gate import Worth
from everlong.memory.lessons import Lesson, lessons_restored, lessons_state
from everlong.memory.pairs import Pair
from everlong.memory.segments import Segment

Stage = Literal["elicit", "teach", "write", "learn", "done"]
"""What is being done with a segment."""


@dataclass(frozen=True)
class LearnProgress:
    """Where learning stands.

    Attributes
    ----------
    stage : {"elicit", "teach", "write", "learn", "done"}
        What is being done with the segment; "write": the model writes on after it, to be held to that.
    segment, segments : int
        Its number, and how many there are.
    pairs, kept : int
        Elicited and chosen so far, in all segments.
    dropped : dict of str to int
        Not chosen, by reason.
    sentences, uncovered : int
        Of the segments so far, and those among them that fewer pairs are about than the recipe asks for.
    loss : float or None
        Of the latest step, in nats per token.
    fraction : float
        Of the whole, about.
    tokens_per_second : float
        Of the source, so far.
    seconds_left : float or None
        Until the end, at that pace; None: not known yet.
    """

    stage: Stage
    segment: int
    segments: int
    pairs: int
    kept: int
    dropped: dict[str, int]
    sentences: int
    uncovered: int
    loss: float | None
    fraction: float
    tokens_per_second: float
    seconds_left: float | None


@dataclass
class Account:
    """What was done, and what it took.

    Attributes
    ----------
    tokens : int
        Of the source.
    elicited, kept : int
        Pairs.
    dropped : Counter of str
        Pairs, by the reason for which they were not learned.
    gain : float
        Mean of what the text was worth to the elicited pairs, in nats per token.
    worth : dict of str to Worth
        What the text is worth, by the generator of the pairs.
    sentences, uncovered : int
        Sentences, and those among them that fewer pairs are about than the recipe asks for.
    loss : float
        At the end of the last segment, in nats per token.
    seconds : dict of str to float
        By step.
    """

    tokens: int = 0
    elicited: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    gain: float = 0.0
    worth: dict[str, Worth] = field(default_factory=dict)
    sentences: int = 0
    uncovered: int = 0
    loss: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count the block's seconds as those of a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started


@dataclass
class Progress:
    """What one can go on from, after a whole segment.

    Attributes
    ----------
    segment : int
        The next one's number.
    adapters : list of dict of str to Tensor
        As PEFT saves them: one, or one a segment.
    pool : list of Lesson
        To be rehearsed.
    pairs : list of Pair
        That were learned.
    account : Account
        So far.
    """

    segment: int = 0
    adapters: list[dict[str, Tensor]] = field(default_factory=list)
    pool: list[Lesson] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    account: Account = field(default_factory=Account)

    def copy(self) -> Progress:
        """Return a copy that stays as it is when learning goes on."""
        account = self.account
        return Progress(
            self.segment,
            list(self.adapters),
            list(self.pool),
            list(self.pairs),
            replace(
                account,
                dropped=Counter(account.dropped),
                worth=dict(account.worth),
                seconds=dict(account.seconds),
            ),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON-able values for :meth:`restored`."""
        tensors = {
            f"adapters.{number}.{name}": tensor
            for number, adapter in enumerate(self.adapters)
            for name, tensor in adapter.items()
        }
        pooled, pool = lessons_state(self.pool, "pool")
        return tensors | pooled, {
            "segment": self.segment,
            "adapters": len(self.adapters),
            "pairs": [asdict(pair) for pair in self.pairs],
            "pool": pool,
            "account": {
                **vars(self.account),
                "dropped": dict(self.account.dropped),
                "worth": {kind: asdict(worth) for kind, worth in self.account.worth.items()},
            },
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> Progress:
        """Rebuild what :meth:`state` returned."""
        adapters: list[dict[str, Tensor]] = [{} for _ in range(values["adapters"])]
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "adapters":
                number, _, weight = rest.partition(".")
                adapters[int(number)][weight] = tensor
        pool = lessons_restored(tensors, values["pool"], "pool")
        account = Account(**values["account"])
        account.dropped = Counter(account.dropped)
        account.worth = {kind: Worth(**worth) for kind, worth in values["account"]["worth"].items()}
        return cls(
            values["segment"], adapters, pool, [Pair.restored(saved) for saved in values["pairs"]], account
        )


class Reporter:
    """Tells a caller where learning stands.

    Parameters
    ----------
    call : callable or None
        Who is told.
    parts : sequence of Segment
        All that are known, in order; those before `state` stands are learned.
    state : Progress
        Kept up by who learns.
    """

    def __init__(
        self, call: Callable[[LearnProgress], None] | None, parts: Sequence[Segment], state: Progress
    ) -> None:
        self._call = call
        self._tokens = {part.number: part.tokens for part in parts}
        self._state = state
        self._started = time.perf_counter()
        self._before = self._until(state.segment)
        self._total = sum(self._tokens.values())

    def __call__(self, stage: Stage, segment: int, share: float, loss: float | None = None) -> None:
        """Tell of a stage of a segment, `share` of which is done."""
        if self._call is None:
            return
        account = self._state.account
        done = self._until(segment) + share * self._tokens[segment]
        seconds = time.perf_counter() - self._started
        pace = (done - self._before) / seconds if seconds else 0.0
        self._call(
            LearnProgress(
                stage,
                segment,
                max(self._tokens) + 1,
                account.elicited,
                account.kept,
                dict(account.dropped),
                account.sentences,
                account.uncovered,
                loss,
                done / self._total,
                pace,
                (self._total - done) / pace if pace else None,
            )
        )

    def _until(self, segment: int) -> int:
        return sum(tokens for number, tokens in self._tokens.items() if number < segment)
