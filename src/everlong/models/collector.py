"""Python's garbage collector, kept from looking through what cannot be garbage.

PyTorch and transformers make a million objects while they are imported, and the collector goes through them
again and again as they come: a quarter of the time until a model is ready. Nothing here outlasts its block;
once, some time later, the collector looks through everything.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing while much is made that stays, as by imports; afterwards it counts as looked through.

    Does nothing where the collector is off already, or somebody has frozen objects of their own.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _settle()
        gc.enable()


@contextmanager
def old_objects_left_out() -> Iterator[None]:
    """Collect only what is made in this block, where garbage may hold weights; the rest comes back after it.

    Does nothing where somebody has frozen objects of their own.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _settle() -> None:
    """Move all objects to the oldest generation, without looking at one."""
    gc.freeze()
    gc.unfreeze()
