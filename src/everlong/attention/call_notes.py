"""Makes what a step was seen to call as short as it can be: nothing in vain, in little memory.

Each of a thousand small calls waits most of its time for what it is about: the call's own objects, and
numbers that lie elsewhere in every layer. So what only the next call reads is handed on to it; outputs that
are not needed at the same time lie in the same memory; and what is the same in all layers is one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from everlong.kernels.calls import KernelFunction

Call = Callable[[], Any]

_holders_of: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


@dataclass(frozen=True, eq=False)
class Note:
    """One call.

    Attributes
    ----------
    call : partial
        Repeats it; returns what is to be copied into `copied`. All tensors are among its arguments.
    read : set of int
        The storages it was given.
    written : set of int
        The storages it writes to.
    copied : dict of int to Tensor
        What its outputs are copied into, by their numbers; empty: it writes by itself.
    is_single : bool
        Whether its output is a tensor, not a tuple or list of them.
    """

    call: partial[Any]
    read: set[int]
    written: set[int]
    copied: dict[int, Tensor]
    is_single: bool

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors that it holds."""
        return tensors_in((self.call.args, *self.call.keywords.values(), *self.copied.values()))

    def with_tensors(self, by: Callable[[Tensor], Tensor]) -> Note:
        """Return the same with other tensors, each found by the one that it stands for."""
        function, arguments, named = self.call.func, self.call.args, self.call.keywords
        call = partial(function, *mapped(arguments, by), **mapped(named, by))
        return replace(self, call=call, copied=mapped(self.copied, by))

    def storing(self) -> Call:
        """Return what repeats the call and keeps its outputs."""
        if not self.copied:
            return self.call
        call, ((number, into), *others) = self.call, self.copied.items()
        if self.is_single:
            return lambda: into.copy_(call())
        if not others:
            return lambda: into.copy_(call()[number])

        def repeat() -> None:
            outputs = call()
            for number, into in self.copied.items():
                into.copy_(outputs[number])

        return repeat

    def giving(self, like: Tensor) -> Call:
        """Return what repeats the call and returns the one output that is wanted, in the shape of `like`."""
        call, number, shape = self.call, next(iter(self.copied)), like.shape
        if self.copied[number].shape != shape:
            return lambda: _of(call(), number).view(shape)
        return call if self.is_single else lambda: call()[number]


def _of(output: Any, number: int) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[number]
    return found


def shortest(notes: list[Note], made: dict[int, Tensor], result: Tensor) -> list[Call]:
    """Return what repeats the calls that a result, and what was there before, depend on.

    Parameters
    ----------
    notes : list of Note
        All calls, in their order. What they made lies elsewhere afterwards.
    made : dict of int to Tensor
        The tensors that were made, by their storages: whatever else was written to was there before.
    result : Tensor
        The result, which stays where it is.
    """
    held: dict[int, dict[int, Tensor]] = {}
    for tensor in chain(made.values(), *(note.tensors for note in notes)):
        held.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
    inner = {
        key: list(held[key].values())
        for key in made
        if key != storage_of(result) and not _is_held_elsewhere(key, len(held[key]))
    }
    notes = _needed(notes, made, result)
    handed_on = _handed_on(notes, inner)
    _share_memory(notes, inner)
    one_of_all = _one_of_all(chain.from_iterable(inner.values()))
    return _joined([note.with_tensors(one_of_all) for note in notes], handed_on)


def _is_held_elsewhere(storage: int, tensors: int) -> bool:
    """Whether more than so many tensors, and the object by which Python knows it, hold on to a storage."""
    return _holders_of is None or _holders_of(storage) > tensors + 1


def _needed(notes: list[Note], made: dict[int, Tensor], result: Tensor) -> list[Note]:
    """Return the calls on which a result, or something that was there before, depends."""
    needed, kept = {storage_of(result)}, []
    for note in reversed(notes):
        if any(storage in needed or storage not in made for storage in note.written):
            wanted = {number: into for number, into in note.copied.items() if storage_of(into) in needed}
            kept.append(replace(note, copied=wanted))
            needed |= note.read
    return kept[::-1]


def _handed_on(notes: list[Note], inner: Iterable[int]) -> dict[int, int]:
    """Return whose outputs, of `inner` storages, the next call alone reads, and as which argument."""
    readers: dict[int, list[int]] = {storage: [] for storage in inner}
    for number, note in enumerate(notes):
        for storage in note.read & readers.keys():
            readers[storage].append(number)
    places: dict[int, int] = {}
    for number, (note, then) in enumerate(pairwise(notes)):
        if len(note.copied) != 1 or then.copied:
            continue
        (output,) = note.copied.values()
        storage = storage_of(output)
        if readers.get(storage) != [number + 1] or storage in then.written:
            continue
        given = [tensor for tensor in then.tensors if storage_of(tensor) == storage]
        where = [place for place, x in enumerate(then.call.args) if x is given[0]]
        if len(given) == len(where) == 1 and _is_whole(given[0], output):
            places[number] = where[0]
    return places


