"""Reading a checkpoint: safetensors only, none of a model's own code, nothing made up where weights lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from everlong.errors import ModelFileError, UnsupportedModelError


def read_model(
    path: str, name: str, dtype: torch.dtype | str, arguments: dict[str, Any], *, quiet: bool
) -> PreTrainedModel:
    """Read a causal language model, in evaluation mode, and see that none of its weights are missing.

    Parameters
    ----------
    path : str
        A folder or a hub id.
    name : str
        What to call it in error messages.
    dtype : torch.dtype or "auto"
        The type of the weights.
    arguments : dict
        Further arguments of ``from_pretrained``: the revision, and whether the network may be used.
    quiet : bool
        Whether to hide progress bars.

    Raises
    ------
    ModelFileError
        If files are missing or damaged, or lack weights.
    UnsupportedModelError
        If it is no causal language model known to transformers.
    """
    auto: Any = AutoModelForCausalLM
    with _explained(path, name), _progress_bars(hidden=quiet):
        model, loaded = auto.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **arguments,
        )
    if missing := sorted(str(key) for key in (*loaded["missing_keys"], *loaded["mismatched_keys"])):
        raise ModelFileError(
            f"{name} lacks weights that its configuration asks for: {', '.join(missing[:3])} "
            f"({len(missing)} in all); transformers would have made them up"
        )
    return cast(PreTrainedModel, model.eval())


def read_tokenizer(path: str, name: str, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer.

    Raises
    ------
    ModelFileError
        If there is none, or none that can be read.
    """
    auto: Any = AutoTokenizer
    try:
        return cast(PreTrainedTokenizerBase, auto.from_pretrained(path, trust_remote_code=False, **arguments))
    except Exception as error:  # the readers of a dozen tokenizer formats raise whatever they like
        raise ModelFileError(
            f"{name} has no tokenizer that can be read ({_line(error)}); pass tokenizer="
        ) from error


@contextmanager
def _explained(path: str, name: str) -> Iterator[None]:
    """Turn what transformers raises while loading into our errors."""
    try:
        yield
    except SafetensorError as error:
        raise ModelFileError(f"the weights of {name} in {path} are truncated or damaged: {error}") from error
    except OSError as error:
        remedy = (
            "weights are read from .safetensors files only" if "safetensors" in str(error) else "see the path"
        )
        raise ModelFileError(f"{name} cannot be loaded from {path}: {_line(error)}; {remedy}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name} brings code of its own, which Everlong never runs"
            ) from error
        if "Unrecognized model" in str(error):
            raise ModelFileError(f"{path} holds no model: {_line(error)}") from error
        raise UnsupportedModelError(
            f"{name} is not a causal language model known here: {_line(error)}"
        ) from error
    except (RuntimeError, KeyError, ImportError) as error:
        raise ModelFileError(f"{name} cannot be loaded from {path}: {_line(error)}") from error


@contextmanager
def _progress_bars(*, hidden: bool) -> Iterator[None]:
    """Hide transformers' bars for what takes no time; downloads from the hub keep theirs."""
    bars: Any = transformers_logging
    if not (hidden and bars.is_progress_bar_enabled()):
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
