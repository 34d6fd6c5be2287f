"""Questions about texts longer than a window: what is written after one, by each way to read it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from everlong.attention import POLICIES, FullAttention, Policy, Tier, make_policy
from everlong.errors import ConfigurationError, EverlongError
from everlong.evaluation.comparison import STOCK, make_methods
from everlong.evaluation.perplexity import read_on, write_on
from everlong.evaluation.speed import step_seconds, wait_for
from everlong.evaluation.streams import open_stream
from everlong.evaluation.tasks import Sample
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
    tier : Tier or None
        Where what leaves a policy's window goes, where it keeps that; None: RAM, in half precision.
    """

    name: str
    policy: Policy | None = None
    cut: Cut | None = None
    window: int | None = None
    tier: Tier | None = None

    def __post_init__(self) -> None:
        if self.cut is not None and (self.window is None or self.window < 1):
            raise ConfigurationError(f"{self.name}: a text is cut to a window; name one of at least 1 token")

    @property
    def is_query_aware(self) -> bool:
        """Whether what it keeps of a text depends on the question, which sessions do not know before."""
        return self.policy is not None and self.policy.is_query_aware

    def kept(self, sample: Sample) -> Tensor:
        """Return the tokens of its text that are read."""
        context = sample.context
        if self.cut is None or self.window is None or len(sample) <= self.window:
            return context
        room = self.window - len(sample.question)
        if room < 2:
            raise ConfigurationError(
                f"{self.name}: a window of {self.window} tokens does not hold the question, of "
                f"{len(sample.question)}, and a text; use a larger one"
            )
        first = room // 2 if self.cut == "first-and-last" else sample.start
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
        Tokens lost for good once all was read, those that were cut away among them.
    bytes : dict of str to int
        Held then, by tier.
    seconds : float
        To read, and to choose what to keep.
    decode_ms : float
        Milliseconds to write a token, the mean: what a method does every few tokens counts. The first is left
        out where there are others. In rows kept before 2026-11-29, the median of all.
    """

    text: str
    read: int
    seen: int
    forgotten: int
    bytes: dict[str, int]
    seconds: float
    decode_ms: float


def with_baselines(names: Sequence[str]) -> list[str]:
    """Return the names of ways, before them those of stock and of all cuts, which methods compare with."""
    baselines = [STOCK, *CUTS]
    return [*baselines, *(name for name in names if name not in baselines)]


def make_ways(
    names: Sequence[str], options: dict[str, Any] | None = None, *, tier: Tier | None = None
) -> list[Way]:
    """Make ways from names: ``"stock"``, a registered policy's, or one of :data:`CUTS`.

    Parameters
    ----------
    names : sequence of str
        Each once.
    options : dict, optional
        Each is given to all policies that have it; a window to the cuts, too, which need one, and as their
        budget to policies that have that instead.
    tier : Tier, optional
        Of all policies that keep what leaves their window.

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
    budgeted = [name for name in policies if name in POLICIES and _goes_by_budget(POLICIES[name])]
    window = _count(options.get("window")) if is_cut or budgeted else None
    budget = None if {"budget", "ratio"} & set(options) else window
    kinds = [POLICIES[name] for name in policies if name in POLICIES]
    if (is_cut or budgeted) and not any(_has(kind, "window") for kind in kinds):
        options = {name: value for name, value in options.items() if name != "window"}
    made = {method.name: method.policy for method in make_methods(policies or [STOCK], options)}
    if budget is not None:
        made |= {name: replace(made[name], budget=budget) for name in budgeted}  # type: ignore[type-var]
    if len(set(names)) != len(names) or not names:
        raise ConfigurationError(f"name each way to read once, and at least one: {', '.join(names)}")
    return [
        Way(name, made[name], tier=None if made[name] is None else tier)
        if cut is None
        else Way(name, None, cut, window)
        for name, cut in ((name, next((cut for cut in CUTS if cut == name), None)) for name in names)
    ]


