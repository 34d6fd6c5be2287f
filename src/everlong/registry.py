"""A named collection of classes or functions: unknown names answer with near matches."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

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
        self._elsewhere: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate an entry to register it under `name`."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ConfigurationError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = entry
            return entry

        return add

    def refer(self, name: str, remedy: str) -> None:
        """Say what to do with a name that is of another kind, for those who look for it here."""
        self._elsewhere[name] = remedy

    def __getitem__(self, name: str) -> T:
        if name in self._elsewhere and name not in self._entries:
            raise UnknownNameError(f"{name!r} is no {self.kind}: {self._elsewhere[name]}")
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


def make(kinds: Registry[type[T]], name: str, options: dict[str, Any] | None = None) -> T:
    """Make a registered dataclass from its name and options.

    Parameters
    ----------
    kinds : Registry
        Of dataclasses.
    name : str
        Which.
    options : dict, optional
        Values of its fields; strings are read as ``none``, an integer, a number, or a word.

    Raises
    ------
    UnknownNameError
        No such entry, or no such option; near matches are listed.
    ConfigurationError
        A value that cannot work.
    """
    kind: Any = kinds[name]
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for key, value in (options or {}).items():
        field = key.replace("-", "_")
        if field not in known:
            raise unknown_name(f"option of {name}", key, known)
        values[field] = _parse(value) if isinstance(value, str) else value
    made: T = kind(**values)
    return made


def _parse(text: str) -> int | float | str | bool | None:
    lowered = text.strip().lower()
    if lowered in ("none", "null"):
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(lowered)
        except ValueError:
            continue
    return text.strip()
