"""What a student is trained on: pairs as tokens, with what a teacher that reads the text expects of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from everlong.memory.distillation import likeliest
from everlong.memory.forest import in_batches, read_past, run_forest
from everlong.memory.pairs import Pair
from everlong.models.head import Head
from everlong.reading.attached import AttachedModel
from everlong.reading.tokens import TokenStream

_BATCH = 512  # tokens a forward


@dataclass(frozen=True)
class Elicited:
    """A pair, and how its teacher is asked.

    Attributes
    ----------
    pair : Pair
        What the student is asked, and the response.
    beginning : str
        What the teacher reads first: the segment, or examples; many pairs share it.
    question : str or None
        What it reads then; the response follows. None: what the student reads.
    is_answer : bool
        Whether the query is a question to be asked as sessions ask, and the response ends there.
    passage : str
        What the student reads before the query; mostly nothing.
    untold : str or None
        The question without the text, where the beginning does not hold it: what the text is worth is
        measured against that, behind the same beginning. None: against what the student reads.
    """

    pair: Pair
    beginning: str
    question: str | None
    is_answer: bool = False
    passage: str = ""
    untold: str | None = None


@dataclass(frozen=True, eq=False)
class Lesson:
    """A pair, ready to be learned.

    Attributes
    ----------
    pair : Pair
        With its gain.
    query, response : list of int
        Tokens the student reads, the start token included, and those it is to predict, n of them.
    tokens : Tensor (n, k)
        The teacher's likeliest next tokens.
    log_probs : Tensor (n, k)
        Their log-probabilities, in nats.
    hidden : Tensor (n, d) or None
        The teacher's last hidden states there, where they are wanted.
    ends : bool
        Whether the last token of the response only ends it: it is learned as it is, whatever the teacher
        expects, and does not count for the gain.
    """

    pair: Pair
    query: list[int]
    response: list[int]
    tokens: Tensor
    log_probs: Tensor
    hidden: Tensor | None = None
    ends: bool = False

    def __len__(self) -> int:
        return len(self.query) + len(self.response)

    @property
    def words(self) -> int:
        """Tokens of the response, without the one that ends it."""
        return len(self.response) - self.ends

    def hard(self) -> Lesson:
        """Return the lesson with the response itself as the only thing to expect."""
        tokens = torch.tensor(self.response)[:, None]
        return replace(self, tokens=tokens, log_probs=torch.zeros(tokens.shape), hidden=None)


def lessons_state(lessons: Sequence[Lesson], name: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return named tensors and JSON-able values for :func:`lessons_restored`."""
    tensors: dict[str, Tensor] = {}
    for number, lesson in enumerate(lessons):
        tensors[f"{name}.{number}.tokens"] = lesson.tokens.to(torch.int32)
        tensors[f"{name}.{number}.log_probs"] = lesson.log_probs
        if lesson.hidden is not None:
            tensors[f"{name}.{number}.hidden"] = lesson.hidden
    return tensors, [
        {"pair": asdict(x.pair), "query": x.query, "response": x.response, "ends": x.ends} for x in lessons
    ]


def lessons_restored(
    tensors: Mapping[str, Tensor], values: Sequence[dict[str, Any]], name: str
) -> list[Lesson]:
    """Rebuild what :func:`lessons_state` returned."""
    return [
        Lesson(
            Pair.restored(saved["pair"]),
            saved["query"],
            saved["response"],
            tensors[f"{name}.{number}.tokens"].long(),
            tensors[f"{name}.{number}.log_probs"],
            tensors.get(f"{name}.{number}.hidden"),
            saved["ends"],
        )
        for number, saved in enumerate(values)
    ]


@dataclass(frozen=True)
class _Text:
    """What is read for a pair: a beginning that many share (None: not even the start token), the rest."""

    beginning: str | None
    query: list[int]
    response: list[int]


