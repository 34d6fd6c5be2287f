"""The tape of a session: text held back, tokens waiting to be run, turns open, and the driver behind it."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor

from everlong.attention import StreamCache
from everlong.errors import InputError, StateError
from everlong.reading.attached import AttachedModel
from everlong.reading.driver import Driver
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.memories import Memories
from everlong.reading.reports import Stats, perplexity
from everlong.reading.sampling import LONGEST_REPETITION_WINDOW
from everlong.reading.tokens import TokenStream
from everlong.reading.trail import Trail

Place = Literal["start", "raw", "user", "assistant"]
"""Where the tape stands: nothing on it; outside any turn; in the user's turn; in the assistant's."""

_LATEST = 64  # tokens that tell what is being written about


class Tape:
    """One stream's text and tokens, in order, and where they stand in the conversation.

    Parameters
    ----------
    model : AttachedModel
        Whose stream.
    cache : StreamCache
        What the model remembers of it.
    system : str or None
        Text the conversation begins with.
    surprisal : bool
        Whether each token's surprisal is computed.
    """

    def __init__(self, model: AttachedModel, cache: StreamCache, system: str | None, surprisal: bool) -> None:
        self.model = model
        self.driver = Driver(model.attachment, cache, surprisal)
        self.text = TokenStream(model.coder)
        self.queue: list[int] = []
        """Tokens accepted and not yet run."""
        self.place: Place = "start"
        self.written = 0
        self.memories: Memories | None = None
        """What the model knows by heart in what is run; see :meth:`use`."""
        self.trail = Trail()
        self.generator = torch.Generator(device=model.device)
        self.form = model.form(with_system=system is not None)
        self._system = system
        self._accepted = 0  # tokens read that left the held tail
        self._is_reading = False  # whether the policy has not been told of the end of a read
        self._turn_has_text = False

    @property
    def read(self) -> int:
        """Tokens read so far, held and waiting ones included."""
        return self._accepted + self.text.held

    @property
    def memory_names(self) -> tuple[str, ...]:
        """Names of the memories that the model has at present."""
        return () if self.memories is None else self.memories.names

    # --- what comes onto the tape ---------------------------------------------------------------------

    def accept(self, ids: list[int]) -> None:
        """Let tokens wait to be run."""
        self.trail.accept(ids, self.driver.cache.seen + len(self.queue))
        self.queue += ids
        self._accepted += len(ids)
        self._is_reading = self._is_reading or bool(ids)

    def take(self, piece: str | list[int], *, learns: bool = False) -> None:
        """Take a piece of a text, or of ids, which is to be learned when it leaves the window, or is not."""
        if isinstance(piece, str):
            self.begin_text()
            self._turn_has_text = True
            self._turn_trail(learns)
            self.accept(self.text.feed(piece))
        else:
            if self.place == "start":
                self.place = "raw"
            self._turn_has_text = True
            self.finish()
            self._turn_trail(learns)
            self.accept(piece)

    def finish(self) -> None:
        """End the text: what is held merges with nothing to come."""
        self.accept(self.text.finish())

    def begin_text(self) -> None:
        """Open the user's turn, unless it is open or ids were read outside of turns."""
        if self.place == "start":
            self._open()
        elif self.place == "assistant":
            self._turn_trail(False)
            self._markup(self.form.to_user)
            self.place, self._turn_has_text = "user", False

    def begin_writing(self) -> None:
        """Prepare for the model to go on from here."""
        if self.place == "start":
            if self._system is not None:
                self._open()
            elif self.model.coder.bos:
                self.accept(self.model.coder.bos)
                self.place = "raw"
            else:
                raise InputError(
                    "the prompt has zero tokens, and the model no start token: read() something first"
                )
        self.finish()

    def ask(self, question: str) -> None:
        """Put a question at the end of the user's turn, and open the assistant's."""
        if self.place == "raw" and self.form.is_chat:
            self.finish()
            self._open(anew=False)
        self.begin_text()
        self._turn_trail(False)
        self.accept(self.text.feed(self.form.question(question, after_text=self._turn_has_text)))
        self._markup(self.form.to_assistant)
        self.finish()
        self.place = "assistant"

    def _open(self, anew: bool = True) -> None:
        """Begin the conversation, with the start token where the tape begins with it."""
        self._turn_trail(False)
        bos = self.model.coder.bos
        if self.form.is_chat:
            opening = self.model.coder.split_markup(self.form.before_system)
            if not anew and bos and opening[: len(bos)] == bos:
                opening = opening[len(bos) :]
            for piece in opening:
                self.accept(self.text.special(piece) if isinstance(piece, int) else self.text.feed(piece))
        elif anew:
            self.accept(bos)
        if self._system is not None:
            self.accept(self.text.feed(self._system))
            self._markup(self.form.after_system)
        self.place, self._turn_has_text = "user", False

    def _turn_trail(self, learns: bool) -> None:
        self.trail.turn(learns, lambda: self.text.held)

    def _markup(self, rendered: str) -> None:
        for piece in self.model.coder.split_markup(rendered):
            self.accept(self.text.special(piece) if isinstance(piece, int) else self.text.feed(piece))

    # --- running it -----------------------------------------------------------------------------------

    def latest(self) -> str:
        """Return the last words that were run or wait for it."""
        ids = [*self.driver.recent, *self.queue][-_LATEST:]
        words: str = self.model.tokenizer.decode(ids, skip_special_tokens=True)
        return words

    def use(self, memories: Memories | None) -> None:
        """Let the model know these by heart in what is run from here on."""
        self.memories = memories
        self.driver.cache.adapter = None if memories is None or memories.prefix else memories.adapter

    def run_chunk(self, size: int, *, logits: bool, undisturbed: bool = False) -> Tensor | None:
        """Run the first `size` waiting tokens, Ctrl-C waiting for the end; parameters of :meth:`Driver.run`.

        Returns surprisal, if it is computed.
        """
        with deferred_interrupt():
            chunk, before = self.queue[:size], self.driver.cache.seen
            try:
                return self.driver.run(chunk, logits=logits, undisturbed=undisturbed)
            finally:
                if self.driver.cache.seen > before:  # they went through, whatever came of it
                    del self.queue[: len(chunk)]

    def run_all(self, size: int, *, logits: bool) -> None:
        """Run everything that waits, `size` tokens at a time."""
        while self.queue:
            self.run_chunk(size, logits=logits and len(self.queue) <= size)

    def end_of_read(self) -> None:
        """Tell the policy, once, that reading is over for now."""
        with deferred_interrupt(), torch.inference_mode():
            if self._is_reading:
                self.driver.cache.end_of_prefill()
            self._is_reading = False

    # --- accounts, copies, state ----------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the accounts."""
        driver, cache = self.driver, self.driver.cache
        return Stats(
            tokens_read=self.read,
            tokens_written=self.written,
            kept=cache.kept,
            recallable=cache.recallable,
            forgotten=cache.forgotten,
            waiting=len(self.queue) + self.text.held,
            bytes=cache.bytes(),
            seconds=driver.seconds,
            tokens_per_second=driver.tokens / driver.seconds if driver.seconds else 0.0,
            perplexity=perplexity(driver.nll_sum, driver.nll_count),
        )

    def fork(self) -> Tape:
        """Return an independent copy, its random draws included; nothing on it is to be learned."""
        copy = Tape(self.model, self.driver.cache, self._system, False)
        copy.driver = self.driver.fork()
        copy.text = self.text.fork()
        copy.queue = self.queue.copy()
        copy.place, copy.written, copy.memories = self.place, self.written, self.memories
        copy._accepted, copy._is_reading = self._accepted, self._is_reading
        copy._turn_has_text = self._turn_has_text
        copy.generator.set_state(self.generator.get_state())
        return copy

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON-able values from which :meth:`restored` goes on bit by bit."""
        driver = self.driver
        cached, cache = driver.cache.state()
        tensors = {f"cache.{name}": tensor for name, tensor in cached.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["recent"] = torch.tensor(driver.recent, dtype=torch.int64)
        if driver.logits is not None:
            tensors["logits"] = driver.logits
        values = {
            "cache": cache,
            "generator_device": self.generator.device.type,
            "system": self._system,
            "tail": self.text.tail,
            "fresh": self.text.fresh,
            "queue": self.queue,
            "place": self.place,
            "turn_has_text": self._turn_has_text,
            "accepted": self._accepted,
            "written": self.written,
            "surprisal": driver.surprisal,
            "nll": [driver.nll_sum, driver.nll_count],
            "seconds": driver.seconds,
            "tokens": driver.tokens,
            "is_reading": self._is_reading,
            "trail": self.trail.state(),
        }
        return tensors, values

    @classmethod
    def restored(cls, model: AttachedModel, tensors: dict[str, Tensor], values: dict[str, Any]) -> Tape:
        """Rebuild a tape from :meth:`state`, its tensors on the model's device."""
        try:
            cached = {
                name.removeprefix("cache."): t for name, t in tensors.items() if name.startswith("cache.")
            }
            cache = model.attachment.restore_cache(cached, values["cache"])
            tape = cls(model, cache, values["system"], values["surprisal"])
            tape.text = TokenStream(model.coder, values["tail"], values["fresh"])
            tape.queue = [int(token) for token in values["queue"]]
            tape.place, tape._turn_has_text = values["place"], bool(values["turn_has_text"])
            tape._accepted, tape.written = int(values["accepted"]), int(values["written"])
            driver = tape.driver
            driver.recent = deque(tensors["recent"].tolist(), maxlen=LONGEST_REPETITION_WINDOW)
            driver.logits = tensors.get("logits")
            driver.nll_sum, driver.nll_count = float(values["nll"][0]), int(values["nll"][1])
            driver.seconds, driver.tokens = float(values["seconds"]), int(values["tokens"])
            tape._is_reading = bool(values["is_reading"])
            tape.trail = Trail.restored(values["trail"])
            _restore_generator(tape.generator, tensors["generator"].cpu(), values["generator_device"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(
                f"the saved state is not complete: {error!r}; restore an earlier copy"
            ) from error
        return tape


def _restore_generator(generator: torch.Generator, saved: Tensor, device: str) -> None:
    if generator.device.type == device:
        generator.set_state(saved)
    else:  # the generators of different devices have nothing in common
        warnings.warn(
            f"the session was saved on a {device} device: here, on {generator.device.type}, draws begin anew",
            stacklevel=4,
        )
        generator.seed()
