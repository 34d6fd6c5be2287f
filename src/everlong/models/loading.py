"""One way in for every model: a catalogue name, a hub id, a folder, a ``.gguf`` file, a loaded model."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everlong.errors import ConfigurationError, ModelFileError, UnknownNameError
from everlong.models.catalogue import CATALOGUE
from everlong.models.checkpoint import read_model, read_tokenizer
from everlong.models.files import human_bytes
from everlong.models.fingerprint import weights_hash
from everlong.models.heap import keep_what_is_freed
from everlong.models.hub import find_on_hub
from everlong.models.placement import choose_device, choose_dtype, unpacked_dtype
from everlong.models.pulling import OnProgress, PullProgress
from everlong.models.store import Store
from everlong.registry import unknown_name

Source: TypeAlias = str | Path | PreTrainedModel

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_logger = logging.getLogger("everlong")


@dataclass(frozen=True)
class LoadedModel:
    """A model and what reads and writes its text.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerBase
        Calling it begins the ids with BOS where the model wants one.
    name : str
        What was asked for, for people.
    source : str
        Where the weights were read from: a folder, a hub id, or "given".
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str

    @cached_property
    def weights_hash(self) -> str:
        """The weights' fingerprint, computed once: :func:`~everlong.models.fingerprint.weights_hash`."""
        return weights_hash(self.model)


def load_model(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    progress: OnProgress | None = None,
    store: Store | None = None,
) -> LoadedModel:
    """Load a causal language model with its tokenizer.

    Weights are read from safetensors only, and a model's own code is never run.

    Parameters
    ----------
    source : str, Path or PreTrainedModel
        A catalogue name (pulled if it is not on this machine), a folder, a ``.gguf`` file (converted once), a
        hub id, or a loaded model. A name of the catalogue wins over a folder that is called the same; write
        ``./name`` for the folder.
    tokenizer : PreTrainedTokenizerBase, optional
        Used instead of the model's own; needed with a loaded model.
    device : str or torch.device, optional
        By default a CUDA device if there is one, else the CPU.
    dtype : str or torch.dtype, optional
        "float32", "bfloat16", "float16". By default float32 on the CPU; elsewhere the checkpoint's own type,
        and bfloat16 for what comes from a GGUF.
    revision : str, optional
        Branch, tag or commit of a hub id.
    progress : callable, optional
        Called with a :class:`~everlong.models.pulling.PullProgress` while a model is fetched or converted.
        Without it one line is logged.
    store : Store, optional
        Where catalogue models and conversions are kept; by default below ``EVERLONG_HOME``.

    Raises
    ------
    UnknownNameError
        If `source` is none of the above; the message names near catalogue names.
    ModelFileError
        If files are missing, damaged, cannot be fetched, or lack weights.
    UnsupportedModelError
        If it is not a causal language model that transformers knows without running the model's own code.
    ConfigurationError
        If device or dtype cannot be used, or an option does not go with the source.
    """
    if isinstance(source, PreTrainedModel):
        keep_what_is_freed()
        return _given(source, tokenizer, device, dtype, revision)
    where = choose_device(device)
    store = store or Store()
    name, path, kind = _locate(source)
    if revision is not None and kind != "hub":
        raise ConfigurationError(f"revision={revision!r} is for hub ids, and {name!r} is a {kind}")
    local_only, own = True, dtype
    if kind == "catalogue model":
        own = dtype or unpacked_dtype(where)
        path = str(store.pull(name, progress=progress or _log_once(name)))
    elif kind == "GGUF file":
        own = dtype or unpacked_dtype(where)
        path = str(store.convert_file(Path(path), progress=progress or _log_once(name)))
    elif kind == "hub":
        local_only = find_on_hub(path, revision)
    arguments: dict[str, Any] = {"local_files_only": local_only, "revision": revision or "main"}
    model: Any = read_model(path, name, choose_dtype(own, where), arguments, quiet=kind != "hub")
    model.to(where)
    keep_what_is_freed()  # of forwards: weights were loaded as ever
    return LoadedModel(
        model=model,
        tokenizer=tokenizer or read_tokenizer(path, name, arguments),
        name=name,
        source=path,
    )


def _given(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    revision: str | None,
) -> LoadedModel:
    """Take a loaded model as it is."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if tokenizer is None:
        raise ConfigurationError(f"a loaded model ({name}) needs its tokenizer: pass tokenizer=")
    asked = {"device": device, "dtype": dtype, "revision": revision}
    if wrong := [option for option, value in asked.items() if value is not None]:
        raise ConfigurationError(
            f"{' and '.join(wrong)} cannot be chosen for a model that is loaded already; move it yourself "
            f"with model.to(...) first"
        )
    return LoadedModel(model, tokenizer, name, "given")


def _locate(source: str | Path) -> tuple[str, str, str]:
    """Tell what `source` names: its name, its path or id, and its kind."""
    text = str(source)
    if isinstance(source, str) and source in CATALOGUE:
        return source, source, "catalogue model"
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, str(path), "folder"
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path.name, str(path.resolve()), "GGUF file"
        raise ModelFileError(f"{text} is neither a folder with a model nor a .gguf file")
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf":
        raise ModelFileError(f"there is no folder or file {text}")
    if _HUB_ID.fullmatch(text):
        return text, text, "hub"
    known = unknown_name("model", text, list(CATALOGUE))
    raise UnknownNameError(
        f"{known}; also a folder, a .gguf file or a hub id (organisation/model) can be given"
    )


def _log_once(name: str) -> OnProgress:
    """Report the beginning of each stage as one log line, which Python shows on standard error by default."""
    seen: set[str] = set()

    def report(progress: PullProgress) -> None:
        if progress.stage in seen:
            return
        seen.add(progress.stage)
        size = f" ({human_bytes(progress.total)})" if progress.total else ""
        lines = {
            "wait": f"waiting for another process that is pulling {name}",
            "fetch": f"fetching {name}{size}, once",
            "convert": f"converting {name} to safetensors, once",
        }
        if progress.stage in lines:
            _logger.warning(lines[progress.stage])

    return report
