"""What a loaded model answers about sources that it reads for the question."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from everlong.errors import ConfigurationError
from everlong.reading.attached import AttachedModel
from everlong.reading.outside import ReadingMethod, Task, make_reading_method
from everlong.reading.reports import Generation, Progress
from everlong.reading.sampling import GREEDY, Sampling
from everlong.reading.source import Source
from everlong.reading.writing import drained


class Answering:
    """The part of a loaded model that reads for a question."""

    _attached: AttachedModel

    def ask(
        self,
        source: Source | Sequence[Any],
        question: str,
        method: ReadingMethod | str = "infini-retri",
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Generation:
        """Read a text of any length for one question, and answer it.

        Parameters
        ----------
        source : str, Path, open file, iterable of str, ids, or a list of paths and open files
            As of ``Session.read``; several are read one behind the other.
        question : str
            The question.
        method : ReadingMethod or str
            How it reads, such as ``InfiniRetri(chunk=2048)``, or its registered name.
        system : str, optional
            Text that the conversation begins with.
        max_new_tokens, sampling, stop, speculate
            As of ``Session.ask``.
        progress : callable, optional
            Called now and then while reading.

        Returns
        -------
        Generation
            Its stats are of all that was read.

        Raises
        ------
        InputError
            What cannot be read, nothing at all, or no question.
        ConfigurationError
            The method is unknown, is an attention policy, or does not fit into the training length.
        UnsupportedModelError, UnsupportedUseError
            The method cannot drive this model.
        """
        return drained(
            self.stream_answer(
                source,
                question,
                method,
                system=system,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop,
                speculate=speculate,
                progress=progress,
            )
        )

    def stream_answer(
        self,
        source: Source | Sequence[Any],
        question: str,
        method: ReadingMethod | str = "infini-retri",
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        speculate: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Generator[str, None, Generation]:
        """Answer a question as :meth:`ask` does, and yield the text as it comes."""
        if isinstance(method, str):
            method = make_reading_method(method)
        if not isinstance(method, ReadingMethod):
            raise ConfigurationError(
                f"method={method!r} is neither a reading method, such as InfiniRetri(), nor the name of one; "
                "an attention policy is for sessions: llm.session(policy)"
            )
        several = isinstance(source, (list, tuple)) and bool(source) and all(map(_is_file, source))
        sources: Any = source if several else [source]
        task = Task(
            self._attached, sources, question, system, max_new_tokens, sampling, stop, speculate, progress
        )
        return method.answer(task)


def _is_file(source: Any) -> bool:
    return isinstance(source, Path) or callable(getattr(source, "read", None))
