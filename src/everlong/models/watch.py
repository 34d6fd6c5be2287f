"""Tells whether a model still computes what it computed when a step of it was recorded.

A recording reads the weights from where they lay and runs no Python. So whatever may make the next forward
another one is looked at before a recording is used: the modules, where their tensors lie, their hooks and
forwards, and what adapters keep in plain attributes, such as which of them is active.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain, count
from operator import is_, itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from everlong.models.packing import PackedLinear, packing_state

_HOLDERS = itemgetter("_parameters", "_buffers", "_modules")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
_PACKED = itemgetter("_everlong_product", "_everlong_most")
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
_KNOWN = ("torch", "transformers", "everlong")
"""Packages whose modules compute the same, whatever becomes of plain attributes and of parts they lack."""
_CONTAINERS = nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict
"""Except for these, which may be filled later."""
_PLAIN = (bool, int, float, str, type(None))
_OF_ALL = frozenset(vars(nn.Module()))
_ALWAYS_ALIKE = frozenset(
    (nn.Linear, PackedLinear, nn.Embedding, nn.LayerNorm, nn.SiLU, nn.GELU, nn.ModuleList)
)
"""Modules that do the same in training."""
_is_training = itemgetter("training")
_forward = methodcaller("get", "forward")


_numbers = count()
"""Of all watches, so that a later one of the same model never says what an earlier one said."""


class ModelWatch:
    """Watches one model.

    Parameters
    ----------
    model : nn.Module
        The model.
    is_own : callable
        Whether a hook is one that a recorded step may leave out.
    """

    def __init__(self, model: nn.Module, is_own: Callable[[Any], bool]) -> None:
        self._model = model
        self._is_own = is_own
        self._number = next(_numbers)
        self._snapshot: _Snapshot | None = None

    def state(self, *, lying_still: bool = True) -> int | None:
        """Return a number that is another one whenever the model has changed; None: it cannot be recorded.

        That is so with foreign hooks, in training, and where weights lie on several devices or elsewhere.

        Parameters
        ----------
        lying_still : bool
            Whether a tensor that lies elsewhere than before is a change.
        """
        if self._snapshot is None or not self._snapshot.holds(lying_still):
            self._snapshot = _Snapshot(self._model, self._is_own)
            self._number = next(_numbers)
        return self._number if self._snapshot.can_be_recorded else None

    @property
    def rounds(self) -> bool:
        """Whether layers multiply with packed weights, whose kernels round what they are given."""
        return any(type(module) is PackedLinear for module in self._model.modules())

    def glance(self) -> tuple[int, int, bool]:
        """Return what changes, among much else, when Everlong or PyTorch changes what a model computes.

        It takes no time, and tells next to nothing of what other code does to the model.
        """
        return packing_state(), RemovableHandle.next_id, self._model.training


class _Snapshot:
    """What a model looks like at one moment."""

    def __init__(self, model: nn.Module, is_own: Callable[[Any], bool]) -> None:
        self._modules = list(model.modules())
        self._classes = list(map(type, self._modules))
        self._attributes = list(map(vars, self._modules))
        self._sizes = list(map(len, self._attributes))
        self._replaced = [attributes for attributes in self._attributes if "forward" in attributes]
        self._forwards = list(map(_forward, self._replaced))
        foreign = [vars(module) for module in self._modules if not _is_known(module)]
        self._switches = [_switches(attributes) for attributes in foreign]
        self._holders = list(filter(None, chain.from_iterable(map(_HOLDERS, self._attributes))))
        growing = [vars(module) for module in self._modules if isinstance(module, _CONTAINERS)]
        holders = chain.from_iterable(map(_HOLDERS, [*foreign, *growing]))
        self._empty = [holder for holder in holders if not holder]
        self._held = list(self._all_held())
        self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._handles = RemovableHandle.next_id
        self._hooks = [*chain.from_iterable(map(_HOOKS, self._attributes)), *_GLOBAL_HOOKS]
        self._hooked = list(filter(None, self._hooks))
        hooks = [hook for those in self._hooked for hook in those.values()]
        self._hook_count = len(hooks)
        self._packable = [vars(module) for module in self._modules if type(module) is PackedLinear]
        self._packing_state = packing_state()
        self._packed = self._packed_weights()
        self._trainable = [
            vars(module)
            for module in self._modules
            if type(module) not in _ALWAYS_ALIKE or "forward" in vars(module)
        ]
        self._training = self._training_flags()
        self._addresses = self._tensor_addresses()
        self.can_be_recorded = (
            all(map(is_own, hooks))
            and not model.training
            and self._addresses is not None
            and len({tensor.device for tensor in self._tensors}) == 1
            and not any("_hf_hook" in attributes for attributes in self._attributes)
        )

    def holds(self, lying_still: bool) -> bool:
        """Whether the model still looks like this. Runs before every step that is repeated."""
        return (
            not any(self._empty)
            and self._has_its_hooks()
            and sum(map(len, self._holders)) == len(self._held)
            and all(map(is_, self._all_held(), self._held))
            and (not lying_still or self._tensor_addresses() == self._addresses)
            and _are_the_same(map(type, self._modules), self._classes)
            and self._has_its_forwards()
            and self._is_packed_alike()
            and self._training_flags() == self._training
            and all(look(attributes) == values for look, attributes, values in self._switches)
        )

    def _all_held(self) -> Iterable[Any]:
        """All modules, parameters and buffers."""
        return chain.from_iterable(map(dict.values, self._holders))

    def _tensor_addresses(self) -> list[int] | None:
        """Return where the tensors lie; None: some lie nowhere, being of a kind of their own."""
        try:
            return [tensor.data_ptr() for tensor in self._tensors]
        except RuntimeError:
            return None

    def _has_its_forwards(self) -> bool:
        """Whether no module was given another forward: all are looked at if any has got an attribute."""
        sizes = list(map(len, self._attributes))
        if sizes != self._sizes:
            if sum("forward" in attributes for attributes in self._attributes) != len(self._replaced):
                return False
            self._sizes = sizes
        return _are_the_same(map(_forward, self._replaced), self._forwards)

    def _has_its_hooks(self) -> bool:
        """Whether there are as many hooks as there were: counted if any has been added to any module."""
        latest = RemovableHandle.next_id  # read once: another thread may add to it
        if latest != self._handles:
            if sum(map(len, self._hooks)) != self._hook_count:
                return False
            self._handles = latest
        return sum(map(len, self._hooked)) == self._hook_count

    def _is_packed_alike(self) -> bool:
        """Whether packed layers multiply with the same: all are looked at if any has been packed."""
        latest = packing_state()
        if latest != self._packing_state:
            if not _are_the_same(self._packed_weights(), self._packed):
                return False
            self._packing_state = latest
        return True

    def _packed_weights(self) -> list[Any]:
        """Return what packed layers multiply few rows with, and up to how many."""
        return list(chain.from_iterable(map(_PACKED, self._packable)))

    def _training_flags(self) -> list[bool]:
        return list(map(_is_training, self._trainable))


def _are_the_same(ours: Iterable[Any], theirs: list[Any]) -> bool:
    """Whether both hold the very same objects."""
    return len(ours := list(ours)) == len(theirs) and all(map(is_, ours, theirs))


def _switches(attributes: dict[str, Any]) -> tuple[Callable[[Any], list[Any]], dict[str, Any], list[Any]]:
    """Return a module's plain attributes as they are: how to look at them, where, and what is found."""
    names = [name for name, value in attributes.items() if name not in _OF_ALL and _is_plain(value)]

    def look(attributes: dict[str, Any]) -> list[Any]:
        return [attributes.get(name) for name in names]

    return look, attributes, copy.deepcopy(look(attributes))


def _is_known(module: nn.Module) -> bool:
    """Whether what a module computes is known not to depend on plain attributes."""
    return type(module).__module__.split(".")[0] in _KNOWN


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(x, _PLAIN) for x in chain(value, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(isinstance(x, _PLAIN) for x in value)
    return isinstance(value, _PLAIN)
