"""Where keys and values go when they leave the window: nowhere, or a tier that can be recalled from."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from everlong.attention.block_maxima import BlockMaxima
from everlong.attention.coding import Precision, coded, coded_bytes, in_a_row, plain
from everlong.attention.key_index import KeyIndex, keys_of_two
from everlong.attention.shelves import Block, DiskShelf, RamShelf, Shelf, is_in_ram
from everlong.errors import ConfigurationError, StateError
from everlong.models.placement import available_bytes

BLOCK = 64
"""Tokens that are kept together."""

_READ = 64  # blocks read at a time
_INDEX = "tier.index."


class TierLostError(Exception):
    """What a tier held cannot be read any more; it holds less from now on, and can be asked again."""


@dataclass(frozen=True)
class Tier:
    """How what leaves the window is kept, where a policy keeps it.

    Attributes
    ----------
    place : str or Path
        "ram"; "disk", a file among the system's temporary ones; or a folder that it lies in. The file has no
        name, and is gone with the process.
    precision : {"float16", "int8", "exact"}
        Half precision; bytes, with a scale for each block of 64 tokens, head and channel; or as the model
        computes.
    limit : int, "auto" or None
        Bytes of whole blocks that all layers of a stream hold at most: the oldest go, and count as forgotten.
        "auto": in RAM a quarter of what is available when the stream begins; on disk half of what is free,
        and no more than RAM is available, as policies that look at all keys have a quarter of them there, too
        (on top of the limit). None: no limit.
    """

    place: str | Path = "ram"
    precision: Precision = "float16"
    limit: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ConfigurationError(
                f"Tier: precision={self.precision!r} is not known: use {', '.join(get_args(Precision))}"
            )
        limit = self.limit
        is_bytes = isinstance(limit, int) and not isinstance(limit, bool) and limit > 0
        if limit not in (None, "auto") and not is_bytes:
            raise ConfigurationError(
                f"Tier: limit must be 'auto', None or a number of bytes above 0, not {self.limit!r}"
            )
        if not isinstance(self.place, (str, Path)) or not str(self.place):
            raise ConfigurationError(f"Tier: place must be 'ram', 'disk' or a folder, not {self.place!r}")

    @classmethod
    def of(cls, tier: Tier | str | Path | None) -> Tier:
        """Return a tier, of which the place alone may be given."""
        return tier if isinstance(tier, Tier) else cls() if tier is None else cls(tier)

    def shelf(self) -> Shelf:
        """Return where the blocks of one layer go.

        Raises
        ------
        ConfigurationError
            The folder is missing, or cannot be written to.
        """
        if self.place == "ram":
            return RamShelf()
        try:
            return DiskShelf(self._folder)
        except OSError as error:
            raise ConfigurationError(
                f"a tier cannot lie in {self._folder}: {error.strerror or error}; name a folder that is "
                "there and can be written to, or use the tier 'ram'"
            ) from error

    def bytes_at_most(self) -> int | None:
        """Return the limit of a stream that begins now; None: there is none, or no memory is known."""
        if self.limit != "auto":
            return self.limit
        available = available_bytes(torch.device("cpu"))
        if self.place == "ram":
            return None if available is None else available // 4
        free = shutil.disk_usage(self._folder).free // 2
        return free if available is None else min(free, available)

    @property
    def _folder(self) -> Path:
        return Path(tempfile.gettempdir()) if self.place == "disk" else Path(self.place).expanduser()


class BlockStore:
    """The raw keys and the values of one layer's tokens that left the window, in stream order.

    Whole blocks go to a shelf, and are shared between copies; the tokens of one that is not whole yet stay as
    they are. Tokens are numbered from the first that came, those that were given up included.
    """

    def __init__(self) -> None:
        self.length = 0
        self._tier = Tier()
        self._shelf: Shelf = RamShelf()
        self._most: int | None = None  # bytes of blocks
        self._blocks: list[Block] = []
        self._gone = 0  # blocks given up, before those
        self._open: tuple[Tensor, Tensor] | None = None  # of BLOCK tokens each, not all filled
        self._like: tuple[torch.dtype, torch.device] | None = None
        self._index: KeyIndex | None = None

    def use(self, tier: Tier, shelf: Shelf, most: int | None = None) -> None:
        """Keep blocks on a shelf as `tier` says, up to so many bytes. Asked first."""
        assert not self.length
        self._tier, self._shelf, self._most = tier, shelf, most

    def __len__(self) -> int:
        return self.length

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        twin._blocks, twin._shelf = list(self._blocks), copy.deepcopy(self._shelf, memo)
        if self._open is not None:
            twin._open = (self._open[0].clone(), self._open[1].clone())
        twin._index = copy.deepcopy(self._index, memo)
        return twin

    @property
    def first(self) -> int:
        """The first token that is still here."""
        return self._gone * BLOCK

    @property
    def whole(self) -> int:
        """Tokens that came in whole blocks; the others are kept as they are."""
        return self.length - self.length % BLOCK

    @property
    def is_last_of_block(self) -> bool:
        """Whether the next token makes a block whole."""
        return self.length % BLOCK == BLOCK - 1

    # --- tokens come and go --------------------------------------------------------------------------

    def append(self, raw_keys: Tensor, values: Tensor) -> None:
        """Take over tokens that left the window, both of shape (batch, key-value heads, n, d)."""
        raw_keys, values = raw_keys.detach(), values.detach()
        if self._open is None:
            self._open = _room(raw_keys), _room(values)
            self._like = raw_keys.dtype, raw_keys.device
        assert self._open is not None
        done = 0
        while done < raw_keys.shape[2]:
            at = self.length % BLOCK
            count = min(BLOCK - at, raw_keys.shape[2] - done)
            for buffer, new in zip(self._open, (raw_keys, values), strict=True):
                buffer[:, :, at : at + count] = new[:, :, done : done + count]
            self.length += count
            done += count
            if self.length % BLOCK == 0:
                self._shelve(coded(*self._open, self._tier.precision))

    def _shelve(self, tensors: Sequence[Tensor]) -> None:
        """Put a block on the shelf; beyond the limit the oldest goes, or this one where none fits."""
        if self._index is not None:
            assert self._like is not None
            self._index.append(plain(tensors, self._tier.precision, self._like[0])[0].cpu())
        self._trim(1)
        if self._fits(1):
            self._blocks.append(self._shelf.put(tensors))
        else:
            self._gone += 1
            if self._index is not None:
                self._index.forget(self.first)

    def _fits(self, blocks: int) -> bool:
        assert self._open is not None
        size = coded_bytes(*self._open, BLOCK, self._tier.precision)
        return self._most is None or blocks * size <= self._most

    def _trim(self, more: int) -> None:
        """Give up the oldest blocks until there is room for some more."""
        while self._blocks and not self._fits(len(self._blocks) + more):
            self._give_up(1)

    def _give_up(self, count: int) -> None:
        if count > 0:
            self._gone += len(self._blocks[:count])
            del self._blocks[:count]
            if self._index is not None:
                self._index.forget(self.first)

    # --- reading ----------------------------------------------------------------------------------------

    def read(self, begin: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return raw keys and values of tokens [begin, stop), which are still here, as the model computes.

        Raises
        ------
        StateError
            They are not here: not yet, or not any more.
        TierLostError
            They cannot be read; :attr:`first` is further on from now on.
        """
        if self._open is None or not self.first <= begin < stop <= self.length:
            raise StateError(
                f"tokens [{begin}, {stop}) are not in the tier: it holds [{self.first}, {self.length})"
            )
        closed = self.length - self.length % BLOCK
        pieces: list[tuple[Tensor, Tensor]] = []
        if begin < closed:
            low, high = begin // BLOCK - self._gone, -(-min(stop, closed) // BLOCK) - self._gone
            keys, values = self._decoded(self._blocks[low:high])
            at = begin - begin // BLOCK * BLOCK
            span = slice(at, at + min(stop, closed) - begin)
            pieces.append((keys[:, :, span], values[:, :, span]))
        if stop > closed:
            span = slice(max(begin - closed, 0), stop - closed)
            pieces.append((self._open[0][:, :, span], self._open[1][:, :, span]))
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat([keys for keys, _ in pieces], 2), torch.cat([values for _, values in pieces], 2)

    def look(self, row: int, best: BlockMaxima) -> None:
        """Look at a row's raw keys, for blocks of tokens that are all still here.

        They are looked at where they are at hand in bytes, except where the tier is exact: they are read for
        that once, at the first call.

        Raises
        ------
        TierLostError
            They cannot be read; :attr:`first` is further on from now on.
        """
        assert self._open is not None
        index = self._indexed()
        if best.begin < self.whole:
            index.look(row, best)
        if best.stop > self.whole:
            best.look(self.whole, self._open[0][row, :, : self.length - self.whole])

    def keys_at(self, row: int, tokens: Tensor) -> Tensor:
        """Return raw keys of a row's `tokens`, (key-value heads, n) on the CPU, each head its own.

        They are found, and lost, as for :meth:`look`; shape (key-value heads, n, d).
        """
        early = partial(self._indexed().keys_at, row)
        return keys_of_two(tokens, self.whole, early, partial(self._latest_keys, row))

    def _latest_keys(self, row: int) -> Tensor:
        assert self._open is not None
        return self._open[0][row].cpu()

    def _indexed(self, begun: dict[str, Tensor] | None = None) -> KeyIndex:
        """Return the keys of whole blocks, brought together at the first call and kept up from then on."""
        if self._index is None:
            index = KeyIndex(self.first, is_exact=self._tier.precision == "exact", begun=begun)
            for at in range(0, len(self._blocks), _READ):
                index.append(self._decoded(self._blocks[at : at + _READ])[0].cpu())
            self._index = index
        return self._index

    def _get(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Read blocks as they are kept; if that fails, all are given up."""
        try:
            return self._shelf.get(blocks)
        except OSError as error:
            self._lose(error)
            raise TierLostError from error

    def _lose(self, error: OSError) -> None:
        warnings.warn(
            f"the tier fails ({error}): the {len(self._blocks) * BLOCK:,} tokens that a layer had in it are "
            "forgotten; what is in the window stays",
            stacklevel=3,
        )
        self._give_up(len(self._blocks))

    def _decoded(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        assert self._like is not None
        found = self._get(blocks)
        dtype, device = self._like
        keys, values = plain(found, self._tier.precision, dtype)
        return in_a_row(keys).to(device), in_a_row(values).to(device)

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (repeats allowed)."""
        if self._open is None or rows.tolist() == list(range(self._open[0].shape[0])):
            return
        keys, values = self._open
        self._open = keys[rows.to(keys.device)], values[rows.to(values.device)]
        if self._index is not None:
            self._index.pick_rows(rows)
        try:
            self._blocks = [
                self._shelf.put([x[0][rows] for x in self._get([block])]) for block in self._blocks
            ]
        except TierLostError:
            return
        self._trim(0)

    # --- accounts and state -------------------------------------------------------------------------------

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by tier; those of blocks that a copy shares are counted in both."""
        if self._open is None:
            return {"ram": 0, "disk": 0}
        size = coded_bytes(*self._open, BLOCK, self._tier.precision)
        in_ram = sum(map(is_in_ram, self._blocks))
        return {
            "ram": sum(x.nbytes for x in self._open) + in_ram * size + self._index_bytes,
            "disk": (len(self._blocks) - in_ram) * size,
        }

    @property
    def _index_bytes(self) -> int:
        return 0 if self._index is None else self._index.nbytes()

    def nbytes_at(self, tokens: int, like: tuple[Tensor, Tensor]) -> dict[str, int]:
        """Bytes held once `tokens` came, spare room aside; keys and values are `like` these."""
        blocks, size = tokens // BLOCK, coded_bytes(*like, BLOCK, self._tier.precision)
        if self._most is not None:
            blocks = min(blocks, self._most // size)
        held = {"ram": tokens % BLOCK * sum(x[:, :, :1].nbytes for x in like), "disk": 0}
        held[self._shelf.kind] += blocks * size
        return held

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a saved session needs: tensors and JSON-able numbers."""
        if self._open is None:
            return {}, {}
        tensors = {
            f"tier.open.{name}": x[:, :, : self.length % BLOCK].clone()
            for name, x in zip(("keys", "values"), self._open, strict=True)
        }
        try:
            found = self._get(self._blocks) if self._blocks else []
        except TierLostError:
            found = []
        tensors |= {f"tier.blocks.{number}": x for number, x in enumerate(found)}
        if self._index is not None:
            tensors |= {_INDEX + name: x for name, x in self._index.state(self.first).items()}
        return tensors, {"length": self.length, "gone": self._gone, "precision": self._tier.precision}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned; bit by bit where the precision is the same.

        Raises
        ------
        StateError
            It is of another kind.
        """
        if not numbers:
            return
        precision, gone = numbers["precision"], int(numbers["gone"])
        if precision not in get_args(Precision):
            raise StateError(f"the saved state has a tier of a precision that is not known: {precision!r}")
        keys, values = tensors["tier.open.keys"], tensors["tier.open.values"]
        blocks = [tensors[f"tier.blocks.{n}"] for n in range(4) if f"tier.blocks.{n}" in tensors]
        self._like = keys.dtype, keys.device
        self._gone, self.length = gone, gone * BLOCK
        self._open = _room(keys), _room(values)
        for number in range(len(blocks[0]) if blocks else 0):
            block = [x[number].cpu() for x in blocks]
            self.length += BLOCK
            if precision == self._tier.precision:
                self._shelve(block)
            else:
                held = plain(block, precision, keys.dtype)
                self._shelve(coded(held[0], held[1], self._tier.precision))
        begun = {name.removeprefix(_INDEX): x for name, x in tensors.items() if name.startswith(_INDEX)}
        if begun and self._gone == gone:
            self._indexed(begun)
        if keys.shape[2]:
            self.append(keys, values)
        if self.length != numbers["length"]:
            raise StateError("the saved state is not complete: blocks of its tier are missing")


def _room(like: Tensor) -> Tensor:
    """Return room for a block of what is `like` this."""
    with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
        return like.new_empty(*like.shape[:2], BLOCK, like.shape[3])
