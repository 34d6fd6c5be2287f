"""HOMER: chunks of a text read apart, which drop tokens and merge between the layers."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from everlong.attention.merge_tree import Tree, averages, even_cuts, find_borders
from everlong.attention.merging import Apart, Merging, require_merging
from everlong.attention.policy import require_count
from everlong.errors import ConfigurationError, UnsupportedModelError
from everlong.reading.driver import device_of
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.outside import Errand, ReadingMethod, Task, reading_method
from everlong.reading.reports import Generation
from everlong.reading.sentences import LONGEST
from everlong.reading.tape import Tape

_BINS = 32  # shares of a chunk in which attention is averaged
_LEAST = 2  # tokens of the text in a chunk

Chunks = list[list[int]]


@reading_method("homer")
@dataclass(frozen=True)
class Homer(ReadingMethod):
    """Hierarchical Context Merging (HOMER, Song et al., ICLR 2024, arXiv 2404.10308).

    The text is cut into 2^h chunks, as few as fit, each behind the same first tokens and with the question
    after it, together at most half the window. Each goes through the lower layers alone. Then, level by
    level, neighbours drop the tokens of the text to which their last token attends least, until both fit
    into one chunk, and merge; the first tokens and the question's, which both have, are averaged. What is
    kept: in all layers the tokens that the last merged chunk has, half the window at most. What the answer
    sees: these. At which positions: consecutive ones, anew after each merge. What is forgotten: what was
    dropped, in the layers below too; what that is depends on the question.

    As the authors do, chunks merge behind the first 12 of 32 layers, from there on at even distances, the
    answer's first token is what the last merged chunk predicts, and one chunk a level waits at any time.
    Ours: attention is the softmax's, averaged over query heads, where the authors' code compares the largest
    logit of all heads; chunks merge behind layers with full attention only. The authors subtract from it what
    tokens receive on average for where they stand, measured on other texts; here it is measured on the text's
    own chunks, going up alone, in 32 shares of a chunk, and only where it is asked for: what is looked for is
    in one of them, and lowers itself.

    Parameters
    ----------
    window : int, optional
        Twice the tokens of a chunk; by default the model's training length.
    warmup : int, optional
        Layers that leave chunks as they are, at least; by default 3 of 8.
    sinks : int
        Tokens that all chunks begin with, at least: the text's first, where the conversation has fewer.
    calibration : int
        Chunks on which is measured what tokens receive for where they stand in one, to be subtracted; they
        are read twice. 0: attention counts as it is. With few chunks it does more harm than good.
    neighbours : int
        Ours: a token counts as the one of so many on either side that is attended to most, so that what
        stands beside a word asked for stays with it. 0: each by itself, as the authors have it.
    """

    window: int | None = None
    warmup: int | None = None
    sinks: int = 4
    calibration: int = 0
    neighbours: int = 0

    def __post_init__(self) -> None:
        require_count("Homer", "window", self.window, least=2, optional=True)
        require_count("Homer", "warmup", self.warmup, least=0, optional=True)
        require_count("Homer", "sinks", self.sinks, least=0)
        require_count("Homer", "calibration", self.calibration, least=0)
        require_count("Homer", "neighbours", self.neighbours, least=0)

    def answer(self, task: Task) -> Generator[str, Any, Generation]:
        """Read the chunks, merge them, and write what follows."""
        require_merging(task.model.attachment.layers)
        errand = Errand(task, LONGEST)
        room = self._room(errand)
        return (yield from errand.write(self._read(errand, errand.text(), room)))

    def _read(self, errand: Errand, text: list[int], room: int) -> Tape:
        """Read a text, of which `room` tokens fit into a chunk; return a tape to write the answer on."""
        tape = errand.laid_out([])
        prefix, question = tape.queue[: len(errand.opening)], tape.queue[len(errand.opening) :]
        sinks = max(0, self.sinks - len(prefix)) if len(text) > room else 0  # of the text
        prefix, rest, room = [*prefix, *text[:sinks]], text[sinks:], room - sinks
        levels = max(0, (max(1, -(-len(rest) // room)) - 1).bit_length())
        tree = Tree(
            len(prefix),
            len(question),
            even_cuts(len(rest), 2**levels),
            room,
            self._borders(errand, levels, len(text)),
            self.neighbours,
        )
        ends = [*accumulate(tree.lengths, initial=0)]
        chunks = [[*prefix, *rest[begin:end], *question] for begin, end in pairwise(ends)]
        attachment = errand.task.model.attachment
        given = attachment.decoder, attachment.layers, attachment.owner, tree
        merging = Merging(*given, self._bias(errand, Apart(*given), chunks))
        for chunk, end in zip(chunks, ends[1:], strict=True):
            started = time.perf_counter()
            logits = merging.read(partial(_forward, errand, merging, chunk))
            seconds = time.perf_counter() - started
            errand.ran_of(sinks + end, len(text), seconds, merging)
        assert logits is not None
        tape.queue, tape.driver.cache = [], merging.joined()
        tape.driver.took(torch.tensor(chunks[-1]), logits, 0.0)
        return tape

    def _bias(self, errand: Errand, apart: Apart, chunks: Chunks) -> list[Tensor]:
        """Return for each level what tokens receive by where they stand, on average over some chunks."""
        count = min(self.calibration, len(chunks)) if apart.tree.levels else 0
        if not count:
            return []
        started = time.perf_counter()
        for number in ((2 * each + 1) * len(chunks) // (2 * count) for each in range(count)):
            apart.read_one(number, partial(_forward, errand, apart, chunks[number]))
        errand.seconds += time.perf_counter() - started
        bins = min(_BINS, *apart.tree.lengths)
        return [averages(noted, bins) for noted in apart.noted]

    def _borders(self, errand: Errand, levels: int, tokens: int) -> tuple[int, ...]:
        """Return after how many layers chunks merge; raise where there are too few for that many levels."""
        layers = errand.task.model.attachment.layers
        count, numbers = len(layers), list(layers.kept)
        full = [numbers.index(number) for number in layers.full]
        warmup = count * 3 // 8 if self.warmup is None else self.warmup
        found = find_borders(full, count, warmup, levels)
        if found is None:
            most = sum(warmup < number + 1 < count for number in full)
            raise UnsupportedModelError(
                f"Homer: {tokens} tokens are {2**levels} chunks, which merge behind {levels} layers with "
                f"full attention. Between the first {warmup} and the last of this model's {count} layers are "
                f"{most}: use a larger window or a smaller warmup, or read with InfiniRetri"
            )
        return found

    def _room(self, errand: Errand) -> int:
        """Return how many tokens of the text a chunk has room for; raise where that cannot work."""
        window = errand.task.model.attachment.training_length if self.window is None else self.window
        if window is None:
            raise ConfigurationError("the model does not name its training length: pass Homer(window=...)")
        room = window // 2 - errand.around
        if room - max(0, self.sinks - len(errand.opening)) < _LEAST:
            raise ConfigurationError(
                f"Homer: a chunk has half the window of {window} tokens. What stands around the text, the "
                f"question above all, takes {errand.around}, and the first {self.sinks} tokens are in all of "
                "them: no room is left for the text. Use a larger window, or ask less"
            )
        errand.room(self, room, f"the {room} that a chunk has room for")
        return room


@torch.inference_mode()
def _forward(errand: Errand, cache: Merging, ids: list[int]) -> Tensor:
    """Run a chunk; return the logits of the next token, shape (1, vocabulary)."""
    attachment = errand.task.model.attachment
    given = torch.tensor([ids], device=device_of(attachment))
    call: dict[str, Any] = {attachment.cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
    with deferred_interrupt():
        logits: Tensor = attachment.model(input_ids=given, **call).logits[0]
    return logits
