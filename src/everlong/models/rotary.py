"""Rotary position embeddings, taken out of a model and applied again at positions of our choosing.

A model rotates queries and keys before its cache sees them. While a policy is attached the rotary
modules hand out cos = 1, sin = 0 (:class:`IdentityRotary`), so that raw queries and keys arrive, and
this module rotates them: with the model's own frequencies, scaling and layout, but with angles
computed in float64.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from everlong.errors import UnsupportedUseError
from everlong.kernels.direct import is_believed, turn, turns
from everlong.kernels.loading import is_recorded, wanted

Layout = Literal["halves", "interleaved"]
LAYOUTS: tuple[Layout, ...] = ("halves", "interleaved")

Positions = int | range | Tensor
"""One position for all tokens, a range (one each), or a tensor of shape (n,) or (batch, n)."""

_LEAST = 2**15  # numbers: what is smaller does without a compiler

_CHANGING_TYPES = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Angles per position of one rotary table.

    Attributes
    ----------
    inverse : Tensor
        Radians per position, float64 on the CPU, shape (rotated dimensions / 2,).
    scaling : float
        Factor on cos and sin (YaRN's attention scaling; 1 for most models).
    """

    inverse: Tensor
    scaling: float

    def same_as(self, other: Frequencies) -> bool:
        """Whether both rotate alike."""
        return self is other or (self.scaling == other.scaling and torch.equal(self.inverse, other.inverse))

    def angles(
        self, positions: Positions, layout: Layout, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return the cos and sin that :func:`rotate` takes; computed in float64, given as `dtype`.

        Both have shape (n, r) or (batch, 1, n, r), each angle twice, where `layout` has the two dimensions of
        its pair; the first of the two has its sin negated.
        """
        if isinstance(positions, int):
            at = torch.tensor([positions], dtype=torch.float64)
        elif isinstance(positions, range):
            at = torch.arange(positions.start, positions.stop, positions.step, dtype=torch.float64)
        else:
            at = positions.to("cpu", torch.float64)
        angle = at[..., None] * self.inverse
        if angle.dim() == 3:
            angle = angle[:, None]
        cos, sin = angle.cos() * self.scaling, angle.sin() * self.scaling
        if layout == "halves":
            tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        else:
            tables = torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)
        return tables[0].to(device, dtype), tables[1].to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Rotate the leading dimensions of `x` by the angles given as cos and sin.

    Parameters
    ----------
    x : Tensor
        Shape (batch, heads, n, d).
    cos, sin : Tensor
        From :meth:`Frequencies.angles`: shape (n or 1, r) or (batch, 1, n, r), r <= d, in the dtype to
        compute in; the last d - r dimensions stay.
    layout : {"halves", "interleaved"}
        Which dimensions form a pair: i and i + r/2, or 2i and 2i + 1.
    """
    if layout == "halves" and _pays(x, cos, sin):
        return turn(x, cos, sin)
    return _rotate(x, cos, sin, layout)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    width = cos.shape[-1]
    turning = (x if width == x.shape[-1] else x[..., :width]).to(cos.dtype)
    if layout == "halves":
        partners = torch.cat(turning.chunk(2, -1)[::-1], -1)
    else:
        partners = turning.reshape(*turning.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned = (turning * cos).addcmul_(partners, sin).to(x.dtype)
    if width == x.shape[-1]:
        return turned
    still = x[..., width:].expand(*turned.shape[:-1], -1)
    return torch.cat((turned, still), -1)


def _pays(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether there is a compiled kernel that rotates many tokens, and no gradient is wanted."""
    if x.shape[2] == 1 or x.numel() < _LEAST or is_recorded() or not wanted() or not turns(x, cos, sin):
        return False
    has_gradient = torch.is_grad_enabled() and any(y.requires_grad for y in (x, cos, sin))
    return not has_gradient and _is_right()


@functools.cache
def _is_right() -> bool:
    return is_believed(_gives_the_same, "rotate", "turning")


def _gives_the_same() -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 48, generator=generator, dtype=torch.float32, device="cpu").transpose(1, 2)
    for shape in ((5, 48), (1, 16), (2, 1, 5, 32)):
        cos, sin = (torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu") for _ in "cs")
        if not torch.allclose(turn(x, cos, sin), _rotate(x, cos, sin, "halves"), atol=1e-5, rtol=1e-5):
            return False
    return True


def fresh_copy(module: nn.Module) -> nn.Module:
    """Copy a rotary module, in the state it was built in: some change with the longest input seen."""
    fresh = _own_tables(module)
    if any(name in str(getattr(module, "rope_type", "")) for name in _CHANGING_TYPES):
        for name, table in list(fresh.named_buffers(recurse=False)):
            prefix = name.removesuffix("inv_freq")
            if f"{prefix}original_inv_freq" in vars(fresh) | fresh._buffers:
                original: Tensor = getattr(fresh, f"{prefix}original_inv_freq")
                fresh.register_buffer(name, original.to(table.device, copy=True), persistent=False)
        for name in [name for name in vars(fresh) if name.endswith("max_seq_len_cached")]:
            setattr(fresh, name, fresh.original_max_seq_len)
    return fresh


def _own_tables(module: nn.Module) -> nn.Module:
    """Copy a module and its buffers, without accelerate's hooks, which may hold all weights."""
    own = copy.copy(module)
    for name in ("forward", "_old_forward", "_hf_hook"):
        own.__dict__.pop(name, None)
    own._buffers = {k: None if b is None else b.detach().clone() for k, b in module._buffers.items()}
    return own


class Rotary:
    """One rotary table of a model: a rotary module, and the layer type where it has one table per type.

    Works on a copy of the module: asking for frequencies leaves no trace in the model.
    """

    def __init__(self, module: nn.Module, layer_type: str | None) -> None:
        self.layer_type = layer_type
        self._module = fresh_copy(module)
        self._prefix = "" if layer_type is None else f"{layer_type}_"
        kind: Any = getattr(module, "rope_type", "default")
        self.kind = str(kind.get(layer_type, "default") if isinstance(kind, dict) else kind)
        self._config: Any = getattr(module, "config", None)
        self._latest: tuple[int, Frequencies] | None = None
        self._scaled: dict[Any, Rotary] = {}

    def scaled(self, kind: str, parameters: dict[str, float], length: int | None = None) -> Rotary:
        """Return the table that transformers makes where the model's configuration names a scaling.

        Parameters
        ----------
        kind : str
            transformers' ``rope_type``: "linear", "dynamic", "yarn".
        parameters : dict of str to float
            Other entries of ``rope_parameters``.
        length : int, optional
            The length for which a table is made that changes with it; None: the input's.

        Raises
        ------
        UnsupportedUseError
            The model's positions are scaled already, or not made as transformers makes them.
        """
        key = kind, length, tuple(sorted(parameters.items()))
        if key not in self._scaled:
            self._scaled[key] = ScaledRotary(self, kind, length, parameters)
        return self._scaled[key]

    @property
    def changes(self) -> bool:
        """Whether the frequencies depend on the length of the input (dynamic NTK, longrope)."""
        return any(name in self.kind for name in _CHANGING_TYPES)

    def frequencies(self, length: int) -> Frequencies:
        """Return the frequencies the model itself uses for a fresh input of `length` tokens."""
        latest = self._latest
        if latest is not None and (latest[0] == length or not self.changes):
            return latest[1]
        found = self._read(self._adapted(length) if self.changes else self._module)
        if latest is not None and found.same_as(latest[1]):
            found = latest[1]
        self._latest = length, found
        return found

    def _adapted(self, length: int) -> nn.Module:
        """Let a copy of the module bring its table up to date by its own code."""
        module = _own_tables(self._module)
        table: Tensor = getattr(module, f"{self._prefix}inv_freq")
        last = torch.tensor([[max(length, 1) - 1]], device=table.device)
        extra = () if self.layer_type is None else (self.layer_type,)
        module(table.new_zeros(1), last, *extra)
        return module

    def _read(self, module: nn.Module) -> Frequencies:
        inverse: Tensor = getattr(module, f"{self._prefix}inv_freq")
        shared: Any = getattr(module, "attention_scaling", 1.0)
        scaling: Any = getattr(module, f"{self._prefix}attention_scaling", shared)
        return Frequencies(
            inverse.detach().to("cpu", torch.float64, copy=True), float(1.0 if scaling is None else scaling)
        )


class ScaledRotary(Rotary):
    """A model's table as transformers makes it under another configuration; see :meth:`Rotary.scaled`."""

    def __init__(self, rotary: Rotary, kind: str, length: int | None, parameters: dict[str, float]) -> None:
        if rotary.kind != "default":
            raise UnsupportedUseError(
                f"this model's positions are scaled by its configuration already ({rotary.kind}): "
                "use another policy, or load it without that scaling"
            )
        self.layer_type, self.kind = rotary.layer_type, kind
        self._model_config, self._length = rotary._config, length
        self._latest, self._scaled = None, {}
        plain, own = self._made("linear", {"factor": 1.0}, None), rotary.frequencies(1)
        if plain is None or plain.scaling != own.scaling or not _alike(plain.inverse, own.inverse):
            raise UnsupportedUseError(
                "this model's rotary table is not one that transformers' scaling starts from: "
                "use another policy"
            )
        trained = getattr(self._model_config, "original_max_position_embeddings", None)
        trained = trained or self._model_config.max_position_embeddings
        self._parameters = dict(parameters)
        if kind == "yarn":
            self._parameters["original_max_position_embeddings"] = trained

    @property
    def changes(self) -> bool:
        """Whether the frequencies depend on the length of the input."""
        return super().changes and self._length is None

    def frequencies(self, length: int) -> Frequencies:
        """Return the frequencies for a fresh input of `length` tokens."""
        latest = self._latest
        if latest is not None and (latest[0] == length or not self.changes):
            return latest[1]
        found = self._made(self.kind, self._parameters, length if self._length is None else self._length)
        assert found is not None
        if latest is not None and found.same_as(latest[1]):
            found = latest[1]
        self._latest = length, found
        return found

    def _made(self, kind: str, parameters: dict[str, float], length: int | None) -> Frequencies | None:
        """Return what transformers makes of the model's configuration with other RoPE parameters."""
        config = copy.deepcopy(self._model_config)
        tables = getattr(config, "rope_parameters", None)
        table = tables if self.layer_type is None or not tables else tables.get(self.layer_type)
        if not table or "rope_theta" not in table:
            return None
        table.update(parameters, rope_type=kind)
        extra = {} if self.layer_type is None else {"layer_type": self.layer_type}
        inverse, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length, **extra)
        return Frequencies(inverse.to(torch.float64), float(scaling))


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-5)


class IdentityRotary(nn.Module):
    """Stands in for a rotary module: cos = 1 and sin = 0, in the shape the original would return."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: its buffers are not this module's
        self.__dict__["_copy"] = fresh_copy(original)  # calling the original could change its table
        self._widths: dict[Any, int] = {}
        self.training = original.training

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of ones and zeros, shape (1, n, r) with the r of the original."""
        key = (args, tuple(sorted(kwargs.items())))
        width = self._widths.get(key)
        if width is None:
            cos, _ = self.__dict__["_copy"](x, position_ids[:, :1], *args, **kwargs)
            width = self._widths[key] = cos.shape[-1]
        shape = (1, position_ids.shape[-1], width)
        return x.new_ones(()).expand(shape), x.new_zeros(()).expand(shape)

    def __getattr__(self, name: str) -> Any:
        """Answer for the original: some decoders read its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def _apply(self, fn: Any, recurse: bool = True) -> IdentityRotary:
        """Let ``model.to(...)`` reach the original, which comes back when the model is detached."""
        self.__dict__["original"]._apply(fn, recurse)
        return self


def is_rotary(module: nn.Module) -> bool:
    """Whether `module` makes rotary tables, by the name transformers gives such classes."""
    return type(module).__name__.endswith("RotaryEmbedding")


def find_rotaries(decoder: nn.Module) -> list[Rotary]:
    """List the rotary tables below `decoder`, one per layer type where a module has several."""
    found = []
    for module in decoder.modules():
        if not is_rotary(module):
            continue
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        if "inv_freq" in buffers:
            found.append(Rotary(module, None))
        found += [
            Rotary(module, name.removesuffix("_inv_freq"))
            for name in buffers
            if name.endswith("_inv_freq") and not name.endswith("original_inv_freq")
        ]
    return found
