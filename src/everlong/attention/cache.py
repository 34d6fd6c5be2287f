"""The cache of a stream: one memory per attention layer behind transformers' cache interface."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everlong.attention.branches import Branches
from everlong.attention.cache_interface import HALF_DONE, PolicyCache
from everlong.attention.policy import Policy, make_policy, policy_options
from everlong.attention.positions import Rotation
from everlong.attention.tiers import Tier
from everlong.attention.window import LocalWindow
from everlong.errors import StateError, UnsupportedUseError
from everlong.models.adapters import Span

if TYPE_CHECKING:
    from everlong.attention.open_step import OpenStep
    from everlong.attention.recordable import Recorded
    from everlong.attention.recording import StaticRecorded
_NOT_COPIED: dict[str, Any] = {"recorded": None, "recorded_open": None}


@dataclass(frozen=True)
class KeptLayer:
    """A layer whose keys are kept.

    Attributes
    ----------
    window : int or None
        Its own sliding window; None: a full-attention layer, which follows the policy.
    last_reader : int
        The last layer that attends to its keys: itself, unless others share them.
    """

    window: int | None
    last_reader: int


class StreamCache(PolicyCache):
    """What an attached model remembers of a stream. Made by ``handle.new_cache()`` or by ``generate()``.

    It never refers to the model. It counts tokens seen, not kept: :meth:`get_seq_length` is what
    transformers continues from.

    Parameters
    ----------
    policy : Policy
        The resolved policy of the full-attention layers.
    layers : dict of int to KeptLayer
        By number, the layers that have keys of their own.
    owner : str
        The attachment this cache belongs to.
    offset : int
        Stream position of the first token.
    tier : Tier, optional
        How what leaves the window is kept, where the policy keeps it.
    """

    def __init__(
        self,
        policy: Policy,
        layers: dict[int, KeptLayer],
        owner: str,
        offset: int = 0,
        tier: Tier | None = None,
    ) -> None:
        super().__init__(owner)
        self.policy = policy
        self.tier = tier or Tier()
        self.offset = offset
        self.seen = self.folded = 0
        self.adapter: str | None = None
        """What of the attachment's adapters its forwards use."""
        self.row_adapters: tuple[str | None, ...] | None = None
        """Where its rows differ in that: what each uses."""
        self.pads: tuple[int, ...] | None = None
        self.rows: int | None = None
        self.memories = {
            number: (policy if layer.window is None else LocalWindow(layer.window)).memory(
                layer.last_reader, offset
            )
            for number, layer in layers.items()
        }
        below = [memory.tier for memory in self.memories.values() if memory.tier is not None]
        if below:
            shelf, most = self.tier.shelf(), self.tier.bytes_at_most()
            for store in below:
                store.use(self.tier, shelf, None if most is None else most // len(below))
        self._kept_layers = dict(layers)
        self.branches: Branches | None = None
        self._is_provisional = False
        self._provisional_seen = 0
        self.unfit = ""
        """Why nothing can go on from here; empty: it can."""
        self.recorded: StaticRecorded | None = None
        self.recorded_open: Recorded[OpenStep] | None = None
        """Steps of writing, recorded for this cache alone, the second but for attention; never saved."""

    # --- accounts ----------------------------------------------------------------------------------

    @property
    def window(self) -> int | None:
        """Keys a query sees at most in a full-attention layer; None: no limit."""
        return self.policy.span

    @property
    def kept(self) -> int:
        """Tokens per row that stand in the window of some layer."""
        return max(memory.kept for memory in self.memories.values())

    @property
    def first_kept(self) -> int:
        """Index of the first token, sinks aside, that stands in the window of some layer."""
        return min(memory.first for memory in self.memories.values())

    @property
    def recallable(self) -> int:
        """Tokens per row that left the window and can be recalled."""
        return max(0 if m.tier is None else len(m.tier) - m.tier.first for m in self.memories.values())

    @property
    def forgotten(self) -> int:
        """Tokens per row that no layer holds any more."""
        return self.seen - self._provisional_seen - self.kept - self.recallable

    def bytes(self) -> dict[str, int]:
        """Bytes held, by tier."""
        return _summed(memory.nbytes() for memory in self.memories.values())

    def bytes_at(self, tokens: int) -> dict[str, int]:
        """Bytes it will hold when `tokens` were seen, by tier; once some were. Spare room is not counted."""
        if self.rows is None:
            raise StateError("what a cache will hold is known once it was read into: read a token first")
        return _summed(
            held
            for number, memory in self.memories.items()
            for held in (memory.nbytes_at(tokens), self.policy.nbytes_beside(number, tokens, memory))
        )

    # --- taking back -------------------------------------------------------------------------------

    @contextmanager
    def provisional(self, branches: Branches | None = None) -> Iterator[None]:
        """Within the block, tokens are seen, not settled: follow with :meth:`commit` or :meth:`rollback`.

        Parameters
        ----------
        branches : Branches, optional
            How the tokens of the block's one forward follow one another; otherwise each follows the last.

        Raises
        ------
        UnsupportedUseError
            The policy, or where the stream stands, does not take branches.
        """
        if type(self.policy).observe is not Policy.observe:
            raise UnsupportedUseError(f"{type(self.policy).__name__} takes note of tokens: none goes back")
        if branches is not None:
            self._require_branches(branches)
        self._is_provisional, self.branches = True, branches
        try:
            yield
        finally:
            self._is_provisional, self.branches = False, None

    def takes_branches(self, height: int) -> bool:
        """Whether the stream stands where branches of `height` tokens may follow: its sinks are filled."""
        longest, until = max(self.pads or (0,)), self.policy.guessed_until()
        return (until is None or self.seen + height <= until) and all(
            self.seen >= memory.sinks + longest and memory.takes_branches(height)
            for memory in self.memories.values()
        )

    def _require_branches(self, branches: Branches) -> None:
        if not self.policy.takes_branches:
            raise UnsupportedUseError(
                f"{type(self.policy).__name__} does not take tokens that follow in several ways"
            )
        if self._provisional_seen or not self.takes_branches(branches.height):
            raise UnsupportedUseError("branches follow a stream whose sinks are read and settled")

    @property
    def is_provisional(self) -> bool:
        """Whether appended tokens are kept aside at present."""
        return self._is_provisional

    @property
    def is_settled(self) -> bool:
        """Whether all tokens seen are settled, and the next ones will be."""
        return not (self._is_provisional or self._provisional_seen)

    def commit(self, which: list[int] | None = None) -> None:
        """Settle provisional tokens: all, or those numbered `which`, as if they had followed one another."""
        count = self._provisional_seen
        if which is not None and (len(set(which)) != len(which) or any(not 0 <= i < count for i in which)):
            raise StateError(
                f"commit({which}): there are {count} provisional tokens, numbered from 0, each once"
            )
        with torch.no_grad():
            for memory in self.memories.values():
                memory.commit(which, self.pads)
        self.seen -= count - (count if which is None else len(which))
        self._provisional_seen = 0

    def rollback(self) -> None:
        """Forget the provisional tokens."""
        for memory in self.memories.values():
            memory.rollback()
        self.seen -= self._provisional_seen
        self._provisional_seen = 0

    # --- one forward -------------------------------------------------------------------------------

    def admit(self, rows: int) -> None:
        """Raise unless a forward of `rows` rows can go on from here."""
        if self.unfit:
            raise StateError(self.unfit)
        if self._provisional_seen and not self._is_provisional:
            raise StateError("there are provisional tokens: commit() or rollback() first")
        if self.branches is not None and self._provisional_seen:
            raise StateError("branches are run in one forward: commit() or rollback() before the next")
        if self.rows is not None and rows != self.rows:
            raise StateError(f"this cache holds {self.rows} rows, the input has {rows}")

    def begin(self, rows: int, pads: tuple[int, ...] | None) -> None:
        """Enter a forward of `rows` rows."""
        self.rows = rows
        self.pads = pads
        self.unfit = HALF_DONE
        self._in_forward = True

    def end(self, tokens: int) -> None:
        """Leave a forward that went through all layers."""
        self.seen += tokens
        if self._is_provisional:
            self._provisional_seen += tokens
        self.unfit = ""
        self._in_forward = False

    def use_adapters(self, names: Sequence[str | None]) -> None:
        """Let each row use an adapter of its own."""
        self.adapter = names[0]
        self.row_adapters = tuple(names) if len(set(names)) > 1 else None

    def adapters(self, rows: int, tokens: int) -> list[Span]:
        """Return the adapters of a forward of `tokens` new tokens a row, row after row."""
        if self.row_adapters is None:
            return [(self.adapter, rows * tokens)]
        return [(name, tokens) for name in self.row_adapters]

    # --- hooks of policies --------------------------------------------------------------------------

    @property
    def needs_surprisal(self) -> bool:
        """Whether the policy must be told the surprisal of each token."""
        return self.policy.needs_surprisal

    def after_forward(self, tokens: Tensor, surprisal: Tensor | None) -> None:
        """Tell the policy what was read; both (batch, n), surprisal in nats."""
        self.policy.after_forward(self, tokens, surprisal)

    def end_of_prefill(self) -> None:
        """Tell the policy that reading is over for now."""
        self.policy.end_of_prefill(self)

    # --- copies and state ---------------------------------------------------------------------------

    def fork(self) -> StreamCache:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamCache:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.inference_mode(False):  # later forwards, in whatever mode, write into the copy
            twin.__dict__.update(copy.deepcopy(self.__dict__ | _NOT_COPIED, memo))
        return twin

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON-able numbers from which ``handle.restore_cache`` continues bit by bit."""
        if self.unfit:
            raise StateError(self.unfit)
        name, options = policy_options(self.policy)
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for layer, memory in self.memories.items():
            held, counts = memory.state()
            tensors.update({f"layer.{layer}.{key}": tensor for key, tensor in held.items()})
            numbers[str(layer)] = counts
        meta = {
            "policy": name,
            "options": options,
            **{name: getattr(self, name) for name in ("seen", "offset", "pads", "rows", "folded")},
            "kept_layers": {str(number): asdict(layer) for number, layer in self._kept_layers.items()},
            "layers": numbers,
            "shapes": {key: list(tensor.shape) for key, tensor in tensors.items()},
        }
        return tensors, meta

    @classmethod
    def from_state(
        cls,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        layers: dict[int, KeptLayer],
        owner: str,
        rotations: dict[int, Rotation],
        tier: Tier | None = None,
    ) -> StreamCache:
        """Rebuild a cache from :meth:`state`; `rotations` are the layers' tables at the saved length."""
        try:
            shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
            if shapes != meta["shapes"]:
                odd = sorted(
                    key for key in shapes | meta["shapes"] if shapes.get(key) != meta["shapes"].get(key)
                )
                raise StateError(f"the saved state is not complete: {odd[0]} is missing, or of another shape")
            if {int(number): KeptLayer(**saved) for number, saved in meta["kept_layers"].items()} != layers:
                raise StateError("the saved state has other layers than this model")
            policy = make_policy(meta["policy"], meta["options"])
            cache = cls(policy, layers, owner, int(meta["offset"]), tier)
            cache.seen = int(meta["seen"])
            cache.pads = None if meta["pads"] is None else tuple(meta["pads"])
            cache.rows, cache.folded = meta["rows"], int(meta["folded"])
            for layer, memory in cache.memories.items():
                prefix = f"layer.{layer}."
                own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                    memory.load(own, meta["layers"][str(layer)], rotations[layer])
        except (KeyError, TypeError, AttributeError) as error:
            raise StateError(
                f"the saved state is not complete: {error!r} is missing or of another kind"
            ) from error
        return cache

    # --- transformers' interface --------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.rows is not None:
            self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in that order."""
        rows = [] if self.rows is None else torch.arange(self.rows)[indices.cpu()].tolist()
        if rows == [*range(self.rows or 0)]:
            return
        self.recorded = self.recorded_open = None  # the buffers, or their rows, become others
        with torch.inference_mode(False):  # later forwards, in whatever mode, write into them
            for memory in self.memories.values():
                memory.pick_rows(torch.tensor(rows, dtype=torch.long))
        self.pads = None if self.pads is None else tuple(self.pads[row] for row in rows)
        if self.row_adapters is not None:
            self.use_adapters([self.row_adapters[row] for row in rows])
        self.rows = len(rows)

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first forward."""
        return -1 if self.rows is None else self.rows

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.rows is not None

    def reset(self) -> None:
        """Forget everything and begin again."""
        fresh = type(self)(self.policy, self._kept_layers, self.owner, self.offset, self.tier)
        fresh.adapter, fresh.row_adapters = self.adapter, self.row_adapters
        self.__dict__.update(fresh.__dict__)

    def __len__(self) -> int:
        return len(self.memories)

    def __repr__(self) -> str:
        return f"StreamCache({self.policy!r}, seen={self.seen}, kept={self.kept}, forgotten={self.forgotten})"


def _summed(tiers: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in tiers:
        total.update(each)
    return dict(total)
