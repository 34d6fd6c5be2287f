"""A named collection of classes or functions: unknown names answer with near matches."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from everlong.errors import ConfigurationError, UnknownNameError

T = TypeVar("T")


def unknown_name(kind: str, name: str, known: list[str]) -> UnknownNameError:
    """Build the error for a `name` that is not among the `known` ones of this `kind`."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(known)}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")


class Registry(Generic[T]):
    """Names to entries of one kind. A name registered twice is an error at once.

    Parameters
    ----------
    kind : str
        What the entries are called in error messages, for example ``"attention policy"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate an entry to register it under `name`."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ConfigurationError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.kind, name, sorted(self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def name_of(self, entry: object) -> str:
        """Return the name under which `entry` was registered."""
        for name, known in self._entries.items():
            if known is entry:
                return name
        raise UnknownNameError(f"{entry!r} is not a registered {self.kind}")
