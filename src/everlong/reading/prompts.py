"""What stands between texts in a conversation, taken from the model's own chat template."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from everlong.errors import InputError

_SYSTEM, _FIRST, _ANSWER, _SECOND = (
    f"everlong{name}marker" for name in ("system", "first", "answer", "second")
)
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Form:
    """How a conversation with a model is laid out. Markup may spell special tokens; texts never do.

    Attributes
    ----------
    is_chat : bool
        Whether it comes from a chat template.
    before_system, after_system : str
        Markup around the system text; all of the opening is in the first if there is none.
    to_assistant : str
        Markup from the end of the user's text to the beginning of the assistant's.
    to_user : str
        Markup from the end of the assistant's text to the beginning of the user's next.
    stop : tuple of str
        Where an answer ends, besides the end of the text.
    """

    is_chat: bool
    before_system: str = ""
    after_system: str = ""
    to_assistant: str = ""
    to_user: str = ""
    stop: tuple[str, ...] = ()

    def question(self, question: str, *, after_text: bool) -> str:
        """Lay out a question, in the user's turn, after a text or as the first thing in it."""
        blank = _BLANK_LINE if after_text else ""
        return blank + (question if self.is_chat else f"Question: {question}\nAnswer:")


def pinned_text(text: str) -> str:
    """Return a text to pin as it is read: a blank line is added where it does not end with a line.

    Raises
    ------
    InputError
        It is empty.
    """
    if not text:
        raise InputError("the text to pin is empty")
    return text if text.endswith("\n") else text + _BLANK_LINE


def plain_form(*, with_system: bool) -> Form:
    """Return the form of models without a chat template: questions and answers in running text."""
    after_system = _BLANK_LINE if with_system else ""
    return Form(False, after_system=after_system, to_user=_BLANK_LINE, stop=("\nQuestion:", _BLANK_LINE))


def find_form(tokenizer: Any, *, with_system: bool) -> Form:
    """Take a chat template apart by rendering it around markers.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        With or without a chat template.
    with_system : bool
        Whether there is a system text. Where the template has no place for it, it begins the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return plain_form(with_system=with_system)
    try:
        return _taken_apart(tokenizer, with_system)
    except Exception as error:  # a template is a program: it may raise anything
        warnings.warn(
            f"the model's chat template could not be taken apart ({error}); "
            "texts are read and questions asked without it",
            stacklevel=2,
        )
        return plain_form(with_system=with_system)


def _taken_apart(tokenizer: Any, with_system: bool) -> Form:
    def rendered(*messages: tuple[str, str]) -> str:
        text: str = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        return text

    first, answer, second = ("user", _FIRST), ("assistant", _ANSWER), ("user", _SECOND)
    _, _, to_user, _ = _between(rendered(first, answer, second), _FIRST, _ANSWER, _SECOND)
    if with_system:
        try:
            parts = _between(rendered(("system", _SYSTEM), first), _SYSTEM, _FIRST)
            return Form(True, parts[0], parts[1], parts[2], to_user)
        except Exception:  # no place for a system text
            before, to_assistant = _between(rendered(first), _FIRST)
            return Form(True, before, _BLANK_LINE, to_assistant, to_user)
    before, to_assistant = _between(rendered(first), _FIRST)
    return Form(True, before, "", to_assistant, to_user)


def _between(text: str, *markers: str) -> list[str]:
    """Return what stands before, between and after the markers, each occurring once, in this order."""
    parts = []
    for marker in markers:
        if text.count(marker) != 1:
            raise ValueError("a message does not appear exactly once")
        part, text = text.split(marker)
        parts.append(part)
    return [*parts, text]
