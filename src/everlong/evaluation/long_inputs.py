"""Questions about texts longer than a window: what is written after one, by each way to read it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from everlong.attention import POLICIES, Policy
from everlong.errors import ConfigurationError
from everlong.evaluation.comparison import STOCK, make_methods
from everlong.evaluation.needles import Needle
from everlong.evaluation.perplexity import read_on
from everlong.evaluation.streams import open_stream
from everlong.models.head import Head
from everlong.models.loading import LoadedModel

Cut = Literal["last", "first-and-last"]

CUTS: tuple[Cut, ...] = ("last", "first-and-last")
"""Ways to make a text as short as a window, which the model then reads as it is: its last tokens, behind a
start token; its first and its last, half of each."""


@dataclass(frozen=True)
class Way:
    """One way to read what is longer than a window.

    Attributes
    ----------
    name : str
        What tables call it.
    policy : Policy or None
        None: the detached model.
    cut : Cut or None
        How the text is made as short as `window` first; None: it is read whole.
    window : int or None
        Tokens of text and question together that are left of it then.
    """

    name: str
    policy: Policy | None = None
    cut: Cut | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.cut is not None and (self.window is None or self.window < 1):
            raise ConfigurationError(f"{self.name}: a text is cut to a window; name one of at least 1 token")

    def kept(self, needle: Needle) -> Tensor:
        """Return the tokens of its text that are read."""
        context = needle.context
        if self.cut is None or self.window is None or len(needle) <= self.window:
            return context
        room = self.window - len(needle.question)
        if room < 2:
            raise ConfigurationError(
                f"{self.name}: a window of {self.window} tokens does not hold the question, of "
                f"{len(needle.question)}, and a text; use a larger one"
            )
        first = room // 2 if self.cut == "first-and-last" else needle.start
        return torch.cat((context[:first], context[len(context) - (room - first) :]))


@dataclass(frozen=True)
class Answer:
    """What was written after a text and a question, and what that took.

    Attributes
    ----------
    text : str
        What was written.
    read : int
        Tokens read, of text and question.
    seen : int
        Keys that a token sees at most, of a policy with a window; otherwise as many as were read.
    forgotten : int
        Tokens lost for good, those that were cut away among them.
    bytes : dict of str to int
        Held at the end, by tier.
    seconds : float
        To read.
    decode_ms : float
        Median milliseconds to write a token.
    """

    text: str
    read: int
    seen: int
    forgotten: int
    bytes: dict[str, int]
    seconds: float
    decode_ms: float


def make_ways(names: Sequence[str], options: dict[str, Any] | None = None) -> list[Way]:
    """Make ways from names: ``"stock"``, a registered policy's, or one of :data:`CUTS`.

    Parameters
    ----------
    names : sequence of str
        Each once.
    options : dict, optional
        Each is given to all policies that have it; a window to the cuts, too, which need one.

    Raises
    ------
    UnknownNameError
        An unknown way, or an option that none of them has.
    ConfigurationError
        No way, or one named twice; a cut without a window.
    """
    options = options or {}
    policies = [name for name in names if name not in CUTS]
    is_cut = len(policies) < len(names)
    window = _count(options.get("window")) if is_cut else None
    kinds = [POLICIES[name] for name in policies if name in POLICIES]
    if is_cut and not any("window" in {field.name for field in fields(kind)} for kind in kinds):
        options = {name: value for name, value in options.items() if name != "window"}
    made = {method.name: method.policy for method in make_methods(policies or [STOCK], options)}
    if len(set(names)) != len(names) or not names:
        raise ConfigurationError(f"name each way to read once, and at least one: {', '.join(names)}")
    return [
        Way(name, made[name]) if cut is None else Way(name, None, cut, window)
        for name, cut in ((name, next((cut for cut in CUTS if cut == name), None)) for name in names)
    ]


def _count(value: Any) -> int | None:
    """Return a window, of which the command line tells the digits."""
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ConfigurationError(f"window={value!r} must be a whole number of tokens") from None


@torch.inference_mode()
def answer(
    loaded: LoadedModel, way: Way, needle: Needle, *, chunk: int = 512, max_new_tokens: int | None = None
) -> Answer:
    """Let a model read a text, then a question, and go on from there, the likeliest token each time.

    As in a session, the question is read by itself, once the text was: no method knows it before.

    Parameters
    ----------
    loaded : LoadedModel
        The model, detached, with its tokenizer.
    way : Way
        How it reads.
    needle : Needle
        What it reads.
    chunk : int
        Tokens of one forward.
    max_new_tokens : int, optional
        To write; by default enough for the answer and a little more.
    """
    tokenizer, head = loaded.tokenizer, Head(loaded.model)
    limit = max_new_tokens or len(tokenizer.encode(needle.answer, add_special_tokens=False)) + 4
    context = way.kept(needle)
    with open_stream(loaded.model, way.policy) as stream:
        begun = time.perf_counter()
        hidden = None
        for piece in (*torch.split(context, chunk), needle.question):
            hidden = read_on(stream, head, piece, hidden)
        assert hidden is not None
        seconds = time.perf_counter() - begun
        stream.end_reading()
        written: list[int] = []
        times: list[float] = []
        for _ in range(limit):
            begun = time.perf_counter()
            written.append(int(head.logits(hidden)[0].argmax()))
            hidden = read_on(stream, head, torch.tensor(written[-1:]), hidden)
            times.append(time.perf_counter() - begun)
        span = None if way.policy is None else stream.described()[1].get("window")
        read = len(context) + len(needle.question)
        return Answer(
            str(tokenizer.decode(written, skip_special_tokens=True)),
            read,
            read if span is None else min(read, span),
            stream.forgotten + len(needle.context) - len(context),
            stream.bytes(),
            seconds,
            1000 * median(times),
        )
