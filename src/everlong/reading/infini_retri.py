"""InfiniRetri: what a question attends to is carried, sentence by sentence, from chunk to chunk."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.attention.asked import AskedAttention, received
from everlong.attention.policy import require_count
from everlong.errors import ConfigurationError, UnsupportedModelError
from everlong.reading.outside import FORWARD, Errand, ReadingMethod, Task, reading_method
from everlong.reading.reports import Generation
from everlong.reading.sentences import LONGEST, packed

Sentences = list[list[int]]
T = TypeVar("T")


@reading_method("infini-retri")
@dataclass(frozen=True)
class InfiniRetri(ReadingMethod):
    """Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing (arXiv 2502.12962).

    The text is read chunk after chunk, each behind the sentences carried so far and with the question after
    it, by full attention, from nothing: no cache goes on. Of the tokens before the question those to which
    its own attend most, in the last layer, summed over query heads and tokens and smoothed, are picked, and
    their whole sentences are carried to the next chunk, in order. What is kept: these sentences. What the
    answer sees: these, the last chunk and the question, at true distances. What is forgotten: the rest.

    Ours: chunks are made of whole sentences; of models with local layers the last layer with full attention
    is asked; a token's attention is smoothed over half of `smoothing` before it, itself and the rest behind
    it, where there is nothing by 0; where the sentences of all picked tokens are more than `carried` tokens,
    those of the tokens picked first are carried.

    Parameters
    ----------
    chunk : int
        Tokens read at a time, at most.
    top : int
        Tokens picked; 300 in the paper.
    smoothing : int
        Tokens over which attention is smoothed; 8 in the paper.
    carried : int, optional
        Tokens of the sentences carried, at most; by default what the model's training length leaves beside a
        chunk, the question and the answer.
    longest : int
        Tokens of a sentence at most: longer ones are cut.
    """

    chunk: int = 1024
    top: int = 300
    smoothing: int = 8
    carried: int | None = None
    longest: int = LONGEST

    def __post_init__(self) -> None:
        for name in ("chunk", "top", "smoothing", "longest"):
            require_count("InfiniRetri", name, getattr(self, name), least=1)
        require_count("InfiniRetri", "carried", self.carried, least=1, optional=True)
        if self.longest > self.chunk:
            raise ConfigurationError(
                f"InfiniRetri: a chunk of {self.chunk} tokens cannot hold a sentence of {self.longest}: use "
                f"a larger chunk, or longest={self.chunk}"
            )
        if self.carried is not None and self.longest > self.carried:
            raise ConfigurationError(
                f"InfiniRetri: carried={self.carried} tokens cannot hold a sentence of {self.longest}: carry "
                f"more, or use longest={self.carried}"
            )

    def answer(self, task: Task) -> Generator[str, Any, Generation]:
        """Read chunk after chunk; write from what was carried and the last one."""
        errand = Errand(task, self.longest)
        layers = task.model.attachment.layers.full
        if not layers:
            raise UnsupportedModelError(
                "InfiniRetri: no layer of this model has full attention, so a question cannot attend to a "
                "whole chunk: take another model, or read with `everlong read`"
            )
        most = self._most_carried(errand)
        held: Sentences = []
        for chunk, is_last in _marked(packed(errand.sentences(), self.chunk)):
            held = [*held, *chunk]
            if not is_last:
                attention = self._attention(errand, held, max(layers))
                held = [held[at] for at in self.picked(attention, [len(each) for each in held], most)]
        return (yield from errand.write(errand.laid_out(list(chain(*held)))))

    def picked(self, attention: Tensor, lengths: Sequence[int], most: int) -> list[int]:
        """Return the numbers of the sentences to carry, in order.

        Parameters
        ----------
        attention : Tensor (n,)
            What each token received.
        lengths : sequence of int
            Tokens of each sentence, n together.
        most : int
            Tokens to carry at most.
        """
        n = len(attention)
        smoothed = F.avg_pool1d(
            attention[None, None], self.smoothing, stride=1, padding=self.smoothing // 2
        ).flatten()[:n]
        order = smoothed.sort(descending=True, stable=True).indices[: self.top].tolist()
        sentence_of = torch.repeat_interleave(torch.tensor(lengths)).tolist()
        chosen: set[int] = set()
        room = most
        for token in order:
            number = sentence_of[token]
            if number not in chosen and lengths[number] <= room:
                chosen.add(number)
                room -= lengths[number]
        return sorted(chosen)

    def _attention(self, errand: Errand, sentences: Sentences, layer: int) -> Tensor:
        """Read sentences and the question; return what each token of them received, on the CPU."""
        tape = errand.laid_out(list(chain(*sentences)))
        first = len(errand.opening)
        stop = first + sum(map(len, sentences))
        policy = AskedAttention(layer=layer, begin=stop, stop=stop + errand.question_tokens)
        tape.driver.cache = errand.task.model.attachment.new_cache(policy)
        tape.run_all(FORWARD, logits=False)
        errand.ran(tape.driver.seconds, tape.driver.cache)
        return received(tape.driver.cache)[0, first:stop].float().cpu()

    def _most_carried(self, errand: Errand) -> int:
        """Return how many tokens can be carried; raise where the training length leaves no room."""
        least = self.longest if self.carried is None else self.carried
        room = errand.room(self, self.chunk + least, f"a chunk of {self.chunk} and {least} that are carried")
        if self.carried is not None:
            return self.carried
        if room is None:
            raise ConfigurationError(
                "the model does not name its training length: pass InfiniRetri(carried=...)"
            )
        return room - self.chunk


def _marked(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item, and whether it is the last."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True