def _behind(model: AttachedModel, beginning: str, text: str) -> list[int]:
    return model.coder.encode_after(text) if beginning else model.coder.encode(text)


def _read(model: AttachedModel, texts: Sequence[_Text]) -> Iterator[tuple[list[int], Tensor]]:
    """Read texts, those of a beginning together.

    Yields some of their numbers, and the hidden states that predict their responses, one after another.
    """
    beginnings: dict[str | None, list[int]] = {}
    for number, text in enumerate(texts):
        beginnings.setdefault(text.beginning, []).append(number)
    coder = model.coder
    for beginning, numbers in beginnings.items():
        ids = [] if beginning is None else [*coder.bos, *(coder.encode(beginning) if beginning else [])]
        past, last = read_past(model, ids[:-1]), ids[-1:]  # what it expects next, each text tells
        rows = [[*last, *texts[number].query, *texts[number].response] for number in numbers]
        for batch in in_batches([len(row) for row in rows], _BATCH):
            some = [numbers[i] for i in batch]
            sizes = [(len(rows[i]), len(texts[numbers[i]].response)) for i in batch]
            yield some, run_forest(model, past, [rows[i] for i in batch])[_response_rows(sizes)]


class Teacher:
    """The model with the text in front of it.

    Parameters
    ----------
    model : AttachedModel
        The model, its weights as they are to teach.
    top_k : int
        Of how many next tokens probabilities are kept.
    hidden : bool
        Whether hidden states are kept.
    student : AttachedModel, optional
        Who is to learn, without the text, with the same tokens; None: the model itself.
    """

    def __init__(
        self,
        model: AttachedModel,
        *,
        top_k: int = 64,
        hidden: bool = False,
        student: AttachedModel | None = None,
    ) -> None:
        self.model = model
        self.student = student or model
        words = min(model.vocabulary, self.student.vocabulary)  # what only pads the larger, nobody learns
        self.head = Head(model.attachment.model).of_first(words)
        self.top_k = min(top_k, words)
        self.keeps_hidden = hidden

    @torch.inference_mode()
    def teach(self, elicited: Sequence[Elicited], *, gain: bool = True) -> list[Lesson]:
        """Turn pairs into lessons; a pair's gain is measured on the way, if it is wanted.

        A pair whose response has no token to predict is left out: an empty one, or (the query empty, the
        model without a start token) one of a single token.
        """
        encoded = [(item, as_tokens(self.student, item)) for item in elicited]
        asked = [(item, lesson) for item, lesson in encoded if lesson.words]
        texts = [_Text(item.beginning, self._asked(item, lesson), lesson.response) for item, lesson in asked]
        lessons: dict[int, Lesson] = {}
        for numbers, hidden in _read(self.model, texts):
            lessons.update(zip(numbers, self._taught([asked[i][1] for i in numbers], hidden), strict=True))
        ordered = [lessons[number] for number in sorted(lessons)]
        if not gain:
            return [replace(lesson, pair=replace(lesson.pair, gain=None)) for lesson in ordered]
        return [
            replace(lesson, pair=replace(lesson.pair, gain=float(lesson.pair.gain or 0.0) - untold))
            for lesson, untold in zip(ordered, self._untold(asked), strict=True)
        ]

    def _untold(self, asked: Sequence[tuple[Elicited, Lesson]]) -> list[float]:
        """Return the mean log-likelihood of each response to a student without the text, in nats a token."""
        head = self.head
        if self.student is not self.model:
            head = Head(self.student.attachment.model).of_first(len(head.weight))
        texts = [
            _Text(None, lesson.query, lesson.response)
            if item.untold is None
            else _Text(item.beginning, _behind(self.student, item.beginning, item.untold), lesson.response)
            for item, lesson in asked
        ]
        found: dict[int, float] = {}
        for numbers, hidden in _read(self.student, texts):
            some = [asked[number][1] for number in numbers]
            targets = torch.tensor([token for lesson in some for token in lesson.response])
            surprisal = head.surprisal(hidden, targets.to(hidden.device))
            parts = torch.split(surprisal, [len(lesson.response) for lesson in some])
            for number, part, lesson in zip(numbers, parts, some, strict=True):
                found[number] = -float(part[: lesson.words].mean())
        return [found[number] for number in range(len(asked))]

    def _asked(self, item: Elicited, lesson: Lesson) -> list[int]:
        """Return what is read between the beginning and the response."""
        if item.question is None:
            return lesson.query[len(self.model.coder.bos) :]
        asked = _behind(self.model, item.beginning, item.question)
        is_begun = not (item.pair.query or item.is_answer or self.student.coder.bos)
        return [*asked, *lesson.query] if is_begun else asked

    def _taught(self, lessons: Sequence[Lesson], hidden: Tensor) -> Iterator[Lesson]:
        """Fill in what the teacher expects, and (for now) the likelihood with the text as the gain."""
        tokens, log_probs, total = likeliest(self.head, hidden, self.top_k)
        responses = torch.tensor([t for lesson in lessons for t in lesson.response], device=hidden.device)
        likelihood = self.head.at(hidden, responses[:, None])[:, 0] - total
        sizes = [len(lesson.response) for lesson in lessons]
        parts = [torch.split(x, sizes) for x in (tokens.cpu(), log_probs.cpu(), hidden.cpu(), likelihood)]
        for lesson, own, best, states, found in zip(lessons, *parts, strict=True):
            if lesson.ends:
                best[-1], own[-1] = -torch.inf, 0
                best[-1, 0], own[-1, 0] = 0.0, lesson.response[-1]
            yield replace(
                lesson,
                pair=replace(lesson.pair, gain=float(found[: lesson.words].mean())),
                tokens=own.clone(),
                log_probs=best.clone(),
                hidden=states.clone() if self.keeps_hidden else None,
            )


