"""Decoder layers of the usual form, run in as few operations as that form needs, one token a row.

A step of writing is short: with packed weights, what a layer does around its products takes longer than they
do. Most models share one form of layer: norm, attention, norm, gated MLP (with norms of queries and keys, or
behind each half, in some). Where a layer has that form and its attention follows a policy, a token runs
through the same products without what lies between them in general code. Whether a layer has that form is
looked up by the names of its parts, and then measured: for the first token that comes it must give what the
model's own code gives. Every other call, and every other layer, is the model's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everlong.kernels.calls import fit, gated, rms_norm
from everlong.kernels.loading import in_use
from everlong.models.cache_argument import CACHE_ARGUMENTS
from everlong.models.packing import MOST_ROWS, PackedLinear, Product

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_TWO_NORMS = {"input_layernorm", "post_attention_layernorm"}
_FOUR_NORMS = _TWO_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_MANNERS = ("scaling", "softcap", "s_aux")
_FAR = 2**20  # tokens
_ROUNDED = 2.0**-6  # of what a layer adds, at most: products of bfloat16 numbers, summed in two orders
_EXACT = 1e-4  # of float32 numbers
_FORMS = (1.0, 0.0), (math.sqrt(8 / math.pi), 0.044715)  # SiLU; GELU by tanh


@dataclass(frozen=True, eq=False)
class _Norm:
    """A root-mean-square norm over the last dimension, of d numbers.

    Attributes
    ----------
    module : nn.Module
        Has the weight, shape (d,).
    adds_one : bool
        Whether that is what is added to 1.
    eps : float
        Added to the mean square.
    """

    module: nn.Module
    adds_one: bool
    eps: float

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the norm of `x`, as `dtype`; None: its own."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        dtype = dtype or x.dtype
        if in_use() and fit(x, weight):
            rows = x.view(-1, x.shape[-1])
            return rms_norm(rows, weight, self.eps, float(self.adds_one), dtype).view(x.shape)
        rows = x.float().reshape(-1, 1, x.shape[-1])
        share = 1 / x.shape[-1]  # of the sum of squares, to which eps is added
        mean = torch.baddbmm(_number(self.eps), rows, rows.transpose(1, 2), alpha=share)
        inverse = mean.rsqrt_().view(*x.shape[:-1], 1)
        return (x * inverse).mul_(1 + weight if self.adds_one else weight).to(dtype)


@dataclass(frozen=True, eq=False)
class _Linears:
    """Linear layers that are given the same input; packed in one product, or (None) not packed."""

    layers: list[nn.Linear]
    product: Product | None

    @property
    def are_whole(self) -> bool:
        """Whether they are still what they were when they were found."""
        if self.product is not None:
            return self.product.is_in_use
        return all(type(layer) is nn.Linear for layer in self.layers)

    @property
    def takes(self) -> torch.dtype | None:
        """The dtype of what they multiply; None: whatever comes."""
        return None if self.product is None else self.product.packed.takes

    def __call__(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return each one's output for `x`, shape (rows, in), as `dtype`; a single one's as it comes."""
        if self.product is None:
            return [F.linear(x, layer.weight, layer.bias) for layer in self.layers]
        together = self.together(x)
        outputs = [together]
        if len(self.layers) > 1:
            outputs = [*together.to(dtype).split_with_sizes(self.product.sizes, 1)]
        biases = [layer._parameters["bias"] for layer in self.layers]
        return [
            output if bias is None else output.to(dtype) + bias
            for output, bias in zip(outputs, biases, strict=True)
        ]

    def gives_alike(self, dtype: torch.dtype) -> bool:
        """Whether they multiply together what is of `dtype`, each to as many outputs, without biases."""
        alike = len({layer.out_features for layer in self.layers}) == 1
        return self.takes == dtype and alike and all(layer.bias is None for layer in self.layers)

    def together(self, x: Tensor) -> Tensor:
        """Return the outputs of packed layers without their biases, one behind the other, as they come."""
        assert self.product is not None
        packed = self.product.packed
        return packed.multiply(x.to(packed.takes))


