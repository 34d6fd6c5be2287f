"""What a dataclass says in its docstring of itself and of its fields: its title, its text and its options."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

_SECTION = re.compile(r"^(Parameters|Attributes)\n-+\n", re.MULTILINE)
_OTHER_SECTION = re.compile(r"^\w+\n-+\n", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")


@dataclass(frozen=True)
class Option:
    """A field that can be set.

    Attributes
    ----------
    name, text : str
        What it is called, and what it is.
    default : object
        A plain value, or one whose text is shown.
    """

    name: str
    text: str
    default: Any

    @property
    def shown_default(self) -> str:
        """The default as one writes it after ``--set``."""
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        is_word = self.default is None or isinstance(self.default, bool)
        return str(self.default).lower() if is_word else str(self.default)


@dataclass(frozen=True)
class Description:
    """What is known of a dataclass.

    Attributes
    ----------
    name : str
        What it is registered as; the class's own name where that is not said.
    title : str
        The docstring's first line.
    text : tuple of str
        Its other paragraphs.
    options : tuple of Option
        Its fields.
    """

    name: str
    title: str
    text: tuple[str, ...]
    options: tuple[Option, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        options = [
            {"name": option.name, "default": option.shown_default, "text": option.text}
            for option in self.options
        ]
        return {"name": self.name, "title": self.title, "text": list(self.text), "options": options}


def described(entry: Any) -> Description:
    """Describe a dataclass, or an instance of one, whose values are the defaults then.

    What its docstring does not say of a field, those of the classes that it extends may.
    """
    kind: type = entry if isinstance(entry, type) else type(entry)
    paragraphs = re.split(r"\n\s*\n", _OTHER_SECTION.split(_docstring(kind))[0].strip())
    title, *text = map(_joined, paragraphs)
    said: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        said |= _fields_said(_docstring(each))
    options = tuple(
        Option(field.name, said.get(field.name, ""), _default(entry, field))
        for field in dataclasses.fields(entry)
        if field.init
    )
    return Description(kind.__name__, title, tuple(text), options)


def _docstring(kind: type) -> str:
    said = kind.__doc__ or ""
    is_made = said.startswith(f"{kind.__name__}(")  # by dataclass(), where there is none
    return "Nothing is said of it." if is_made or not said else inspect.cleandoc(said)


def _default(entry: Any, field: dataclasses.Field[Any]) -> Any:
    if not isinstance(entry, type):
        return getattr(entry, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "" if field.default is dataclasses.MISSING else field.default


def _fields_said(docstring: str) -> dict[str, str]:
    """Return what a docstring says of each parameter or attribute."""
    found: dict[str, str] = {}
    for section in _SECTION.split(docstring)[2::2]:
        entries = re.split(r"^(\w[\w, ]*) : .*\n", _OTHER_SECTION.split(section)[0], flags=re.MULTILINE)
        for names, said in zip(entries[1::2], entries[2::2], strict=True):
            found |= dict.fromkeys(names.split(", "), _joined(said))
    return found


def _joined(lines: str) -> str:
    """Return lines as one, without what marks code and references."""
    return _ROLE.sub(r"\1", " ".join(lines.split())).replace("``", "").replace("`", "")