def response_rows(lessons: Sequence[Lesson]) -> Tensor:
    """Return which tokens of lessons, one after another, predict a token of a response, shape (n,)."""
    return _response_rows([(len(lesson), len(lesson.response)) for lesson in lessons])


def _response_rows(sizes: Iterable[tuple[int, int]]) -> Tensor:
    rows, stop = [], 0
    for length, response in sizes:
        assert length > response, "something stands before the first token to predict"
        stop += length
        rows.append(torch.arange(stop - response - 1, stop - 1))
    return torch.cat(rows)


def as_tokens(model: AttachedModel, item: Elicited) -> Lesson:
    """Return a pair as tokens, nothing known of the teacher yet."""
    coder = model.coder
    query, response = list(coder.bos), coder.encode_after(item.pair.response)
    end: list[int] = []
    if item.is_answer:
        query, end = _question(model, item.pair.query, item.passage), _end(model)
    elif item.passage or item.pair.query:
        query += coder.encode(item.passage + item.pair.query)
    elif not query:  # no start token: the first of the text stands for it
        query, response = response[:1], response[1:]
    nothing = torch.empty(0)
    return Lesson(item.pair, query, [*response, *end], nothing, nothing, ends=bool(end))


def _question(model: AttachedModel, question: str, passage: str) -> list[int]:
    """Return a question as a session asks it that has read a passage, or nothing."""
    form, stream = model.form(with_system=False), TokenStream(model.coder)
    ids = stream.markup(form.before_system) if form.is_chat else list(model.coder.bos)
    ids += stream.feed(passage + form.question(question, after_text=bool(passage)))
    return [*ids, *stream.markup(form.to_assistant), *stream.finish()]


def _end(model: AttachedModel) -> list[int]:
    """Return the token that ends an answer: of what follows one, the end of a turn, or else the first."""
    stream = TokenStream(model.coder, fresh=False)
    after = [*stream.markup(model.form(with_system=False).to_user), *stream.finish()]
    return ([token for token in after if token in model.end_tokens] or after)[:1]
