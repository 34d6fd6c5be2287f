"""Whether an adapter is one that everybody loads as it is: PEFT, vLLM, SGLang.

vLLM checks some of these rules when it loads an adapter, and passes silently over others: it does not read
patterns of ranks and scalings, for example, so that an adapter with such would answer wrongly. Hence all of
them are checked here, before an adapter is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

RANKS = (8, 16, 32, 64, 128)
"""Ranks of adapters: a server sets the largest it takes, and these are among the choices of all."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
_NOT_LINEAR = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"}
_EXTRAS = (
    *("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices"),
    *("target_parameters", "layer_replication", "use_qalora", "alora_invocation_tokens", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
"""Options of PEFT's that make an adapter more than a product of two matrices for each layer."""
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base model's own weights."""


def lora_key(key: str) -> tuple[str, str] | None:
    """Split a saved name into the module's name and ``lora_A`` or ``lora_B``; None if it is another's."""
    found = _KEY.fullmatch(key)
    return (found[1], found[2]) if found else None


def lora_problems(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Say what keeps an adapter from being plain LoRA of one rank on linear layers.

    Parameters
    ----------
    config : mapping
        What stands in ``adapter_config.json``.
    shapes : mapping of str to sequence of int
        The saved names of the weights, and the shape of each.

    Returns
    -------
    list of str
        A reason each; none: it is.
    """
    kind = config.get("peft_type")
    kind = getattr(kind, "value", kind)
    if kind != "LORA":
        return [f"it is of type {kind}, not LORA"]
    problems = []
    rank = config.get("r")
    if rank not in RANKS:
        problems.append(f"its rank is {rank}, not one of {', '.join(map(str, RANKS))}")
    if config.get("bias", "none") != "none":
        problems.append(f"it trains biases (bias={config['bias']!r}, not 'none')")
    problems += [f"it sets {option}" for option in _EXTRAS if config.get(option)]
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGING_STARTS):
        problems.append(f"its initialisation {start!r} changes the base model's weights; convert it first")
    return problems + _weight_problems(rank, shapes)


def _weight_problems(rank: Any, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    parts = {key: lora_key(key) for key in shapes}
    problems = [
        f"its weight {key!r} is none of a linear layer's lora_A and lora_B"
        for key, part in parts.items()
        if part is None or part[0].rsplit(".", 1)[-1] in _NOT_LINEAR
    ]
    found: dict[str, dict[str, Sequence[int]]] = {}
    for key, part in parts.items():
        if part is not None:
            found.setdefault(part[0], {})[part[1]] = shapes[key]
    if not found:
        problems.append("it has no weights")
    for module, pair in found.items():
        lower, upper = (tuple(pair.get(name, ())) for name in ("lora_A", "lora_B"))
        if len(lower) != 2 or len(upper) != 2 or not lower[0] == upper[1] == rank:
            problems.append(f"the weights of {module} are not of rank {rank}: A {lower}, B {upper}")
    return problems[:3]


def check_vllm(folder: str | Path, base: str, model: nn.Module | None = None) -> tuple[str, ...]:
    """Say why vLLM would not serve the adapter of a folder as it is.

    Parameters
    ----------
    folder : str or Path
        A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
    base : str
        The model that vLLM is started with, as it is named there. Its filesystem resolver compares it, letter
        by letter, with the adapter's ``base_model_name_or_path``.
    model : nn.Module, optional
        The base model: it is then also checked that each adapted module is one of its linear layers, of that
        shape.

    Returns
    -------
    tuple of str
        A reason each; none: nothing is known to be in the way.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(Path(folder) / WEIGHTS_FILE, framework="np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        return (f"its files cannot be read: {error}",)
    if not isinstance(config, dict):
        return (f"its {CONFIG_FILE} is not one",)
    problems = lora_problems(config, shapes)
    named = config.get("base_model_name_or_path")
    if named != base:
        problems.append(f"it belongs to the base model {named!r}, not {base!r}")
    if model is not None:
        problems += _module_problems(model, shapes)
    return tuple(problems)


def _module_problems(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    from torch import nn

    modules, problems = dict(model.named_modules()), []
    for key, shape in shapes.items():
        name, part = lora_key(key) or ("", "")
        module = modules.get(name)
        if not name:
            continue
        if not isinstance(module, nn.Linear):
            kind = "no module" if module is None else type(module).__name__
            problems.append(f"{name} is {kind} of the model, not Linear")
            continue
        fits = shape[-1] == module.in_features if part == "lora_A" else shape[0] == module.out_features
        if not fits:
            problems.append(f"the {part} of {name} has shape {tuple(shape)}, the layer {module}")
    return problems[:3]
