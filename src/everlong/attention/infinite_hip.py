"""InfiniteHiP: small blocks of what left the window, found in three stages that each look at a few keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import working_dtype
from everlong.attention.ready import Choice
from everlong.attention.ready_blocks import ReadyBlocks
from everlong.attention.recalled import Asking, RecallPolicy, by_key_head, held_keys, keys_at
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError

_SHARES = 16, 4, 1
"""What the stages leave, in recalled tokens: 32,768, 8,192 and 2,048 in the paper."""


@POLICIES.register("infinite-hip")
@dataclass(frozen=True)
class InfiniteHiP(RecallPolicy):
    """InfiniteHiP (Lee et al., 2025, arXiv 2502.08910), from its description alone.

    What is kept: all tokens, what left the window in a tier below. What a query sees: `sinks` tokens, the
    blocks that its group recalled, each key-value head its own, and the latest tokens. At which positions:
    one behind the other, as if these were all there is. What is forgotten: nothing.

    What left the window is cut into chunks of `coarse` tokens, from the sinks on. The best of them, 16 times
    `recalled` tokens, are cut into chunks of `medium` tokens, of which the best, 4 times `recalled`, are cut
    into blocks, of which the best are recalled. A chunk is worth as much as the token that a binary descent
    arrives at: halved again and again, that half is kept whose first token is worth more. A token is worth
    its product with the mean query of the group, added up over the query heads that share its key. A chunk at
    either end, of which only some tokens can be recalled, always goes on to the next stage.

    While writing, the first stage asks at every 32nd token, the second at every 16th, the third at every
    8th; between, what each last chose is used again. What left the window since then is not seen until the
    stage asks again that has to find it.

    What differs from the paper. Sinks and shares: 256 + 1,024 latest + 2,048 recalled there; here the latest
    and the recalled are divided as there, whatever the window. Twice as much in the first three layers and
    the last does not fit a window that holds for all layers, so all recall the same. In the search neither
    queries nor keys are rotated, so all keys are equally far, however many there are. Which token stands for
    a half, and that the mean of queries judges it, are our choices.

    Parameters
    ----------
    sinks : int
        G, first tokens kept; 256 in the paper.
    window : int, optional
        W, all keys a query sees: sinks, recalled and latest ones; the model's training length by default. In
        the paper 256 + 2,048 + 1,024.
    recalled : int, optional
        Tokens that each head recalls, a multiple of `block`; by default about two thirds of
        ``window - sinks``, as in the paper.
    coarse, medium, block : int
        Tokens of a chunk in the first stage, of one in the second, and of what is recalled together: powers
        of two, none larger than the one before.
    group : int
        Queries that ask together in prefill; while writing, each that asks does so alone.
    coarse_steps, medium_steps, block_steps : int
        Tokens written until each stage asks again.
    """

    are_in_cache: ClassVar[bool] = True

    sinks: int = 16
    window: int | None = None
    recalled: int | None = None
    coarse: int = 256
    medium: int = 32
    block: int = 8
    group: int = 64
    coarse_steps: int = 32
    medium_steps: int = 16
    block_steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("coarse", "medium", "block", "coarse_steps", "medium_steps", "block_steps"):
            require_count("InfiniteHiP", name, self._field(name), least=1)
        for name in ("coarse", "medium", "block"):
            size = self._field(name)
            if size & (size - 1):
                low = 1 << size.bit_length() - 1
                raise ConfigurationError(
                    f"InfiniteHiP: {name}={size} must be a power of two, to be halved: use {low} or {2 * low}"
                )
        if not self.coarse >= self.medium >= self.block:
            raise ConfigurationError(
                f"InfiniteHiP: chunks become smaller from stage to stage, unlike coarse={self.coarse}, "
                f"medium={self.medium}, block={self.block}: name them in this order, the largest first"
            )

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory for `layer`, which has many small blocks ready."""
        memory = super().memory(layer, start)
        memory.ready = ReadyBlocks()
        return memory

    def unit(self) -> int:
        """Return the tokens of a block."""
        return self.block

    def default_recalled(self, room: int) -> int:
        """Return two thirds of the room."""
        return 2 * room // 3

    def choose(self, asking: Asking, queries: Queries, view: LayerView) -> Choice:
        """Return for each head the blocks that the three stages leave, or left shortly before."""
        sinks, block = self.sinks, self.block
        # Whole blocks, counted from the sinks on.
        low, high = -(-(asking.begin - sinks) // block), (asking.stop - sinks) // block
        if high - low <= self.shape()[1] // block:
            return [[self._span(number) for number in range(low, high)]]
        search = _Search(self, asking, queries, view, low * block, high * block)
        steps, kept = self._kept(asking, low, view) if search.asks_alone else (0, [])
        everies = self.coarse_steps, self.medium_steps, self.block_steps
        again = next((stage for stage in range(3) if not kept or steps % everies[stage] == 0), 3)
        found = kept[:again]
        for stage in range(again, 3):
            found.append(search.best(stage, found[-1] if found else None))
        self._keep(asking, low, steps + 1 if search.asks_alone else 0, found, view)
        return [[self._span(number) for number in numbers] for numbers in found[-1].tolist()]

    def _span(self, number: int) -> tuple[int, int]:
        begin = self.sinks + number * self.block
        return begin, begin + self.block

    def sizes(self) -> tuple[int, int, int]:
        """Return the tokens of a chunk in each stage."""
        return self.coarse, self.medium, self.block

    def most(self, stage: int) -> int:
        """Return how many whole chunks a stage leaves."""
        return max(1, _SHARES[stage] * self.shape()[1] // self.sizes()[stage])

    # --- what the stages left, for the tokens written next -----------------------------------------------

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Nothing, but said: what was chosen for tokens that are taken back would be used again."""
        return None

    def _kept(self, asking: Asking, low: int, view: LayerView) -> tuple[int, list[Tensor]]:
        """Return how many tokens have asked alone since, and what each stage left; 0 and none: ask anew.

        That is so where none asked alone before, or where the tier has lost tokens since.
        """
        notes = view.memory.index.get(_name(view))
        if notes is None:
            return 0, []
        steps, since, *counts = notes[asking.number, :5].tolist()
        if steps == 0 or since != low:
            return 0, []
        heads, kept, at = held_keys(view).shape[1], [], 5
        for count in counts:
            kept.append(notes[asking.number, at : at + heads * count].reshape(heads, count))
            at += heads * count
        return steps, kept

    def _keep(self, asking: Asking, low: int, steps: int, found: list[Tensor], view: LayerView) -> None:
        """Note what the stages left; 0 steps: what was noted counts no more."""
        index, name = view.memory.index, _name(view)
        if name not in index:
            if not steps:
                return
            keys = held_keys(view)
            most = 5 + keys.shape[1] * sum(self.most(stage) + 2 for stage in range(3))  # with both ends
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                index[name] = torch.zeros(len(keys), most, dtype=torch.long)
        row = index[name][asking.number]
        row[0] = steps
        if steps:
            numbers = [torch.tensor([low, *(x.shape[1] for x in found)]), *(x.flatten() for x in found)]
            flat = torch.cat(numbers)
            row[1 : 1 + len(flat)] = flat


class _Search:
    """The three stages for one row of a group: of tokens [low, high) after the sinks, in whole blocks.

    Chunks are counted from the sinks on in each stage, as tensors (key-value heads, chunks), in order. Those
    that do not lie within the range as a whole stand in the same columns in all heads.
    """

    def __init__(
        self, policy: InfiniteHiP, asking: Asking, queries: Queries, view: LayerView, low: int, high: int
    ) -> None:
        self._policy, self._row, self._view = policy, asking.number, view
        self._low, self._high = low, high
        asked = queries.raw[asking.number, :, asking.queries].detach()
        self.asks_alone = asked.shape[1] == 1
        self._heads = held_keys(view).shape[1]
        self._asked = by_key_head(asked.to(working_dtype(asked)).mean(1), self._heads)[..., None]

    def best(self, stage: int, within: Tensor | None) -> Tensor:
        """Return the chunks that a stage leaves of those within what the stage before left."""
        sizes, most = self._policy.sizes(), self._policy.most(stage)
        size = sizes[stage]
        if within is None:
            chunks = torch.arange(self._low // size, -(-self._high // size)).expand(self._heads, -1)
        else:
            ratio = sizes[stage - 1] // size
            chunks = (within[..., None] * ratio + torch.arange(ratio)).flatten(1)
        begins = chunks[0] * size
        is_there = (begins < self._high) & (begins + size > self._low)
        chunks, begins = chunks[:, is_there], begins[is_there]
        is_whole = (begins >= self._low) & (begins + size <= self._high)
        whole = chunks[:, is_whole]
        if whole.shape[1] <= most:
            return chunks
        worth = self._worth(whole * size, size)
        order = worth.sort(descending=True, stable=True).indices[:, :most]
        return torch.cat((whole.gather(1, order), chunks[:, ~is_whole]), 1).sort().values

    def _worth(self, begins: Tensor, size: int) -> Tensor:
        """Return what the token is worth that the descent arrives at, of each chunk."""
        worth = self._products(begins)
        while size > 1:
            size //= 2
            later = self._products(begins + size)
            begins = torch.where(later > worth, begins + size, begins)
            worth = torch.maximum(worth, later)
        return worth

    def _products(self, tokens: Tensor) -> Tensor:
        """Return the products of each head's tokens, counted from the sinks on, with what is asked."""
        keys = keys_at(tokens + self._policy.sinks, self._row, self._view).to(self._asked)
        return (keys @ self._asked)[..., 0].cpu()


def _name(view: LayerView) -> str:
    """Return what a layer calls what its stages left: some layers share a memory."""
    return f"{view.call.layer}.stages"
