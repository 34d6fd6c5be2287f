"""A session: one stream of text, read and written without end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from everlong.attention import Policy, make_policy, policy_options, with_sinks
from everlong.errors import ConfigurationError, InputError, StateError, UnknownNameError
from everlong.reading.account import Account
from everlong.reading.attached import AttachedModel
from everlong.reading.intake import read
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.memories import Memories, Recall, Router, beginning, lasting, recalled, route, to_saved
from everlong.reading.passing import Learner, Learners, begin_learning, learn_what_left
from everlong.reading.prompts import pinned_text
from everlong.reading.reports import Learned, Progress, ReadReport, Score, Stats
from everlong.reading.sampling import Sampling
from everlong.reading.scoring import score
from everlong.reading.session_writing import SessionWriting
from everlong.reading.source import Source, open_source
from everlong.reading.state import read_state, write_state
from everlong.reading.tape import Tape

_LEARNER = "learner."  # before the names of its tensors in a saved state


class Session(SessionWriting):
    """One stream of text through one model. Made by ``llm.session()``; for one thread at a time.

    What is read is tokenised as the whole text would be: the end of it, which may still merge with what
    follows, waits (`stats.waiting`) until more comes or the model is to write. Where the model has a chat
    template, text is read inside a user turn, which a question closes.

    Parameters
    ----------
    model : AttachedModel
        The model.
    policy : Policy, optional
        This stream's own instead of the attached model's.
    system : str, optional
        Text that the conversation begins with.
    chunk : int
        Tokens run at a time while reading.
    surprisal : bool
        Whether to compute each token's surprisal, for perplexity; it costs the model's head.
    seed : int, optional
        Of the random draws. A fork of a session with a seed draws what its original would; without one,
        each fork and each question draws something new.
    memories : Memories or Router, optional
        What the model knows by heart in this stream from the beginning; or what chooses it, each time the
        model is to write. What is chosen reads what waits then, a question above all, and writes; the rest is
        read without.
    learners : callable, optional
        Gives what makes what learns the text that leaves the window.
    """

    def __init__(
        self,
        model: AttachedModel,
        *,
        policy: Policy | None = None,
        system: str | None = None,
        chunk: int = 512,
        surprisal: bool = False,
        seed: int | None = None,
        memories: Memories | Router | None = None,
        learners: Callable[[], Learners] | None = None,
    ) -> None:
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
            raise ConfigurationError(f"chunk={chunk!r} cannot work: it must be a whole number of at least 1")
        if system is not None and not system:
            raise InputError("the system text is empty: give one, or none at all")
        Sampling(seed=seed)  # checks it
        self.model = model
        self._policy = policy
        self._system = system
        self.chunk = chunk
        self._surprisal = surprisal
        self._seed = seed
        self._memories = memories
        self._learners = learners
        self._learner: Learner | None = None
        self._tape = self._new_tape()

    # --- reading -----------------------------------------------------------------------------------

    def read(
        self,
        source: Source,
        *,
        progress: Callable[[Progress], None] | None = None,
        memorize: Any = False,
        learn_progress: Callable[[Any], None] | None = None,
    ) -> ReadReport:
        """Read a text of any length into the stream.

        Ctrl-C takes effect between chunks, and in the middle of learning. What was taken from the source by
        then stays read, what was being learned is learned later, and ``session.read(file)`` goes on where an
        open file stands.

        Parameters
        ----------
        source : str, Path, open file, iterable of str, or ids
            See :func:`everlong.reading.source.open_source`; it is never held as a whole. Token ids are read
            as they are: without a start token, and outside a turn if none is open.
        progress : callable, optional
            Called after each chunk.
        memorize : bool, str or Learning
            Whether to learn, segment by segment, what of this text leaves the window, into a memory that the
            model knows by heart from then on; or its name, or all about it. What is still in the window waits
            until more is read, or for :meth:`memorize`.
        learn_progress : callable, optional
            Called now and then while that is learned, with a ``LearnProgress``.

        Raises
        ------
        InputError
            What cannot be read, or nothing at all. What was taken before the bad place stays read.
        ConfigurationError
            Nothing ever leaves the window to be learned, the memory's name is taken, the session learns into
            another memory, or was begun with what no other can grow beside: a cartridge, or "auto".
        MemoryGateError
            The first segment is worth nothing to the model that reads it.
        """
        self.model.require_attached()
        self._tape.use(lasting(self.memories))
        with closing(open_source(source, self.model.vocabulary)) as opened:
            learner = None if memorize is False else self._learner_for(memorize, source)
            return read(self._tape, opened, self.chunk, progress, learner, learn_progress)

    def _learner_for(self, memorize: Any, source: Any) -> Learner:
        if self._learner is None:
            policy = self._tape.driver.cache.policy
            self._learner = begin_learning(self._learners, memorize, source, policy, self.memories)
        else:
            self._learner.require_same(memorize)
        return self._learner

    def memorize(self, *, progress: Callable[[Any], None] | None = None) -> Learned:
        """Learn the rest of what was read to be memorized: what fills no segment, and what is in the window.

        The text ends here: what is read later does not merge with it.

        Parameters
        ----------
        progress : callable, optional
            Called now and then, with a ``LearnProgress``.

        Raises
        ------
        StateError
            Nothing was read so.
        """
        self.model.require_attached()
        if self._learner is None:
            raise StateError("there is nothing to learn: read(text, memorize=True) first")
        with deferred_interrupt():
            self._tape.finish()
        self._tape.run_all(self.chunk, logits=True)
        learn_what_left(self._tape, self._learner, progress, rest=True)
        return self._learner.report()

    def pin(self, text: str) -> ReadReport:
        """Read a text that is never forgotten: its tokens, and the turn's opening, become sinks.

        Parameters
        ----------
        text : str
            Instructions, usually. A blank line is added where it does not end with a line.

        Raises
        ------
        StateError
            Something was read before.
        ConfigurationError
            The text leaves no room in the window.
        UnsupportedUseError
            The policy keeps no sinks.
        """
        self.model.require_attached()
        if self._tape.place != "start":
            raise StateError("pin() comes before everything else: call reset() first, or begin a new session")
        text = pinned_text(text)
        tape = self._tape.fork()
        tape.take(text)
        tape.finish()
        policy = with_sinks(tape.driver.cache.policy, tape.driver.cache.seen + len(tape.queue))
        prefix = beginning(self.memories)
        tape.driver.cache = self.model.attachment.new_cache(policy, prefix=prefix)
        tape.use(lasting(self.memories))
        account = Account(self._tape)
        self._tape = account.tape = tape
        tape.run_all(self.chunk, logits=True)
        return account.report()

    def score(self, text: str) -> Score:
        """Tell how well the model predicts that the stream goes on with `text`; the session stays as it is.

        Parameters
        ----------
        text : str
            Tokenised by itself, after everything read.
        """
        self.model.require_attached()
        tape = self._tape.fork()
        tape.use(lasting(self.memories))
        return score(tape, text, self.chunk, begins=self._system is not None)

    # --- writing -----------------------------------------------------------------------------------

    def to_go_on(self) -> Tape:
        """Return the session's tape, ready for the model to write on it."""
        self.model.require_attached()
        self._tape.begin_writing()
        self._tape = route(self._tape, self.memories, self._tape.latest(), self.chunk)
        return self._tape

    def to_answer(self, question: str, *, keep: bool) -> Tape:
        """Return a tape ready for the answer to a question: the session's own, or a fork's."""
        if not question:
            raise InputError("the question is empty")
        tape = (self if keep else self.fork())._tape
        with deferred_interrupt():
            tape.ask(question)
        tape = route(tape, self.memories, question, self.chunk)
        if keep:
            self._tape = tape
        return tape

    # --- copies, state, accounts -------------------------------------------------------------------

    def fork(self) -> Session:
        """Return an independent copy. What it learns in passing goes into a memory of its own."""
        self.model.require_attached()
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._tape, copy._memories, copy._learner = self._tape.fork(), self.memories, None
        if self._seed is None:
            copy._tape.generator.seed()
        return copy

    def reset(self) -> None:
        """Forget everything read, written and pinned; the session's options and its system text stay.

        So does what was learned; what still waited to be is forgotten.
        """
        self._tape = self._new_tape()
        if self._learner is not None:
            self._learner.drop()

    def _new_tape(self) -> Tape:
        self.model.require_attached()
        cache = self.model.attachment.new_cache(self._policy, prefix=beginning(self.memories))
        tape = Tape(self.model, cache, self._system, self._surprisal)
        tape.use(lasting(self.memories))
        if self._seed is None:
            tape.generator.seed()
        else:
            tape.generator.manual_seed(self._seed)
        return tape

    def save(self, path: str | Path) -> None:
        """Write the session to a file, from which ``llm.restore(path)`` goes on bit by bit.

        Raises
        ------
        StateError
            The file cannot be written; what was there is untouched.
        """
        tensors, tape = self._tape.state()
        options = {
            "policy": None if self._policy is None else policy_options(self._policy),
            "system": self._system,
            "chunk": self.chunk,
            "surprisal": self._surprisal,
            "seed": self._seed,
            "memories": to_saved(self._memories),
        }
        learned = {} if self._learner is None else self._learner.state()
        tensors |= {f"{_LEARNER}{name}": tensor for name, tensor in learned.items()}
        write_state(path, self.model, tensors, {"options": options, "tape": tape})

    @classmethod
    def restore(
        cls,
        model: AttachedModel,
        path: str | Path,
        recall: Recall | None = None,
        learners: Callable[[], Learners] | None = None,
    ) -> Self:
        """Rebuild a session that :meth:`save` wrote; see ``llm.restore``.

        `recall` loads the memories it was begun with, `learners` makes again what it learned in passing.

        Raises
        ------
        InputError
            The file is missing, cut short, or something else.
        StateError
            It is of other weights, another tokenizer, or another format.
        """
        model.require_attached()
        tensors, saved = read_state(path, model)
        try:
            options: dict[str, Any] = saved["options"]
            policy = None if options["policy"] is None else make_policy(*options["policy"])
            rest = {name: options[name] for name in ("system", "chunk", "surprisal", "seed")}
            memories = recalled(options["memories"], recall)
            session = cls(model, policy=policy, memories=memories, learners=learners, **rest)
            session._tape = Tape.restored(model, tensors, saved["tape"])
            learned = {k.removeprefix(_LEARNER): t for k, t in tensors.items() if k.startswith(_LEARNER)}
            if learned:
                if learners is None:
                    raise StateError("the session learned what it read: restore it by llm.restore()")
                session._learner = learners().restored(learned, lasting(memories))
            session._tape.use(lasting(session.memories))
        except UnknownNameError:
            raise
        except KeyError as error:
            raise StateError(
                f"{path} is not complete: {error} is missing; restore an earlier copy"
            ) from error
        return session

    @property
    def memories(self) -> Memories | Router | None:
        """What the model knows by heart now, begun with or learned since; or what chooses it."""
        return self._memories if self._learner is None else self._learner.memories

    @property
    def stats(self) -> Stats:
        """The session's accounts."""
        return self._tape.stats()

    @property
    def policy(self) -> Policy:
        """The policy this stream follows, its defaults filled in, its sinks raised by :meth:`pin`."""
        policy: Policy = self._tape.driver.cache.policy
        return policy

    def __repr__(self) -> str:
        return f"Session({self.model.name!r}, {self.policy!r}, tokens={self._tape.driver.tokens})"
