"""What learning costs: an unrelated text and task before and after, and what later turns leave of earlier."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.loss import surprisal
from everlong.evaluation.probes import Probe
from everlong.evaluation.recall import Recall, recall
from everlong.evaluation.statistics import Interval, stream_interval


@dataclass(frozen=True, eq=False)
class Standing:
    """How a model does on what it is not taught.

    Attributes
    ----------
    surprisal : Tensor
        Of each token of an unrelated text, in nats, shape (n,).
    recall : Recall
        On a small unrelated task.
    """

    surprisal: Tensor
    recall: Recall

    @property
    def loss(self) -> Interval:
        """Mean surprisal with its 95 % interval."""
        return stream_interval(self.surprisal.tolist())

    def loss_above(self, before: Standing) -> Interval:
        """Return by how much the loss is above that of `before`, in nats a token, as a paired interval.

        Raises
        ------
        InputError
            It was measured on another text.
        """
        if self.surprisal.shape != before.surprisal.shape:
            raise InputError(
                f"not the same text: {len(self.surprisal)} and {len(before.surprisal)} tokens were scored"
            )
        return stream_interval((self.surprisal - before.surprisal).tolist())

    def accuracy_above(self, before: Standing) -> Interval:
        """Return by how much more of the task is right than in `before`, paired: below 0 is forgetting."""
        return self.recall.above(before.recall)


def standing(
    model: Any, tokenizer: Any, text: str, probes: Sequence[Probe], *, context: str | Sequence[str] = ""
) -> Standing:
    """Measure a model on an unrelated text and task; call it before and after learning.

    Parameters
    ----------
    model, tokenizer
        As in :func:`~everlong.evaluation.recall.recall`.
    text : str
        Unrelated to what is learned.
    probes : sequence of Probe
        A small task, such as :func:`~everlong.evaluation.grounded.cloze` of that text.
    context : str or sequence of str
        What the model reads before each probe.
    """
    return Standing(surprisal(model, tokenizer, text), recall(model, tokenizer, probes, context=context))


def wrong_documents(count: int, seed: int) -> list[int]:
    """Return for each of `count` documents the number of another one, each used once.

    A memory of the wrong document shows how much of a score is the form of the answers and not their content.

    Raises
    ------
    ConfigurationError
        There are fewer than two.
    """
    if count < 2:
        raise ConfigurationError(f"a wrong document needs at least two of them, not {count}")
    order = random.Random(f"wrong {seed}").sample(range(count), count)
    return [other for _, other in sorted(zip(order, order[1:] + order[:1], strict=True))]


@dataclass(frozen=True)
class Retention:
    """Accuracy on every segment learned so far, after every turn: a lower triangle.

    Attributes
    ----------
    rows : tuple of tuple of float
        ``rows[turn][segment]``, segments 0 to `turn` each.

    Raises
    ------
    InputError
        A row is too short or too long.
    """

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for turn, row in enumerate(self.rows):
            if len(row) != turn + 1:
                raise InputError(f"after turn {turn} there are {turn + 1} segments, not {len(row)}")

    def with_turn(self, row: Sequence[float]) -> Retention:
        """Return the matrix with one turn more."""
        return Retention((*self.rows, tuple(row)))

    @property
    def learned(self) -> float:
        """Mean accuracy on each segment right after it was learned: the diagonal."""
        return fmean(row[-1] for row in self.rows)

    @property
    def final(self) -> float:
        """Mean accuracy on all segments after the last turn."""
        return fmean(self.rows[-1])

    @property
    def forgotten(self) -> float:
        """Mean loss from a segment's best accuracy to its last (Chaudhry et al. 2018); 0 for one turn."""
        last = len(self.rows) - 1
        lost = [max(row[s] for row in self.rows[s:last]) - self.rows[last][s] for s in range(last)]
        return fmean(lost) if lost else 0.0

    def table(self) -> str:
        """Return the matrix in percent as a Markdown table, a line a turn."""
        heads = [f"segment {s + 1}" for s in range(len(self.rows))]
        lines = [["after turn", *heads, "mean"], ["---:"] * (len(heads) + 2)]
        for turn, row in enumerate(self.rows):
            cells = [f"{100 * value:.0f}" for value in row] + [""] * (len(heads) - len(row))
            lines.append([str(turn + 1), *cells, f"{100 * fmean(row):.0f}"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
