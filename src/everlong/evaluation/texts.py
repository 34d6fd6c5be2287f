"""Texts to measure on: the first tokens of a source, and one that every machine has."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong.errors import ConfigurationError, InputError
from everlong.reading.prompts import pinned_text
from everlong.reading.source import Source, TextPieces, open_source
from everlong.reading.tokens import TextCoder, TokenStream

LIBRARY = "library"
"""What Python's own sources are called, where a file is named."""

LIBRARY_FILES = ("argparse.py", "inspect.py", "typing.py", "statistics.py")
"""Sources of the Python standard library that the demo reads, in this order: much of them is prose."""


@dataclass(frozen=True, eq=False)
class Excerpt:
    """The beginning of a text, as tokens.

    Attributes
    ----------
    name : str
        What it is, for people.
    ids : Tensor
        Shape (n,), with the model's start token where its tokenizer puts one.
    is_whole : bool
        Whether the text ends there.
    pinned : Tensor
        The system text that comes before, shape (m,), and with it the start token; empty if there is none.
    """

    name: str
    ids: Tensor
    is_whole: bool
    pinned: Tensor


def first_tokens(
    tokenizer: Any, source: Source, limit: int | None, *, name: str | None = None, system: str | None = None
) -> Excerpt:
    """Return the first tokens of a source, which is read no further than that.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    source : str, Path, open file, iterable of str
        What :meth:`everlong.Session.read` takes.
    limit : int or None
        Tokens of `ids` at most; None: all.
    name : str, optional
        What it is called; by default the file's name.
    system : str, optional
        A text to pin before it. It is raw, as the text is: there is no chat template around them.

    Raises
    ------
    InputError
        The source is empty, binary, or cannot be opened; or the system text is empty.
    """
    coder = TextCoder(tokenizer)
    stream = TokenStream(coder)
    ids, pinned = list(coder.bos), torch.empty(0, dtype=torch.long)
    if system is not None:
        pinned = torch.tensor([*ids, *stream.feed(pinned_text(system)), *stream.finish()])
        ids = []
    pieces = open_source(source, len(tokenizer))
    name = name or Path(pieces.name).name
    if not isinstance(pieces, TextPieces):
        raise InputError(f"{name}: texts are compared, not ids; pass a text or a file")
    try:
        for piece in pieces:
            ids += stream.feed(piece)
            if limit is not None and len(ids) > limit:
                return Excerpt(name, torch.tensor(ids[:limit]), False, pinned)
    finally:
        pieces.close()
    ids += stream.finish()
    is_whole = limit is None or len(ids) <= limit
    return Excerpt(name, torch.tensor(ids[:limit]), is_whole, pinned)


def standard_library(
    tokenizer: Any, limit: int, files: Sequence[str] = LIBRARY_FILES, *, system: str | None = None
) -> Excerpt:
    """Return the first tokens of Python's own sources, as found on this machine.

    The other parameters are those of :func:`first_tokens`.

    Raises
    ------
    InputError
        They are not there, as in some minimal installations.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    used: list[str] = []

    def pieces() -> Iterator[str]:
        for file in files:
            try:
                text = (folder / file).read_text(encoding="utf-8")
            except OSError as error:
                raise InputError(
                    f"{folder / file}, a source of Python itself, cannot be read ({error.strerror}); "
                    "give a text of your own: everlong compare FILE"
                ) from error
            used.append(file)
            yield text

    excerpt = first_tokens(tokenizer, pieces(), limit, system=system)
    return dataclasses.replace(excerpt, name=f"Python's own {_listed(used)}")


def haystack(tokenizer: Any, text: str, length: int) -> Excerpt:
    """Return the first tokens of a file, or of Python's own sources: as many of these as that takes.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    text : str
        The path of a file that can be read more than once, or :data:`LIBRARY`.
    length : int
        Tokens at most.

    Raises
    ------
    ConfigurationError
        It is no file.
    InputError
        The file is empty, binary, or cannot be opened.
    """
    if text != LIBRARY:
        return first_tokens(tokenizer, regular_file(text), length)
    others = sorted(path.name for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [*LIBRARY_FILES, *(name for name in others if name not in LIBRARY_FILES)]
    return dataclasses.replace(standard_library(tokenizer, length, files), name="Python's own sources")


def enough_text(tokenizer: Any, text: str, tokens: int) -> Excerpt:
    """Return the first `tokens` tokens of a file, or of Python's own sources.

    Raises
    ------
    InputError
        There are fewer, or the file cannot be read.
    """
    excerpt = haystack(tokenizer, text, tokens)
    if len(excerpt.ids) < tokens:
        raise InputError(
            f"{excerpt.name} has {len(excerpt.ids):,} tokens, fewer than the {tokens:,} that are to be read: "
            "name a longer --text, or shorter --lengths"
        )
    return excerpt


def text_key(excerpt: Excerpt, tokens: int) -> str:
    """Return what tells the first tokens of a text from all others."""
    return f"{excerpt.name} [{digest(str(excerpt.ids[:tokens].tolist()))}]"


def digest(text: str) -> str:
    """Return a few letters that tell a text from all others."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return numbers of tokens, at least one, each at least 1 and given once.

    Raises
    ------
    ConfigurationError
        They are not.
    """
    if not lengths or min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise ConfigurationError(f"lengths must be whole numbers from 1 on, each once, not {tuple(lengths)}")
    return tuple(lengths)


def check_text(text: str) -> None:
    """Refuse what is neither :data:`LIBRARY` nor a file that can be opened, before a model is loaded.

    Raises
    ------
    ConfigurationError
        It is no file.
    InputError
        It is not there, empty, or cannot be opened.
    """
    if text != LIBRARY:
        open_source(regular_file(text), 0).close()


def regular_file(text: str) -> Path:
    """Return the path of a file that can be read more than once.

    Raises
    ------
    ConfigurationError
        It is something else.
    """
    path = Path(text)
    if not text or (path.exists() and not path.is_file()):
        raise ConfigurationError(f"the text is read again for each method: name a file, not {text!r}")
    return path


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
