"""How chunks of a text merge, level by level, on their way up a model's layers; and one chunk on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tree:
    """What 2^h chunks keep, and where they merge.

    Each chunk stands between the same first and last tokens, which are never dropped.

    Attributes
    ----------
    prefix, suffix : int
        Tokens before the text and behind it, in every chunk; at least one behind it.
    lengths : tuple of int
        Tokens of the text in each of the 2^h chunks; at least one, if there are several.
    room : int
        Tokens of the text in a chunk at most, merged or not.
    borders : tuple of int
        Layers that a chunk has passed when it merges, for each of the h levels; rising.
    neighbours : int
        A token of the text counts as the one of so many on either side that is attended to most.
    """

    prefix: int
    suffix: int
    lengths: tuple[int, ...]
    room: int
    borders: tuple[int, ...]
    neighbours: int = 0

    def __post_init__(self) -> None:
        assert len(self.lengths) == 2 ** len(self.borders)
        assert (
            min(self.lengths) >= min(1, self.levels) and max(self.lengths) <= self.room and self.suffix >= 1
        )
        assert all(low < high for low, high in pairwise((0, *self.borders)))

    @property
    def levels(self) -> int:
        """How often a chunk merges: h."""
        return len(self.borders)

    @property
    def around(self) -> int:
        """Tokens of a chunk that are not of the text."""
        return self.prefix + self.suffix

    @property
    def kept(self) -> list[list[int]]:
        """Tokens of the text that each chunk keeps when it merges with its neighbour, level by level."""
        found, lengths = [], list(self.lengths)
        for _ in self.borders:
            pairs = zip(lengths[::2], lengths[1::2], strict=True)
            found.append([count for pair in pairs for count in shares(*pair, self.room)])
            lengths = [left + right for left, right in zip(found[-1][::2], found[-1][1::2], strict=True)]
        return found


def shares(left: int, right: int, room: int) -> tuple[int, int]:
    """Return how many of their tokens two neighbours keep, together at most `room`.

    Half of the room each, the left one more where it is odd; what one does not need goes to the other.
    """
    mine = min(left, max(room - room // 2, room - right))
    return mine, min(right, room - mine)


def even_cuts(total: int, count: int) -> tuple[int, ...]:
    """Return the lengths of `count` pieces of `total` tokens that differ by one token at most."""
    return tuple(total * (at + 1) // count - total * at // count for at in range(count))


def bins_of(tokens: int, bins: int) -> Tensor:
    """Return in which of so many equal shares of a text each of its tokens stands, shape (tokens,)."""
    return torch.arange(tokens) * bins // tokens


def averages(noted: Sequence[Tensor], bins: int) -> Tensor:
    """Return the average, over chunks, of what was noted of the tokens in each of equal shares of a chunk."""
    total, count = torch.zeros(bins), torch.zeros(bins)
    for attention in noted:
        at = bins_of(len(attention), bins)
        total.index_add_(0, at, attention)
        count.index_add_(0, at, torch.ones(len(attention)))
    return total / count


def find_borders(full: Sequence[int], layers: int, warmup: int, levels: int) -> tuple[int, ...] | None:
    """Return after how many layers chunks merge, level by level; None: there are not so many levels.

    The layers behind the first `warmup` are split evenly between the levels and what comes after the last of
    them; what is left over goes to the first.

    Parameters
    ----------
    full : sequence of int
        Which layers, in the order in which they run, have full attention: chunks merge behind one of these.
    layers : int
        How many layers there are.
    warmup : int
        The first so many leave chunks as they are.
    levels : int
        How often to merge.
    """
    places = [number + 1 for number in full if warmup < number + 1 < layers]
    if len(places) < levels:
        return None
    step = (len(places) + 1) // (levels + 1)
    return tuple(places[len(places) - step * above] for above in range(levels, 0, -1))


@dataclass
class Chunk:
    """A chunk on its way up: what it holds in the layers it has passed.

    Attributes
    ----------
    text : int
        Its tokens of the text.
    hidden : Tensor (1, n, d) or None
        The input of the layer that comes next, where the chunk waits before one.
    keys, values : dict of int to Tensor (1, key-value heads, n, d)
        By layer; keys are unrotated.
    scores : Tensor (n,) or None
        What its last token attends to, in the layer it was noted in last.
    """

    text: int
    hidden: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        held = [*self.keys.values(), *self.values.values()]
        return sum(x.nbytes for x in held) + (0 if self.hidden is None else self.hidden.nbytes)

    def significance(self, tree: Tree) -> Tensor:
        """Return what its tokens of the text are attended to, shape (text,), float32."""
        assert self.scores is not None
        scores = self.scores[tree.prefix : tree.prefix + self.text].float()
        if not tree.neighbours:
            return scores
        width = 2 * tree.neighbours + 1
        return F.max_pool1d(scores[None], width, stride=1, padding=tree.neighbours)[0]

    def reduced(self, count: int, tree: Tree, bias: Tensor | None = None) -> Chunk:
        """Drop tokens of the text, in all layers, until `count` are left: those attended to least.

        Of two that are attended to alike the first stays.

        Parameters
        ----------
        count : int
            Tokens of the text to keep.
        tree : Tree
            What the chunk is of.
        bias : Tensor (bins,), optional
            Attention that tokens receive for where they stand, in equal shares of the text from its beginning
            to its end: subtracted before tokens are compared.
        """
        if count >= self.text:
            return self
        scores = self.significance(tree)
        if bias is not None:
            scores = scores - bias[bins_of(self.text, len(bias))].to(scores.device)
        best = scores.sort(descending=True, stable=True).indices[:count].sort().values
        n = tree.around + self.text
        first, last = (
            torch.arange(*ends, device=best.device) for ends in ((tree.prefix,), (n - tree.suffix, n))
        )
        which = torch.cat((first, best + tree.prefix, last))
        on: dict[torch.device, Tensor] = {}

        def picked(x: Tensor, dim: int) -> Tensor:
            at = on.setdefault(x.device, which.to(x.device))
            return x.index_select(dim, at)

        return Chunk(
            count,
            None if self.hidden is None else picked(self.hidden, 1),
            {number: picked(x, 2) for number, x in self.keys.items()},
            {number: picked(x, 2) for number, x in self.values.items()},
        )

    def merged(self, right: Chunk, tree: Tree) -> Chunk:
        """Put a chunk's text behind this one's, in all layers; what both have around it is averaged."""
        assert self.hidden is not None and right.hidden is not None
        join = _joiner(tree)
        return Chunk(
            self.text + right.text,
            join(self.hidden, right.hidden, 1),
            {number: join(x, right.keys[number], 2) for number, x in self.keys.items()},
            {number: join(x, right.values[number], 2) for number, x in self.values.items()},
        )


def _joiner(tree: Tree) -> Callable[[Tensor, Tensor, int], Tensor]:
    def join(left: Tensor, right: Tensor, dim: int) -> Tensor:
        sizes = [[tree.prefix, x.shape[dim] - tree.around, tree.suffix] for x in (left, right)]
        before, mine, after = left.split_with_sizes(sizes[0], dim)
        first, its, last = right.split_with_sizes(sizes[1], dim)
        return torch.cat(((before + first) / 2, mine, its, (after + last) / 2), dim)

    return join
