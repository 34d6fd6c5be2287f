"""Writes many short texts at a time after one shared beginning, whose keys are computed once."""

from __future__ import annotations

import time
from collections.abc import Sequence

from everlong.attention import FullAttention
from everlong.reading.attached import AttachedModel
from everlong.reading.rows import read_all
from everlong.reading.sampling import GREEDY, Sampling
from everlong.reading.tape import Tape
from everlong.reading.together import write_tapes
from everlong.reading.writing import drained

_CHUNK = 512  # tokens


class Writer:
    """Goes on from a shared beginning in many ways.

    Parameters
    ----------
    model : AttachedModel
        The model.
    rows : int
        Texts that are written at the same time.
    """

    def __init__(self, model: AttachedModel, rows: int = 48) -> None:
        self.model = model
        self.rows = rows
        self.tokens = 0
        """Tokens written."""

    def write(
        self,
        beginning: str,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = ("\n",),
        *,
        passages: Sequence[str] | None = None,
        sampling: Sequence[Sampling] | None = None,
    ) -> list[str]:
        """Return what the model writes after ``beginning + prompt``, for each prompt.

        Parameters
        ----------
        beginning : str
            Raw text that all have in common; may be empty.
        prompts : sequence of str
            Raw text; no prompt is empty.
        max_new_tokens : int
            Tokens that each may have.
        stop : sequence of str
            Where each ends; not part of what is returned.
        passages : sequence of str, optional
            What each prompt stands behind, after the beginning; the same for several, it is read once.
        sampling : sequence of Sampling, optional
            How each is drawn; greedily by default.
        """
        coder = self.model.coder
        trunk = self._trunk(beginning)
        texts: list[str] = []
        for start in range(0, len(prompts), self.rows):
            tapes = []
            some = slice(start, start + self.rows)
            branches = {"": trunk} if passages is None else self._branches(trunk, beginning, passages[some])
            for number, prompt in enumerate(prompts[some], start):
                passage = "" if passages is None else passages[number]
                tape = branches[passage].fork()
                tape.accept(coder.encode_after(prompt) if beginning or passage else coder.encode(prompt))
                tapes.append(tape)
            written = drained(
                write_tapes(
                    tapes,
                    _CHUNK,
                    max_new_tokens,
                    [GREEDY] * len(tapes) if sampling is None else sampling[some],
                    [tuple(stop)] * len(tapes),
                    time.perf_counter(),
                    moved=True,
                )
            )
            texts += [generation.text for generation in written]
            self.tokens += sum(generation.tokens for generation in written)
        return texts

    def _branches(self, trunk: Tape, beginning: str, passages: Sequence[str]) -> dict[str, Tape]:
        """Return a tape for each passage on which it has been read behind the beginning."""
        branches = {passage: trunk.fork() for passage in passages}
        for passage, tape in branches.items():
            coder = self.model.coder
            tape.accept(coder.encode_after(passage) if beginning else coder.encode(passage))
        read_all(list(branches.values()), _CHUNK)
        return branches

    def _trunk(self, beginning: str) -> Tape:
        """Return a tape on which the beginning has been read."""
        tape = Tape(self.model, self.model.attachment.new_cache(FullAttention()), None, False)
        tape.place = "raw"
        tape.accept(list(self.model.coder.bos))
        if beginning:
            tape.accept(self.model.coder.encode(beginning))
            tape.run_all(_CHUNK, logits=False)
        return tape