def _is_whole(view: Tensor, output: Tensor) -> bool:
    """Whether `view` is all of `output`, in the same order: it may have another shape."""
    if _lies(view) == _lies(output):
        return True
    in_order = view.is_contiguous() and output.is_contiguous() and view.numel() == output.numel()
    return in_order and _is_read(view) == _is_read(output)


def _share_memory(notes: list[Note], inner: dict[int, list[Tensor]]) -> None:
    """Let outputs that are not needed at the same time lie in the same memory.

    Parameters
    ----------
    notes : list of Note
        The calls.
    inner : dict of int to list of Tensor
        All tensors that lie in each storage.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, note in enumerate(notes):
        for storage in (note.read | note.written) & inner.keys():
            first.setdefault(storage, number)
            last[storage] = number
    places: list[torch.UntypedStorage] = []
    free_after: dict[int, int] = {}  # a place's latest user's last call
    for storage, begin in first.items():
        own = inner[storage][0].untyped_storage()
        for number, place in enumerate(places):
            if (place.device, place.nbytes()) == (own.device, own.nbytes()) and free_after[number] < begin:
                for tensor in inner[storage]:
                    tensor.set_(place, tensor.storage_offset(), tensor.size(), tensor.stride())
                break
        else:
            number = len(places)
            places.append(own)
        free_after[number] = last[storage]


def _one_of_all(tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what finds, for one of `tensors`, the first that is the same view of the same memory."""
    names: dict[int, Tensor] = {}
    known: dict[Any, Tensor] = {}
    for tensor in tensors:
        names[id(tensor)] = known.setdefault((storage_of(tensor), *_lies(tensor)), tensor)
    return lambda tensor: names.get(id(tensor), tensor)


def _joined(notes: list[Note], handed_on: dict[int, int]) -> list[Call]:
    """Return what repeats the calls: those that are the same by the same object."""
    known: dict[Any, Call] = {}
    calls: list[Call] = []
    for number, note in enumerate(notes):
        if number - 1 in handed_on:
            place = handed_on[number - 1]
            calls.append(_given(note.call, place, notes[number - 1].giving(note.call.args[place])))
        elif note.copied and number not in handed_on:
            calls.append(note.storing())
        elif not note.copied:
            key = _described(note.call)
            if key not in known:
                known[key] = _by_itself(note.call)
            calls.append(known[key])
    return calls


def _by_itself(call: partial[Any]) -> Call:
    """Return what repeats a call of a kernel: what lies between is left out."""
    function = call.func
    if not isinstance(function, KernelFunction):
        return call
    return function.repeated(*call.args, **call.keywords)


def _given(call: partial[Any], place: int, made: Call) -> Call:
    """Return a call that is given what another makes in the place of one of its arguments."""
    function, before, after, named = call.func, call.args[:place], call.args[place + 1 :], call.keywords
    if isinstance(function, KernelFunction):
        return function.repeated_of(made, place, *call.args, **named)
    if not (after or named):
        return lambda: function(*before, made())
    return lambda: function(*before, made(), *after, **named)


def _described(value: Any) -> Any:
    """Return what two calls have in common that are the same."""
    if isinstance(value, partial):
        return _described((value.func, value.args, *value.keywords.items()))
    if isinstance(value, (tuple, list)):
        return type(value), *map(_described, value)
    return id(value) if isinstance(value, Tensor) or callable(value) else (type(value), repr(value))


def mapped(values: Any, by: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with other tensors, those in sequences and dictionaries too."""
    if isinstance(values, Tensor):
        return by(values)
    if isinstance(values, dict):
        return {name: mapped(value, by) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return (list if isinstance(values, list) else tuple)(mapped(value, by) for value in values)
    return values


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or outputs, those in sequences too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)


def storage_of(tensor: Tensor) -> int:
    """Return what two tensors that share memory have in common."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    """Return how a tensor lies in its memory, and is to be understood."""
    return tensor.shape, tensor.stride(), *_is_read(tensor)


def _is_read(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor begins in its memory, and how its numbers are to be understood."""
    return tensor.storage_offset(), tensor.dtype, tensor.is_conj(), tensor.is_neg()
