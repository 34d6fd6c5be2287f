"""Names that occur nowhere else, assembled from syllables."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

_ONSETS = (*"BDFGHKLMNPRSTVZ", "Br", "Dr", "Kr", "Tr")
_MIDDLES = (
    *("ov", "el", "ir", "un", "ald", "ess", "orv", "int", "ulk", "eb", "ask", "idr", "omb", "yl", "ur"),
    *("agr", "elm", "ost", "avr", "enz"),
)
_ENDS = {
    "person": ("ia", "ek", "ano", "una", "is", "ula", "eth", "orn", "iva", "um", "ika", "elo"),
    "town": ("heim", "stad", "grad", "polis", "mere", "holt", "wick", "fell", "dorp", "gard"),
    "label": ("ex", "op", "uz", "ak", "im", "ob"),
}
_TAKEN = ("Delim", "Nostop", "Selop")  # words of Python's own sources
_RESERVED = 8  # one name of so many is for examples, so that examples never tell an answer


def invented_names(
    draw: random.Random, kind: Literal["person", "town", "label"], *, for_examples: bool = False
) -> Iterator[str]:
    """Yield all names of a kind in a random order, none twice, and neighbours with different beginnings.

    Parameters
    ----------
    draw : random.Random
        Decides on the order.
    kind : {"person", "town", "label"}
        What they should sound like; a few thousand people and towns.
    for_examples : bool
        Whether to yield those names that are yielded for nothing else.
    """
    columns = []
    for onset in draw.sample(_ONSETS, len(_ONSETS)):
        every = [onset + middle + end for middle in _MIDDLES for end in _ENDS[kind]]
        chosen = [name for i, name in enumerate(every) if (i % _RESERVED == 0) == for_examples]
        columns.append(draw.sample(chosen, len(chosen)))
    for row in zip(*columns, strict=True):
        yield from (name for name in row if name not in _TAKEN)
