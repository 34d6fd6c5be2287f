"""The base of every attention policy, and the registry of their names."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part, Partial
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError, UnsupportedUseError
from everlong.models.files import parse_bytes
from everlong.models.rotary import Rotary
from everlong.registry import Registry, make

if TYPE_CHECKING:
    from everlong.attention.cache import StreamCache


class Bytes(int):
    """A number of bytes, where a policy takes a number of tokens: ``Recall(window=Bytes("200MB"))``.

    Of a ``window``: as many tokens as let a stream hold no more at hand, in all layers, once that is full;
    tiers below, and room to grow, come on top. Of a ``budget``: as many as take no more once they were
    chosen. Settled for each model when it is attached.

    Parameters
    ----------
    size : int or str
        Such as ``200_000_000`` or ``"200MB"``.

    Raises
    ------
    ConfigurationError
        It is no number of bytes.
    """

    def __new__(cls, size: int | str) -> Self:
        """Read a size."""
        return super().__new__(cls, parse_bytes(size) if isinstance(size, str) else size)

    def __repr__(self) -> str:
        return f"Bytes({int(self)})"


@dataclass(frozen=True)
class Policy(ABC):
    """What a model's full-attention layers keep, see, and forget. Subclass as a frozen dataclass.

    A policy of one's own needs :meth:`memory` and :meth:`parts`; its fields are its options. A field
    called ``window`` that is None is filled in with the model's training length, and one called
    ``sinks`` can be raised by ``Session.pin``.
    """

    forgets: ClassVar[bool] = True
    """Whether tokens that leave the window are lost to the model."""
    needs_surprisal: ClassVar[bool] = False
    """Whether :meth:`after_forward` must be told each token's surprisal; then only sessions can use it."""
    is_query_aware: ClassVar[bool] = False
    """Whether what it keeps of a text depends on the question that follows."""

    looks_ahead: ClassVar[bool] = False
    """Whether a query gains from later ones of its group: while reading, it predicts a little too well."""

    needs_end_of_prefill: ClassVar[bool] = False
    """Whether it forgets in :meth:`end_of_prefill`; then only sessions, and who calls that, can use it."""

    takes_branches: ClassVar[bool] = False
    """Whether :meth:`parts` shows tokens by :meth:`LayerView.band` and its kin, which know branches."""

    def resolve(self, training_length: int | None) -> Self:
        """Return this policy with the defaults that depend on the model filled in.

        Parameters
        ----------
        training_length : int or None
            Tokens the model was trained on; None where the model does not say.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        for name in fields:
            if isinstance(getattr(self, name), Bytes):
                raise ConfigurationError(
                    f"{type(self).__name__}: {name} is in bytes; that is for a window or a budget, and for "
                    "attach() and load() to settle: give tokens here"
                )
        if "window" in fields and getattr(self, "window") is None:  # noqa: B009
            if training_length is None:
                raise ConfigurationError(
                    f"the model does not name its training length: pass {type(self).__name__}(window=...)"
                )
            return dataclasses.replace(self, **{"window": training_length})
        return self

    @property
    def span(self) -> int | None:
        """Keys a query sees at most; None: no limit."""
        return getattr(self, "window", None)

    def rotary(self, rotary: Rotary) -> Rotary:
        """Return the table by which the policy's layers rotate: by default the model's own, which is given.

        Raises
        ------
        UnsupportedUseError
            The policy cannot make one of it.
        """
        return rotary

    @abstractmethod
    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory for layer `layer`, its first token at stream position `start`."""

    @abstractmethod
    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Return what a group of queries sees, each key in one part only."""

    def nbytes_beside(self, layer: int, tokens: int, memory: LayerMemory) -> dict[str, int]:
        """Return about what a layer holds beside window and tier when `tokens` were seen: bytes, by tier.

        Parameters
        ----------
        layer : int
            The layer's number.
        tokens : int
            For each row.
        memory : LayerMemory
            The layer's, once some were.
        """
        return {}

    def pinned(self, sinks: int) -> Self:
        """Return a policy like this one, which has ``sinks``, with that many; see :func:`with_sinks`."""
        return dataclasses.replace(self, **{"sinks": sinks})

    def guessed_until(self) -> int | None:
        """Index before which tokens may be run together that may be taken back; None: all may.

        Queries that look something up together find other things than one by one.
        """
        return None if self.lookup_group() is None else self.plain_until()

    def breaks(self) -> tuple[int, ...]:
        """Return indices where a group of queries should end, because :meth:`parts` changes its form."""
        return ()

    def plain_until(self) -> int | None:
        """Index before which queries see all there is, at true distances; None: all of them do.

        These are attended in one group, however many there are.
        """
        return 0

    def lookup_group(self) -> int | None:
        """Return how many queries look things up together at most; None: nothing is looked up.

        Groups end at multiples of it, so that it is the same in which pieces a text is read, if these do too.
        """
        return None

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Take note of a group of queries that has attended, in ``view.memory.index``.

        Called for each group of a layer, in order. A policy that does is not shown tokens that may be taken
        back.
        """
        return None

    def in_place(self, row_index: int, index: int) -> Sequence[int] | None:
        """Say whether one query sees the slots of its memory just as they lie; for the shortest way.

        Parameters
        ----------
        row_index : int
            The query's index in the shortest row.
        index : int
            In the longest.

        Returns
        -------
        sequence of int or None
            The distances at which the sinks are to stand first; none, where they stand right. None: what it
            sees is a matter of :meth:`parts`, as it always is where a subclass defines that anew.
        """
        return None

    def standing(
        self, memory: LayerMemory, layer: int, pads: tuple[int, ...] | None
    ) -> tuple[int, int] | None:
        """Say whether the next token of each row sees what the one before it saw recalled.

        Parameters
        ----------
        memory : LayerMemory
            Before that token.
        layer : int
            Whose it is.
        pads : tuple of int or None
            The rows' padding.

        Returns
        -------
        tuple of int and int, or None
            L and a distance: it sees its latest L tokens, and so far before itself the sinks and what was
            recalled, and no note is to be taken of it. None: what it sees is a matter of :meth:`parts`, as
            for :meth:`in_place`.
        """
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take back what a base says of its :meth:`parts`, where these are defined anew further down."""
        super().__init_subclass__(**kwargs)

        def defined(name: str) -> int:
            return next(place for place, base in enumerate(cls.__mro__) if name in base.__dict__)

        for name in ("in_place", "standing", "takes_branches"):
            if defined("parts") < defined(name):
                setattr(cls, name, getattr(Policy, name))

    def after_forward(self, cache: StreamCache, tokens: Tensor, surprisal: Tensor | None) -> None:
        """Act after each forward of a session; `tokens` and `surprisal` (nats) have shape (batch, n)."""
        return None

    def end_of_prefill(self, cache: StreamCache) -> None:
        """Act when a session has read its input and begins to write."""
        return None


_IN_BYTES = re.compile(r"\s*[\d.]+\s*([kmgt]b|bytes)\s*", re.IGNORECASE)

POLICIES: Registry[type[Policy]] = Registry("attention policy")


def make_policy(name: str, options: dict[str, Any] | None = None) -> Policy:
    """Make a registered policy from its name and options.

    Parameters
    ----------
    name : str
        For example ``"lm-infinite"``.
    options : dict, optional
        Values of the policy's fields; strings are read as ``none``, an integer, a number, a number of bytes
        (``200MB``), or a word.

    Raises
    ------
    UnknownNameError
        No such policy, or no such option; near matches are listed.
    ConfigurationError
        A value that cannot work.
    """
    given = {
        key: Bytes(value) if isinstance(value, str) and _IN_BYTES.fullmatch(value) else value
        for key, value in (options or {}).items()
    }
    return make(POLICIES, name, given)


def policy_options(policy: Policy) -> tuple[str, dict[str, Any]]:
    """Return a policy's registered name and its options, the inverse of :func:`make_policy`."""
    return POLICIES.name_of(type(policy)), dataclasses.asdict(policy)


