"""The façade: a model that reads and writes without end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlong.attention import Attachment, Policy, Recall, Tier, attach, make_policy
from everlong.errors import ConfigurationError
from everlong.models.collector import old_objects_left_out
from everlong.models.loading import load_model
from everlong.models.packing import Weights, choose_weights, pack
from everlong.reading.answering import Answering
from everlong.reading.attached import AttachedModel
from everlong.reading.memories import Memories, Router
from everlong.reading.passing import Learners
from everlong.reading.reports import Generation
from everlong.reading.sampling import GREEDY, Sampling
from everlong.reading.session import Session
from everlong.reading.source import Source
from everlong.reading.together import stream_together
from everlong.reading.writing import drained

if TYPE_CHECKING:
    from everlong.memory.folder import Memory
    from everlong.memory.progress import LearnProgress
    from everlong.memory.recipes import Recipe
    from everlong.memory.store import MemoryStore


class LLM(Answering):
    """A loaded model that follows an attention policy; what :func:`load` returns. A context manager.

    Attributes
    ----------
    model : PreTrainedModel
        The model, attached until :meth:`close`.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    name : str
        What it was asked for by.
    handle : Attachment
        The attachment: its resolved policy, its training length, new caches.
    weights : {"float", "int8", "int4"}
        How forwards of a few rows, as in writing, read the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        attention: Policy,
        weights: Weights = "float",
        tier: Tier | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        with ExitStack() as stack:
            self.weights = choose_weights(model, weights)
            if self.weights != "float":
                stack.callback(pack(model, self.weights).undo)
            self.handle: Attachment = stack.enter_context(attach(model, attention, tier=tier))
            self._attached = AttachedModel(self.handle, tokenizer, name, self.weights)
            self._closing = stack.pop_all()

    @property
    def attention(self) -> Policy:
        """The policy that sessions follow, its defaults filled in for this model."""
        policy: Policy = self.handle.policy
        return policy

    def session(
        self,
        attention: Policy | str | None = None,
        *,
        system: str | None = None,
        chunk: int = 512,
        surprisal: bool = False,
        seed: int | None = None,
        memories: str | Sequence[str | Memory] = (),
        memory_weights: Sequence[float] | None = None,
        store: MemoryStore | None = None,
    ) -> Session:
        """Begin a stream of text.

        Parameters
        ----------
        attention : Policy or str, optional
            A policy for this session alone, or its registered name.
        system : str, optional
            Text that the conversation begins with.
        chunk : int
            Tokens run at a time while reading.
        surprisal : bool
            Whether to compute the surprisal of each token, for perplexity.
        seed : int, optional
            Of the random draws.
        memories : sequence of str or Memory, or "auto"
            What the model knows by heart in this session: names in the store, see :meth:`memorize`. "auto":
            for each answer the memory of this model that is most like the question, or none; a sequence that
            begins with "auto" names those to choose from. See :mod:`everlong.memory.routing`.
        memory_weights : sequence of float, optional
            By how much each counts; 1 by default.
        store : MemoryStore, optional
            Where names are looked up, and what is learned in passing is kept; by default that of
            ``EVERLONG_HOME``.

        Raises
        ------
        ConfigurationError
            A memory is unknown, or of another base model.
        """
        policy = None if attention is None else _policy(attention)
        known = None
        if memories or isinstance(memories, str):
            known = self._recall(store, memories, memory_weights)
        return Session(
            self._attached,
            policy=policy,
            system=system,
            chunk=chunk,
            surprisal=surprisal,
            seed=seed,
            memories=known,
            learners=partial(self._learners, store),
        )

    def memorize(
        self,
        source: Source,
        name: str,
        recipe: Recipe | str = "infinite-icl",
        *,
        seed: int = 0,
        replace: bool = False,
        force: bool = False,
        teacher: LLM | None = None,
        store: MemoryStore | None = None,
        progress: Callable[[LearnProgress], None] | None = None,
        **settings: Any,
    ) -> Memory:
        """Turn a text into a memory: a LoRA adapter, with which the model answers without the text.

        Interrupted, it goes on from the last whole segment when called again with the same text and settings.
        Sessions must not run meanwhile.

        Parameters
        ----------
        source : str, Path, open file or iterable of str
            The text.
        name : str
            What the memory is called.
        recipe : Recipe or str
            How it is learned; see :mod:`everlong.memory.recipes`.
        seed : int
            Of what is drawn; the same on the same machine gives the same adapter.
        replace : bool
            Whether a memory of that name may be replaced.
        force : bool
            Whether to go on where the text is worth nothing to the model.
        teacher : LLM, optional
            A larger model, which asks and answers instead; with the same tokens it gives soft labels too.
        store : MemoryStore, optional
            Where it is kept, by default that of ``EVERLONG_HOME``.
        progress : callable, optional
            Called now and then.
        **settings
            Changes to the recipe, such as ``passes=4``.

        Raises
        ------
        MemoryGateError
            Reading the text does not help the model: the message says what would.
        InputError
            There is nothing to learn in the text.
        ConfigurationError
            The name is taken, or a setting cannot work.
        """
        from everlong.memory.memorize import memorize
        from everlong.memory.recipes import make_recipe
        from everlong.memory.store import MemoryStore

        self._attached.require_attached()
        return memorize(
            self._attached,
            source,
            name,
            store=store or MemoryStore(),
            recipe=make_recipe(recipe, **settings),
            recipe_name=recipe if isinstance(recipe, str) else "custom",
            seed=seed,
            replace_existing=replace,
            teacher=None if teacher is None else teacher._attached,
            force=force,
            on_progress=progress,
        )

    def _recall(
        self,
        store: MemoryStore | None,
        memories: str | Sequence[str | Memory],
        weights: Sequence[float] | None,
    ) -> Memories | Router:
        from everlong.memory.routing import known_memories
        from everlong.memory.store import MemoryStore

        return known_memories(self._attached, memories, weights, store or MemoryStore())

    def _learners(self, store: MemoryStore | None) -> Learners:
        from everlong.memory.passing import PassingLearners
        from everlong.memory.store import MemoryStore

        return PassingLearners(self._attached, store or MemoryStore())

    def stream_together(
        self,
        sessions: Sequence[Session],
        max_new_tokens: int = 256,
        *,
        questions: Sequence[str] | None = None,
        keep: bool = False,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> Generator[tuple[int, str], None, list[Generation]]:
        """Let several sessions write at the same time, and yield their texts as they come.

        A step reads the model's weights once for all of them. What each writes is what it would write alone.

        Parameters
        ----------
        sessions : sequence of Session
            Of this model, whatever the length and the memories of each. With `questions` a session may stand
            several times.
        max_new_tokens : int
            Tokens that each writes at most.
        questions : sequence of str, optional
            As many as sessions, to be answered as :meth:`Session.ask` does; without them, the sessions go on
            as :meth:`Session.generate` does.
        keep : bool
            Whether questions and answers stay in the streams.
        sampling : Sampling or sequence of Sampling
            How tokens are chosen, for all or for each.
        stop : str or sequence of str
            Texts at which each stops.

        Returns
        -------
        generator of (int, str)
            The number of a session and a piece of its text; its return value is a list of all
            :class:`Generation`.

        Raises
        ------
        InputError
            No session, one of another model, one twice, or another number of questions.
        """
        return stream_together(
            self._attached,
            sessions,
            max_new_tokens,
            questions=questions,
            keep=keep,
            sampling=sampling,
            stop=stop,
        )

    def generate_together(
        self,
        sessions: Sequence[Session],
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> list[Generation]:
        """Let several sessions write, and return what each wrote; see :meth:`stream_together`."""
        return drained(self.stream_together(sessions, max_new_tokens, sampling=sampling, stop=stop))

    def ask_together(
        self,
        sessions: Sequence[Session],
        questions: Sequence[str],
        *,
        keep: bool = False,
        max_new_tokens: int = 256,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> list[Generation]:
        """Ask each session its question, and return all answers; see :meth:`stream_together`."""
        return drained(
            self.stream_together(
                sessions, max_new_tokens, questions=questions, keep=keep, sampling=sampling, stop=stop
            )
        )

    def restore(self, path: str | Path, *, store: MemoryStore | None = None) -> Session:
        """Go on with a session that was saved to `path` by ``session.save(path)``.

        The memories it was begun with, if any, are looked up in `store`; with "auto" they are those that are
        there now. What it learned while reading is in its file, and goes on in `store`.

        Raises
        ------
        InputError
            The file is missing, cut short, or something else.
        StateError
            It is of other weights, another tokenizer, or another format.
        """
        return Session.restore(
            self._attached, path, partial(self._recall, store), partial(self._learners, store)
        )

    def close(self) -> None:
        """Give the model back exactly as it was; its sessions end. A second call does nothing."""
        self._closing.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.name!r}, {self.attention!r}, weights={self.weights!r})"


def load(
    source: str | Path | PreTrainedModel,
    attention: Policy | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    weights: Weights = "auto",
    tier: Tier | str | Path = "ram",
    **loading: Any,
) -> LLM:
    """Load a model and attach it to a policy.

    Parameters
    ----------
    source : str, Path or PreTrainedModel
        A catalogue name, a folder, a ``.gguf`` file, a hub id, or a loaded model.
    attention : Policy or str, optional
        A policy or its registered name; ``Recall()`` by default, which (with ``weights="float"``) equals the
        stock model up to its training length, and then brings back what is asked for. ``"lm-infinite"``
        forgets it instead: writing is faster, and what a stream holds does not grow.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed with a loaded model.
    device, dtype, revision, **loading
        See :func:`everlong.models.loading.load_model`.
    weights : {"auto", "float", "int8", "int4"}
        How forwards of a few rows, as in writing, read the weights; reading uses the float weights anyway.
        See :func:`everlong.models.packing.choose_weights` for "auto".
    tier : Tier, "ram", "disk" or a folder
        Where what leaves the window goes, with policies that keep it.

    Raises
    ------
    EverlongError
        See :func:`~everlong.models.loading.load_model` and :func:`~everlong.attention.attach`.
    """
    policy = Recall() if attention is None else _policy(attention)
    tier = Tier.of(tier)
    with old_objects_left_out():
        loaded = load_model(
            source, tokenizer=tokenizer, device=device, dtype=dtype, revision=revision, **loading
        )
        return LLM(loaded.model, loaded.tokenizer, loaded.name, policy, weights, tier)


def _policy(attention: Policy | str) -> Policy:
    if isinstance(attention, Policy):
        return attention
    if isinstance(attention, str):
        return make_policy(attention)
    raise ConfigurationError(
        f"attention={attention!r} is neither a policy, such as Recall(window=2048), nor the name of one; "
        "a reading method is for llm.ask(source, question, method)"
    )
