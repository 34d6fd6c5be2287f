"""Opens a model and a session from a command's options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everlong.cli.options import parse_settings, use_threads
from everlong.cli.terminal import pull_progress

if TYPE_CHECKING:
    from everlong.llm import LLM
    from everlong.reading.session import Session


@contextmanager
def open_llm(
    model: str,
    attention: str,
    settings: list[str] | None,
    device: str | None,
    dtype: str | None,
    revision: str | None,
    threads: int | None,
    quiet: bool,
) -> Iterator[LLM]:
    """Load a model under the named policy; it is closed at the end."""
    use_threads(threads)
    from everlong.attention import make_policy
    from everlong.llm import load

    policy = make_policy(attention, parse_settings(settings))
    with pull_progress(quiet=quiet) as progress:
        llm = load(model, policy, device=device, dtype=dtype, revision=revision, progress=progress)
    with llm:
        yield llm


def open_session(llm: LLM, system: str | None, state: Path | None, *, surprisal: bool = False) -> Session:
    """Restore the session in `state` if there is one, else begin one with `system` pinned."""
    if state is not None and state.exists():
        return llm.restore(state)
    session = llm.session(surprisal=surprisal)
    if system is not None:
        session.pin(system)
    return session


def account(session: Session) -> dict[str, Any]:
    """Return the session's statistics for JSON."""
    return dataclasses.asdict(session.stats)