def usable_methods(loaded: LoadedModel, options: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the names of all registered policies that can run, and why the others cannot.

    Full attention is left out, which sees what stock sees.

    Parameters
    ----------
    loaded : LoadedModel
        The model that they are to run with.
    options : dict
        Each is given to all policies that have it, as of :func:`make_ways`.
    """
    usable, refused = [], {}
    for name in (name for name in POLICIES if POLICIES[name] is not FullAttention):
        known = {field.name for field in fields(POLICIES[name])}
        own = {key: value for key, value in options.items() if key.replace("-", "_") in known}
        try:
            with open_stream(loaded.model, make_policy(name, own)):
                usable.append(name)
        except EverlongError as error:
            refused[name] = str(error)
    return usable, refused


def check_ways(loaded: LoadedModel, ways: Sequence[Way]) -> None:
    """Refuse ways that cannot run with a model, before any of them reads.

    Raises
    ------
    ConfigurationError
        One cannot; the message says why.
    """
    for way in ways:
        try:
            with open_stream(loaded.model, way.policy, tier=way.tier):
                pass
        except EverlongError as error:
            raise ConfigurationError(f"{way.name} cannot run here: {error}") from error


def keeps_below(loaded: LoadedModel, way: Way) -> bool:
    """Whether what leaves the window goes to a tier, by that way to read."""
    if way.policy is None:
        return False
    with open_stream(loaded.model, way.policy) as stream:
        return any(memory.tier is not None for memory in stream.cache.memories.values())


def whole_readers(ways: Sequence[Way], measure: str) -> list[Way]:
    """Return the ways that read a text whole.

    Raises
    ------
    ConfigurationError
        There is none.
    """
    some = [way for way in ways if way.cut is None]
    if not some:
        names = ", ".join(way.name for way in ways) or "none"
        raise ConfigurationError(
            f"{measure} is measured of methods that read a text whole, and there is none among: {names}; "
            "name one with --methods, such as stock"
        )
    return some


def seen_at_most(read: int, options: dict[str, Any]) -> int:
    """Return how many keys a token sees at most, once so many were read."""
    return min(read, options.get("window") or read)


def _has(kind: type[Policy], option: str) -> bool:
    return option in {field.name for field in fields(kind)}


def _goes_by_budget(kind: type[Policy]) -> bool:
    return _has(kind, "budget") and not _has(kind, "window")


def _count(value: Any) -> int | None:
    """Return a window, of which the command line tells the digits."""
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ConfigurationError(f"window={value!r} must be a whole number of tokens") from None


@torch.inference_mode()
def answer(
    loaded: LoadedModel, way: Way, sample: Sample, *, chunk: int = 512, max_new_tokens: int | None = None
) -> Answer:
    """Let a model read a text, then a question, and go on from there, the likeliest token each time.

    As in a session, the question is read by itself, once the text was: no method knows it before.

    Parameters
    ----------
    loaded : LoadedModel
        The model, detached, with its tokenizer.
    way : Way
        How it reads.
    sample : Sample
        What it reads.
    chunk : int
        Tokens of one forward.
    max_new_tokens : int, optional
        To write; by default enough for the answer and a little more.
    """
    tokenizer, head = loaded.tokenizer, Head(loaded.model)
    limit = max_new_tokens or sample.tokens_to_write(tokenizer)
    context, question = way.kept(sample).to(head.weight.device), sample.question.to(head.weight.device)
    with open_stream(loaded.model, way.policy, tier=way.tier) as stream:
        begun = time.perf_counter()
        hidden = None
        for piece in (*torch.split(context, chunk), question):
            hidden = read_on(stream, head, piece, hidden)
        stream.end_reading()  # what a method spends on choosing what to keep is a part of reading
        assert hidden is not None
        wait_for(hidden)
        seconds = time.perf_counter() - begun
        forgotten, held = stream.forgotten, stream.bytes()
        written: list[int] = []
        times: list[float] = []
        for _ in range(limit):
            begun = time.perf_counter()
            logits = head.logits(hidden)
            written.append(int(logits[0].argmax()))
            hidden = write_on(stream, context.new_tensor(written[-1:]), logits)
            wait_for(hidden)
            times.append(time.perf_counter() - begun)
        span = None if way.policy is None else stream.described()[1].get("window")
        read = len(context) + len(question)
        end = next((at for at, token in enumerate(written) if token in end_tokens(loaded)), len(written))
        return Answer(
            str(tokenizer.decode(written[:end], skip_special_tokens=True)),
            read,
            read if span is None else min(read, span),
            forgotten + len(sample.context) - len(context),
            held,
            seconds,
            1000 * step_seconds(times[1:] or times),
        )


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text or a turn: what is written behind one is no part of an answer."""
    configured = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    ends = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return frozenset(token for token in (*ends, loaded.tokenizer.eos_token_id) if token is not None)
