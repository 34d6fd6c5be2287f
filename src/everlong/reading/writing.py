"""The loop in which a model writes."""

from __future__ import annotations

import time
from collections.abc import Generator

from everlong.reading.detokenize import Detokenizer
from everlong.reading.reports import Generation, StopReason
from everlong.reading.sampling import Sampler, Sampling
from everlong.reading.tape import Tape


def write(
    tape: Tape, chunk: int, max_new_tokens: int, sampling: Sampling, stop: tuple[str, ...], started: float
) -> Generator[str, None, Generation]:
    """Let the model go on from where the tape stands; yield the text as it comes.

    The last token written waits on the tape: it is run when there is a use for what comes after it.

    Parameters
    ----------
    tape : Tape
        With at least one token on it.
    chunk : int
        Tokens run at a time before the first is written.
    max_new_tokens : int
        Tokens to write at most.
    sampling : Sampling
        How each is chosen.
    stop : tuple of str
        Texts at which to stop.
    started : float
        ``time.perf_counter()`` when the text was asked for.
    """
    driver, ends = tape.driver, tape.model.end_tokens
    tape.run_all(chunk, logits=True)
    tape.end_of_read()
    if sampling.seed is not None:
        tape.generator.manual_seed(sampling.seed)
    sampler = Sampler(sampling, tape.generator)
    detokenizer = Detokenizer(tape.model.tokenizer, list(driver.recent)[-16:], stop)
    texts: list[str] = []
    count = 0
    reason: StopReason = "length"
    while count < max_new_tokens:
        if tape.queue:
            tape.run_chunk(1, logits=True)
        assert driver.logits is not None, "begin_writing() left nothing to go on from"
        token = sampler(driver.logits, driver.recent)
        if token in ends:
            reason = "eos"
            break
        tape.queue = [token]
        tape.written += 1
        count += 1
        text = detokenizer.put(token)
        if text:
            texts.append(text)
            yield text
        if detokenizer.stopped:
            reason = "stop"
            break
    text = detokenizer.finish()
    if text:
        texts.append(text)
        yield text
    if detokenizer.stopped:
        reason = "stop"
    return Generation("".join(texts), count, time.perf_counter() - started, reason, tape.stats())


def drained(writing: Generator[str, None, Generation]) -> Generation:
    """Run a writing to its end and return the outcome."""
    while True:
        try:
            next(writing)
        except StopIteration as end:
            generation: Generation = end.value
            return generation