@dataclass(eq=False)
class LeanLayer:
    """One decoder layer, taken apart.

    Attributes
    ----------
    layer, attention, mlp : nn.Module
        The layer and its two halves.
    before, between : _Norm
        In front of attention, and of the MLP.
    after_attention, after_mlp : _Norm or None
        Behind each, before it is added.
    of_queries, of_keys : _Norm or None
        Of each head.
    heads_in, heads_out, mlp_in, mlp_out : _Linears
        The products.
    activation : callable
        The MLP's.
    """

    layer: nn.Module
    attention: Any
    mlp: nn.Module
    before: _Norm
    between: _Norm
    after_attention: _Norm | None
    after_mlp: _Norm | None
    of_queries: _Norm | None
    of_keys: _Norm | None
    heads_in: _Linears
    heads_out: _Linears
    mlp_in: _Linears
    mlp_out: _Linears
    activation: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self._own = type(self.layer).forward
        self._agrees: bool | None = None
        self._manner: dict[str, Any] = {}
        self._size = int(self.attention.head_dim)
        self._form: tuple[float, float] | None = None
        self._linears = self.heads_in, self.heads_out, self.mlp_in, self.mlp_out
        self._holders = [holder._modules for holder in (self.layer, self.attention, self.mlp)]
        self._found = [tuple(modules.values()) for modules in self._holders]
        parts = [part for found in self._found for part in found]
        self._hooks = [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._attributes = [part.__dict__ for part in parts]
        self._forwards = [attributes.get("forward") for attributes in self._attributes]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the layer's forward."""
        attend = self.attention.__dict__.get("_everlong_attention")
        rows, tokens = hidden_states.shape[:2]
        if (
            tokens > 1
            or rows > MOST_ROWS
            or attend is None
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")  # norms are products here, which it would round
            or hidden_states.device.type != "cpu"
            or not self._is_whole()
        ):
            return self._own(self.layer, hidden_states, *args, **kwargs)
        if self._agrees is None:
            self._agrees = self._compare(hidden_states, args, kwargs)
        if not self._agrees:
            return self._own(self.layer, hidden_states, *args, **kwargs)
        return self.run(hidden_states, attend)

    def run(self, hidden_states: Tensor, attend: Callable[..., Any]) -> Tensor:
        """Run one token a row, shape (batch, 1, d), by the shortest way; same shape."""
        rows, dtype = hidden_states.shape[0], hidden_states.dtype
        hidden = hidden_states.view(rows, -1)
        query, key, value = (
            heads.view(rows, -1, 1, self._size)
            for heads in self.heads_in(self.before(hidden, self.heads_in.takes), dtype)
        )
        if self.of_queries is not None:
            query = self.of_queries(query)
        if self.of_keys is not None:
            key = self.of_keys(key)
        output, _ = attend(self.attention, query, key, value, None, **self._manner)
        (output,) = self.heads_out(output.view(rows, -1), dtype)
        if self.after_attention is not None:
            output = self.after_attention(output.to(dtype))
        hidden = hidden + output
        (output,) = self.mlp_out(self._gated(self.between(hidden, self.mlp_in.takes), dtype), dtype)
        if self.after_mlp is not None:
            output = self.after_mlp(output.to(dtype))
        return (hidden + output).view(hidden_states.shape)

    def _gated(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the middle of the MLP for what its norm gave, shape (rows, d)."""
        if self._form is not None and in_use():
            return gated(self.mlp_in.together(x), *self._form)
        gate, up = self.mlp_in(x, dtype)
        return self.activation(gate) * up

    def _is_whole(self) -> bool:
        """Whether nothing was put in the place of a part, or hooked to one, or packed anew."""
        if any(self._hooks) or not all(linears.are_whole for linears in self._linears):
            return False
        if [attributes.get("forward") for attributes in self._attributes] != self._forwards:
            return False
        return all(
            tuple(modules.values()) == found
            for modules, found in zip(self._holders, self._found, strict=True)
        )

    def _compare(self, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the layer gives what its own code gives, attention aside; learn how that is called."""

        def blended(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **told: Any
        ) -> tuple[Tensor, None]:
            """Something that all of queries, keys and values have a part in."""
            self._manner.update({name: told[name] for name in _MANNERS if told.get(name) is not None})
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            return (query + 0.5 * key + 0.25 * value).transpose(1, 2).contiguous(), None

        attention = copy.copy(self.attention)  # other threads go on with the original
        attention.__dict__["_everlong_attention"] = blended
        if (own := attention.__dict__.get("forward")) is not None:
            if not isinstance(own, MethodType):
                return False  # somebody else's
            attention.__dict__["forward"] = MethodType(own.__func__, attention)
        twin = copy.copy(self.layer)
        twin.__dict__["_modules"] = {**twin._modules, "self_attn": attention}
        call = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
        positions = call.get("position_ids")
        try:
            theirs = self._own(twin, hidden_states, *args, **call)
            if positions is not None:  # some scale their queries by position, from some position on
                call["position_ids"] = torch.full_like(positions, _FAR)
            elsewhere = self._own(twin, hidden_states, *args, **call)
            ours = self.run(hidden_states, blended)
            if self.mlp_in.gives_alike(torch.bfloat16) and self.mlp_out.takes == torch.bfloat16:
                self._form = _form(self.activation)
        except Exception:  # of whatever form it is, it is not the usual one
            return False
        if not isinstance(theirs, Tensor) or not torch.equal(theirs, elsewhere):
            return False
        error, added = (x.float().abs().max() for x in (ours - theirs, theirs - hidden_states))
        is_exact = hidden_states.dtype == torch.float32 and not any(x.product for x in self._linears)
        return bool(error <= (_EXACT if is_exact else _ROUNDED) * added)


@contextmanager
def lean_layers(decoder: nn.Module) -> Iterator[list[LeanLayer]]:
    """Let the layers of `decoder` that have the usual form be run lean, once they prove to; yield these."""
    candidates = [module for module in decoder.modules() if "forward" not in module.__dict__]  # accelerate's
    found = [lean for lean in map(_taken_apart, candidates) if lean is not None]
    try:
        for lean in found:
            lean.layer.__dict__["forward"] = lean.forward
        yield found
    finally:
        for lean in found:
            lean.layer.__dict__.pop("forward", None)


def _taken_apart(layer: nn.Module) -> LeanLayer | None:
    """Take a decoder layer of the usual form apart; None: it is something else."""
    parts: dict[str, Any] = dict(layer._modules)
    attention, mlp = parts.pop("self_attn", None), parts.pop("mlp", None)
    if attention is None or mlp is None or set(parts) not in (_TWO_NORMS, _FOUR_NORMS):
        return None
    inner: dict[str, Any] = dict(attention._modules)
    of_heads = {name: inner.pop(name) for name in ("q_norm", "k_norm") if name in inner}
    if set(inner) != _ATTENTION or set(mlp._modules) != _MLP or not hasattr(attention, "head_dim"):
        return None
    groups = [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]
    linears: list[Any] = [_given_the_same(group) for group in groups]
    if None in linears:
        return None
    norms: dict[str, Any] = {name: _norm(module) for name, module in (*parts.items(), *of_heads.items())}
    if None in norms.values():
        return None
    four = set(parts) == _FOUR_NORMS
    return LeanLayer(
        layer,
        attention,
        mlp,
        before=norms["input_layernorm"],
        between=norms["pre_feedforward_layernorm" if four else "post_attention_layernorm"],
        after_attention=norms["post_attention_layernorm"] if four else None,
        after_mlp=norms["post_feedforward_layernorm"] if four else None,
        of_queries=norms.get("q_norm"),
        of_keys=norms.get("k_norm"),
        heads_in=linears[0],
        heads_out=linears[1],
        mlp_in=linears[2],
        mlp_out=linears[3],
        activation=mlp.act_fn,
    )


def _given_the_same(group: list[Any]) -> _Linears | None:
    """Return linear layers with the same input as one; None: neither packed together nor all unpacked."""
    if any("forward" in layer.__dict__ for layer in group):
        return None  # accelerate's, which brings weights from elsewhere
    if all(type(layer) is nn.Linear for layer in group):
        return _Linears(group, None)
    if not all(type(layer) is PackedLinear for layer in group):
        return None
    found = [layer.__dict__["_everlong_product"] for layer in group]
    product: Product = found[0][0]
    if any(other is not product for other, _ in found) or len(product.sizes) != len(group):
        return None
    return _Linears(group, product) if [which for _, which in found] == list(range(len(group))) else None


def _form(activation: Callable[[Tensor], Tensor]) -> tuple[float, float] | None:
    """Return slope and cube if an activation is x · sigmoid(slope · (x + cube · x³)), or None."""
    x = torch.linspace(-8, 8, 65, dtype=torch.float32, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for slope, cube in _FORMS:
            if torch.allclose(activation(x), x * torch.sigmoid(slope * (x + cube * x**3)), 1e-4, 1e-5):
                return slope, cube
    return None


@cache
def _number(value: float) -> Tensor:
    """Return a number as a tensor: one for all layers, which the processor's cache holds."""
    with torch.inference_mode(False):  # it outlives whatever mode it is made in
        return torch.tensor(value, dtype=torch.float32, device="cpu")


def _norm(module: Any) -> Any:
    """Return a module's norm, if that is what it computes; None: it is something else."""
    weight, eps = (
        getattr(module, "weight", None),
        getattr(module, "variance_epsilon", getattr(module, "eps", None)),
    )
    if weight is None or eps is None or weight.dim() != 1:
        return None
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2.0**-6
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = module(x)
        for adds_one in (False, True):
            norm = _Norm(module, adds_one, float(eps))
            if torch.allclose(norm(x), expected, rtol=tolerance, atol=tolerance / 10):
                return norm
    return None
