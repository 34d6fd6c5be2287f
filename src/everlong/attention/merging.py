"""Hierarchical merging: chunks of a text go up the layers one after another, and merge between two of them.

A chunk is one forward of the decoder. Where it comes to a border between two layers, it drops tokens and, as
the left one of two neighbours, its forward ends there: it waits. The right one's forward takes it in and goes
on with both. So all layers are run by the model's own code, and beside the chunk under way only one chunk a
level waits at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from everlong.attention.cache import StreamCache
from everlong.attention.cache_interface import PolicyCache
from everlong.attention.forward import Forward, Layers, Underway
from everlong.attention.full import FullAttention
from everlong.attention.inputs import Inputs
from everlong.attention.merge_tree import Chunk, Tree
from everlong.attention.parts import Logits
from everlong.attention.positions import working_dtype
from everlong.attention.received import Weighing, weigh
from everlong.attention.view import LayerCall
from everlong.errors import InputError, UnsupportedModelError, UnsupportedUseError
from everlong.models.adapters import Span

Result = TypeVar("Result")
_INSTEAD = "read the text as one stream, such as by `everlong read`, or with InfiniRetri"


class _SetAside(Exception):
    """Ends the forward of a chunk that waits."""


def require_merging(layers: Layers) -> None:
    """Raise unless chunks can merge between a model's layers.

    Raises
    ------
    UnsupportedModelError
        Layers use the keys of others, so what one drops would be missing in another.
    UnsupportedUseError
        Its rotation depends on the length of its input.
    """
    if layers.share_keys:
        raise UnsupportedModelError(
            "some layers of this model use the keys of earlier ones, and chunks that merge between the two "
            f"have dropped some of them: {_INSTEAD}"
        )
    if layers.tables_change(FullAttention()):
        raise UnsupportedUseError(
            "this model's rotation depends on the length of its input: what was read in chunks does not fit "
            f"together; {_INSTEAD}"
        )


def layer_modules(decoder: nn.Module, layers: Layers) -> list[nn.Module]:
    """Return the decoder's layers, each of which holds one attention layer, in the order they run.

    Raises
    ------
    UnsupportedModelError
        The decoder has no such list.
    """
    attention = [layers[number].module for number in layers.kept]
    for candidate in decoder.modules():
        if isinstance(candidate, nn.ModuleList) and len(candidate) == len(attention):
            found = list(candidate)
            pairs = zip(found, attention, strict=True)
            if all(any(part is inner for part in outer.modules()) for outer, inner in pairs):
                return found
    raise UnsupportedModelError(
        "this model's layers are not a list with one attention in each, so nothing can merge between them: "
        f"{_INSTEAD}"
    )


class Merging(PolicyCache):
    """What the forwards of all chunks of one text are given as their cache, one after another.

    Parameters
    ----------
    decoder : nn.Module
        The attached decoder.
    layers : Layers
        Its attention layers.
    owner : str
        The attachment.
    tree : Tree
        How the chunks merge.
    bias : sequence of Tensor (bins,)
        For each level, what :meth:`Chunk.reduced` subtracts; empty: nothing.
    """

    def __init__(
        self, decoder: nn.Module, layers: Layers, owner: str, tree: Tree, bias: Sequence[Tensor] = ()
    ) -> None:
        require_merging(layers)
        super().__init__(owner)
        self.tree = tree
        self.anatomy = layers
        self.numbers = list(layers.kept)
        self._modules_of_layers = layer_modules(decoder, layers)
        self._kept = tree.kept
        self._bias = list(bias)
        self._waiting: list[Chunk] = []
        self._number = 0  # of the chunk that is run, or comes next
        self._forward: MergingForward | None = None
        self._hooks: list[Any] = []
        self._thread = 0
        self._root: Chunk | None = None

    # --- chunk after chunk -------------------------------------------------------------------------

    def read(self, run: Callable[[], Result]) -> Result | None:
        """Run the next chunk.

        Parameters
        ----------
        run : callable
            Calls the model with the chunk's tokens and this as its cache.

        Returns
        -------
        object or None
            What `run` returns, for the last chunk; None for the others.
        """
        try:
            return run()
        except _SetAside:
            return None
        finally:
            self._number += 1

    def bytes(self) -> dict[str, int]:
        """Bytes held between two chunks."""
        held = [*self._waiting, *([] if self._root is None else [self._root])]
        return {"window": sum(chunk.nbytes for chunk in held)}

    def joined(self) -> StreamCache:
        """Return a cache that goes on behind the last chunk, under full attention; what is held goes into it.

        All layers hold the same tokens, at the positions from 0 on.
        """
        root, self._root = self._root, None
        assert root is not None, "all chunks were read, and nothing was taken yet"
        cache = StreamCache(FullAttention(), self.anatomy.kept, self.owner)
        cache.rows, cache.seen = 1, self.tree.around + root.text
        with torch.inference_mode():
            for number, rotation in self.anatomy.rotations(FullAttention(), cache.seen).items():
                memory, call = cache.memories[number], LayerCall(number, rotation)
                memory.settle(memory.append(root.keys.pop(number), root.values.pop(number), call))
        return cache

    # --- one forward -------------------------------------------------------------------------------

    def begin(self, inputs: Inputs, layers: Layers, outer: Underway | None) -> MergingForward:
        """Enter the forward of a chunk."""
        expected = self.tree.around + self.tree.lengths[self._number]
        if (inputs.rows, inputs.tokens) != (1, expected):
            raise InputError(
                f"chunk {self._number} has {expected} tokens in one row; "
                f"the input has {inputs.rows} rows of {inputs.tokens}"
            )
        if any(inputs.arguments.get(name) is not None for name in ("attention_mask", "position_ids")):
            raise UnsupportedUseError("a chunk takes neither an attention mask nor position ids")
        self._in_forward, self._thread = True, threading.get_ident()
        self._forward = MergingForward(self.owner, self, Chunk(self.tree.lengths[self._number]), outer)
        for passed, module in enumerate(self._modules_of_layers):
            enter = partial(self._enter, passed, inputs.tokens)
            self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        return self._forward

    def abandon(self) -> None:
        """Leave the forward, however it ended."""
        super().abandon()
        self._forward = None
        while self._hooks:
            self._hooks.pop().remove()

    def end(self, chunk: Chunk) -> None:
        """Take the chunk that went through all layers."""
        self._root = chunk

    def _enter(
        self, passed: int, tokens: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand a layer its input: what came from the layer before, or what was merged of it."""
        forward = self._forward
        if forward is None or threading.get_ident() != self._thread:
            return None  # another thread's
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if passed in self.tree.borders:
            forward.chunk.hidden = hidden
            merged = self.meet(self.tree.borders.index(passed), forward.chunk)
            forward.go_on(merged)
            assert merged.hidden is not None
            hidden, merged.hidden = merged.hidden, None
        n = hidden.shape[1]
        others = [_fitted(value, "", tokens, n) for value in args[1:]]
        named = {
            name: _fitted(value, name, tokens, n) for name, value in kwargs.items() if name != "hidden_states"
        }
        return ((hidden, *others), named) if args else ((), {"hidden_states": hidden, **named})

    def meet(self, level: int, chunk: Chunk) -> Chunk:
        """Merge a chunk with its left neighbour, or let it wait for the right one."""
        place = self._number >> level
        chunk = chunk.reduced(self._kept[level][place], self.tree, self._bias[level] if self._bias else None)
        if place % 2 == 0:
            self._waiting.append(chunk)
            raise _SetAside
        return self._waiting.pop().merged(chunk, self.tree)

    def positions(self, device: torch.device) -> Tensor:
        """Position ids of the chunk that comes next, shape (1, n)."""
        return torch.arange(self.tree.around + self.tree.lengths[self._number], device=device)[None]

    def adapters(self, rows: int, tokens: int) -> list[Span]:
        """Return the adapter of a forward's tokens: none."""
        return [(None, rows * tokens)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing comes before a chunk."""
        return 0

    def __len__(self) -> int:
        return len(self.numbers)


class Apart(Merging):
    """Chunks that go up alone as far as chunks merge, to see what is attended to where.

    Attributes
    ----------
    noted : list of list of Tensor (text,)
        For each level, the significance of each chunk's text, before the border.
    """

    def __init__(self, decoder: nn.Module, layers: Layers, owner: str, tree: Tree) -> None:
        super().__init__(decoder, layers, owner, tree)
        self.noted: list[list[Tensor]] = [[] for _ in tree.borders]

    def read_one(self, number: int, run: Callable[[], object]) -> None:
        """Run the chunk with that number, as of :meth:`Merging.read`."""
        self._number = number
        self.read(run)

    def meet(self, level: int, chunk: Chunk) -> Chunk:
        """Take note, and go on; or end the forward at the last border."""
        self.noted[level].append(chunk.significance(self.tree).cpu())
        chunk.keys.clear()
        chunk.values.clear()
        if level == self.tree.levels - 1:
            raise _SetAside
        return chunk


@dataclass
class MergingForward:
    """The forward of one chunk under way; attributes as of :class:`Forward`."""

    owner: str
    cache: Merging
    chunk: Chunk
    outer: Underway | None = None
    _attended: int = 0

    def __post_init__(self) -> None:
        self.go_on(self.chunk)

    def go_on(self, chunk: Chunk) -> None:
        """Let the layers that come next see the tokens of `chunk`, from position 0 on."""
        tree, layers = self.cache.tree, self.cache.anatomy
        self.chunk = chunk
        alone = StreamCache(FullAttention(), layers.kept, self.owner)
        alone.begin(1, None)
        self._tokens = tree.around + chunk.text
        self._inner = Forward(self.owner, layers, alone, self._tokens, is_kept=False)

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Let layer `number` attend inside the chunk; parameters as of :meth:`Forward.attend`."""
        self._attended += 1
        self.chunk.keys[number], self.chunk.values[number] = key, value
        if self.cache.numbers.index(number) + 1 in self.cache.tree.borders:
            self.chunk.scores = self._scores(number, query, key, logits)
        return self._inner.attend(number, query, key, value, **logits)

    def _scores(self, number: int, query: Tensor, key: Tensor, logits: Logits) -> Tensor:
        """Return what the last token attends to, shape (n,), averaged over query heads."""
        layers, n = self.cache.anatomy, self._tokens
        rotation = layers.rotation(layers[number], FullAttention(), n, {})
        last, keys = rotation(query[:, :, -1:], n - 1), rotation(key, range(n))
        how = Weighing(logits["scaling"], logits.get("softcap"), logits.get("sink_logits"))
        visible = torch.ones(1, 1, 1, n, dtype=torch.bool, device=key.device)
        _, received = weigh(last.to(working_dtype(last)), keys, None, visible, how)
        return received[0].sum(0) / query.shape[1]

    def finish(self) -> None:
        """Hand the chunk over, once all layers have attended."""
        if self._attended != len(self.cache):
            raise UnsupportedUseError(
                f"{self._attended} of {len(self.cache)} layers attended: the attention implementation was "
                "changed while attached"
            )
        self.cache.end(self.chunk)


def _fitted(value: Any, name: str, tokens: int, n: int) -> Any:
    """Return an argument of a layer, made for `tokens` tokens, as it is for the first n positions."""
    if isinstance(value, (tuple, list)):
        return type(value)(_fitted(each, name, tokens, n) for each in value)
    if not isinstance(value, Tensor):
        return value
    if name in ("position_ids", "cache_position"):
        return torch.arange(n, dtype=value.dtype, device=value.device).expand(*value.shape[:-1], n)
    if name.startswith("position_embeddings"):
        return value[:, :1].expand(-1, n, -1)  # ones and zeros, while attached
    if value.dim() > 1 and value.shape[1] == tokens:
        raise UnsupportedModelError(
            f"this model hands its layers {name or 'a tensor'} of shape {tuple(value.shape)}, made for each "
            f"token before the first layer, which does not fit tokens that merge between layers: {_INSTEAD}"
        )
    return value
