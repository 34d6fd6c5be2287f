"""Recall: which probes a model answers, and the contexts that a memory is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.asking import answers
from everlong.evaluation.probes import Probe, is_answer, mentions
from everlong.evaluation.statistics import Interval, paired_share_interval, share_interval

ASKED = ("question", "reverse")
"""Forms that examples of questions and answers help; a sentence to complete needs none."""


@dataclass(frozen=True)
class Answered:
    """A probe, and what was written after its prompt.

    Attributes
    ----------
    probe : Probe
        What was asked.
    text : str
        What the model wrote, up to the end of the line.
    """

    probe: Probe
    text: str

    @property
    def is_right(self) -> bool:
        """Whether it begins with an answer."""
        return is_answer(self.text, self.probe)

    @property
    def mentions(self) -> bool:
        """Whether an answer stands anywhere in it."""
        return mentions(self.text, self.probe)


@dataclass(frozen=True)
class Recall:
    """The answers of one model to one set of probes.

    Attributes
    ----------
    answered : tuple of Answered
        In the order of the probes. Recalls of several documents can be added.
    """

    answered: tuple[Answered, ...]

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the probes, in the order they first appear."""
        return tuple(dict.fromkeys(each.probe.form for each in self.answered))

    def of(self, form: str) -> Recall:
        """Return the answers to probes of one form."""
        return Recall(tuple(each for each in self.answered if each.probe.form == form))

    @property
    def right(self) -> int:
        """How many probes were answered."""
        return sum(each.is_right for each in self.answered)

    def accuracy(self, form: str | None = None, *, lenient: bool = False) -> Interval:
        """Return the share of right answers with Wilson's 95 % interval.

        Probes count as independent. Those about one document are not quite: compare several documents.

        Parameters
        ----------
        form : str, optional
            Of this form alone.
        lenient : bool
            Whether an answer may stand anywhere in the text, rather than first.
        """
        told = self.answered if form is None else self.of(form).answered
        return share_interval(sum(each.mentions if lenient else each.is_right for each in told), len(told))

    def above(self, other: Recall, form: str | None = None) -> Interval:
        """Return by how much the accuracy is above that of `other` on the same probes, as a paired interval.

        Raises
        ------
        InputError
            The probes are not the same.
        """
        ours, theirs = (each if form is None else each.of(form) for each in (self, other))
        for a, b in zip(ours.answered, theirs.answered, strict=False):
            if a.probe != b.probe:
                raise InputError(f"not the same probes: {a.probe.prompt!r} and {b.probe.prompt!r}")
        if len(ours.answered) != len(theirs.answered):
            raise InputError(
                f"not the same probes: there are {len(ours.answered)} and {len(theirs.answered)}"
            )
        was, now = ([each.is_right for each in one.answered] for one in (theirs, ours))
        return paired_share_interval(was, now)

    def __add__(self, other: Recall) -> Recall:
        return Recall((*self.answered, *other.answered))

    def as_json(self) -> dict[str, Any]:
        """Return numbers by form, as JSON holds them."""
        return {
            form: {"right": self.of(form).right, "of": found.samples, "low": found.low, "high": found.high}
            for form in self.forms
            for found in (self.accuracy(form),)
        }


def recall(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe],
    *,
    context: str | Sequence[str] = "",
    examples: str = "",
    max_new_tokens: int = 12,
    batch: int = 32,
    in_turns: bool = False,
) -> Recall:
    """Ask a model every probe and score the answers.

    Parameters
    ----------
    model, tokenizer
        As in :func:`~everlong.evaluation.asking.answers`.
    probes : sequence of Probe
        Of any forms.
    context : str or sequence of str
        What the model reads before: nothing (closed-book), a text, or one for each probe.
    examples : str
        Questions and answers that show what is wanted. They stand before the context, and only before
        probes of the forms in `ASKED`.
    max_new_tokens, batch : int
        Tokens of an answer at most; probes at a time.
    in_turns : bool
        Whether probes of the forms in `ASKED` are asked as sessions ask, in the turns of a chat template
        where the model has one; else in running text.
    """
    contexts = [context] * len(probes) if isinstance(context, str) else list(context)
    if len(contexts) != len(probes):
        raise InputError(f"{len(contexts)} contexts for {len(probes)} probes; pass one, or one for each")
    texts = [""] * len(probes)
    for is_asked in (False, True):
        chosen = [i for i, probe in enumerate(probes) if (probe.form in ASKED) == is_asked]
        before = f"{examples.rstrip()}\n\n" if is_asked and examples.strip() else ""
        found = answers(
            model,
            tokenizer,
            [_bare(probes[i].prompt) if in_turns and is_asked else probes[i].prompt for i in chosen],
            context=[before + contexts[i] for i in chosen],
            max_new_tokens=max_new_tokens,
            batch=batch,
            in_turns=in_turns and is_asked,
        )
        for i, text in zip(chosen, found, strict=True):
            texts[i] = text
    return Recall(tuple(Answered(probe, text) for probe, text in zip(probes, texts, strict=True)))


def _bare(prompt: str) -> str:
    """Return a question without what stands around it in running text."""
    return prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


class Index(Protocol):
    """What finds pieces of a text for a query, such as BM25."""

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """Return the numbers of the `k` best pieces with their scores, the best first."""


def context_tail(text: str, share: float = 0.1) -> str:
    """Return the end of a text: what plain truncation to that share of it leaves, from a whole word on.

    Raises
    ------
    ConfigurationError
        The share is not above 0 and at most 1.
    """
    _require_share(share)
    start = len(text) - round(len(text) * share)
    while 0 < start < len(text) and not text[start - 1].isspace():
        start += 1
    return text[start:].lstrip() if start else text


def retrieved_context(index: Index, pieces: Sequence[str], query: str, share: float = 0.1) -> str:
    """Return the pieces of a text that an index finds for a query, in the order of the text.

    Parameters
    ----------
    index : Index
        Of `pieces`.
    pieces : sequence of str
        The text in pieces, such as its sentences.
    query : str
        What is looked for: a probe's prompt.
    share : float
        Of the characters of all pieces, what may be returned; the best piece is returned whatever its length.
    """
    _require_share(share)
    room = share * sum(map(len, pieces))
    taken: list[int] = []
    for number, _ in index.search(query, len(pieces)):
        if taken and len(pieces[number]) > room:
            break
        taken.append(number)
        room -= len(pieces[number])
    return " ".join(pieces[number].strip() for number in sorted(taken))


def _require_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigurationError(f"a share of a text is above 0 and at most 1, not {share}")
