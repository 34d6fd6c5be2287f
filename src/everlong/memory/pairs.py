"""The transfer set: queries, and the responses that only the text made possible.

A memory is learned from pairs and kept beside them (``pairs.jsonl``, one a line), to be learned anew,
audited, or rehearsed when the next segment comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from everlong.errors import InputError


@dataclass(frozen=True)
class Pair:
    """What a model may be asked about a segment, and what it answers reading it.

    Attributes
    ----------
    query : str
        The prompt, as the student sees it; empty: the response is a text by itself.
    response : str
        What follows the query.
    generator : str
        What made the pair: the registered name of a generator.
    segment : int
        Number of the segment it is about, from 0 on.
    sentences : tuple of int
        Numbers of the segment's sentences that it covers.
    gain : float or None
        Mean log-likelihood of the response's tokens with the segment, minus that without, in nats; None: not
        measured.
    """

    query: str
    response: str
    generator: str
    segment: int = 0
    sentences: tuple[int, ...] = ()
    gain: float | None = None

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Pair:
        """Return the pair whose values, as JSON keeps them, these are."""
        return cls(**{**values, "sentences": tuple(values["sentences"])})


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Write pairs to a file, one JSON object a line."""
    lines = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs]
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_pairs(path: str | Path) -> Iterator[Pair]:
    """Yield the pairs of a file that :func:`write_pairs` wrote.

    Raises
    ------
    InputError
        A line is not a pair.
    """
    names = {field.name for field in fields(Pair)}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                unknown = set(values) - names
                if unknown:
                    raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
                yield Pair.restored(values)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}, line {number}: not a pair of query and response: {error}"
                ) from error
