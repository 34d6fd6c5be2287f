"""The largest products of what asks with the keys of each block, wherever these keys are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from everlong.attention import compiled_keys
from everlong.kernels.direct import Segments, look


class Blocks(TypedDict):
    """Which tokens blocks are of: from `begin` to before `stop`, `block` in each."""

    begin: int
    stop: int
    block: int


class BlockMaxima:
    """For each block of tokens and each of those that ask, the largest product with one of its keys.

    Keys are looked at in pieces, which may begin and end anywhere. Tokens are counted as who holds them does.

    Parameters
    ----------
    asked : Tensor
        Of each key-value head its own, shape (key-value heads, c, d), in the type to add up in.
    begin, stop : int
        The tokens; blocks follow one another from `begin` on, and the last may be short.
    block : int
        Tokens of a block.

    Attributes
    ----------
    found : Tensor
        Shape (key-value heads, c, blocks); minus infinity where no key was looked at.
    """

    def __init__(self, asked: Tensor, begin: int, stop: int, block: int) -> None:
        self.asked, self.begin, self.stop, self._block = asked.contiguous(), begin, stop, block
        heads, count, _ = asked.shape
        self.found = asked.new_full((heads, count, -(-(stop - begin) // block)), -torch.inf)

    def look(self, first: int, keys: Tensor) -> None:
        """Look at the raw keys of tokens from `first` on, shape (key-value heads, n, d)."""
        count = min(first + keys.shape[1], self.stop) - max(first, self.begin)
        if count <= 0:
            return
        if compiled_keys.may_pay(self.asked, count):
            stop = first + keys.shape[1]
            segments = Segments([keys], first=first, stop=stop, segment=stop)
            if compiled_keys.pays(self.asked, segments, self.found):
                look(self.asked, segments, None, self.found, **self.blocks())
                return
        asked = self.asked.to(keys.device)
        self.take(first, asked @ keys.to(asked.dtype).mT)

    def blocks(self) -> Blocks:
        """Return which tokens the blocks are of, as :func:`~everlong.kernels.direct.look` is told."""
        return {"begin": self.begin, "stop": self.stop, "block": self._block}

    def take(self, first: int, products: Tensor, scale: Callable[[Tensor], Tensor] | None = None) -> None:
        """Take in the products of tokens from `first` on, shape (key-value heads, c, n).

        Those of tokens that do not count are passed over. `scale`, if given, makes the numbers meant of them;
        it keeps their order, and is applied to the largest ones.
        """
        low = max(self.begin - first, 0)
        products, at = products[..., low : max(self.stop - first, 0)], first + low - self.begin
        while count := products.shape[2]:
            to_end = self._block - at % self._block  # of the block that the first of them is in
            length = min(to_end, count)
            taken = count - count % self._block if to_end == self._block <= count else length
            some = products[..., :taken]
            best = some.view(*some.shape[:2], -1, length).amax(3)
            number = at // self._block
            into = self.found[..., number : number + best.shape[2]]
            torch.maximum(into, (best if scale is None else scale(best)).to(into), out=into)
            products, at = products[..., taken:], at + taken
