"""How well a text is predicted behind a stream."""

from __future__ import annotations

import torch

from everlong.errors import InputError
from everlong.reading.reports import Score, perplexity
from everlong.reading.tape import Tape


def score(tape: Tape, text: str, chunk: int, *, begins: bool) -> Score:
    """Run `text` on a tape that is not needed any more, and tell how likely it was.

    Parameters
    ----------
    tape : Tape
        A fork of the stream's.
    text : str
        Tokenised by itself, after everything read.
    chunk : int
        Tokens run at a time.
    begins : bool
        Whether a stream of which nothing is read begins with something before the text.

    Raises
    ------
    InputError
        There is nothing to score.
    """
    if not text:
        raise InputError("the text to score is empty")
    if tape.place != "start" or begins or tape.model.coder.bos:
        tape.begin_writing()
    tape.run_all(chunk, logits=True)
    known = tape.driver.logits is not None
    tape.driver.surprisal = True
    tape.accept(tape.text.feed(text))
    tape.finish()
    parts = []
    while tape.queue:
        parts.append(tape.run_chunk(chunk, logits=True))
    surprisal = torch.cat([part for part in parts if part is not None])[0 if known else 1 :].cpu()
    if not len(surprisal):
        raise InputError("the text is a single token and nothing comes before it: there is nothing to score")
    nll = float(surprisal.double().mean())
    return Score(len(surprisal), nll, perplexity(nll, 1) or 0.0, surprisal)