def with_sinks(policy: Policy, pinned: int) -> Policy:
    """Return a policy like this one that keeps at least the first `pinned` tokens.

    Raises
    ------
    UnsupportedUseError
        It keeps no sinks.
    ConfigurationError
        That many leave no room in its window.
    """
    if policy.span is None and not policy.forgets:
        return policy
    name = type(policy).__name__
    if "sinks" not in {field.name for field in dataclasses.fields(policy)}:
        raise UnsupportedUseError(
            f"{name} keeps no first tokens, so nothing can be pinned; use LMInfinite or StreamingLLM"
        )
    if policy.span is not None and pinned >= policy.span:
        raise ConfigurationError(
            f"the pinned text has {pinned} tokens (turn markers included) and the window only {policy.span}: "
            f"pin less, or use {name}(window=...) well above {pinned}"
        )
    sinks: int = getattr(policy, "sinks")  # noqa: B009
    return policy.pinned(max(sinks, pinned)).resolve(None)


MOST = 2**40
"""Of whatever policies count: more would not fit into the positions of a model."""


def require_count(owner: str, name: str, value: object, *, least: int, optional: bool = False) -> None:
    """Raise unless `value` is a whole number of at least `least` (or None where optional)."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{owner}: {name} must be a whole number of at least {least}, not {value!r}")
    if value > MOST:
        raise ConfigurationError(f"{owner}: {name} can be {MOST:,} at most, not {value:,}")


def require_share(owner: str, name: str, value: object) -> None:
    """Raise unless `value` is a number above 0 and at most 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ConfigurationError(f"{owner}: {name} must be a number above 0 and at most 1, not {value!r}")
