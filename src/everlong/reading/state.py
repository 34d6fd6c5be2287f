"""State files: a session as one safetensors file, whose header says what it is and whose it is."""

from __future__ import annotations

import json
import os
import struct
import uuid
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from everlong.errors import InputError, StateError
from everlong.reading.attached import AttachedModel

FORMAT = 3
"""Version of what is written; raised when older versions of Everlong could not read it."""

_KEY = "everlong"  # of the header's metadata


def write_state(
    path: str | Path, model: AttachedModel, tensors: dict[str, Tensor], session: dict[str, Any]
) -> None:
    """Write a session's state; a file of that name is replaced at once or not at all.

    Parameters
    ----------
    path : str or Path
        The file.
    model : AttachedModel
        Whose state it is.
    tensors : dict of str to Tensor
        On any device.
    session : dict
        JSON-able.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "model": model.name,
        "weights": model.weights_hash,
        "packed_as": model.packed_as,
        "tokenizer": model.tokenizer_hash,
        "session": session,
    }
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file(held, scratch, metadata={_KEY: json.dumps(header)})
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"cannot write {path}: {error}; nothing was changed, save where there is space and you may write"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def read_state(path: str | Path, model: AttachedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a session's state and hold it against the model.

    Returns
    -------
    tensors : dict of str to Tensor
        On the model's device.
    session : dict
        What was written.

    Raises
    ------
    InputError
        There is no such file, it is cut short, or it is something else.
    StateError
        It is of another format, or of a model with other weights or another tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no state file {path}; session.save({str(path)!r}) writes one")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            header = _header((file.metadata() or {}).get(_KEY), path)
            _require_same(header, model, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        if _is_cut_short(path):
            raise InputError(
                f"{path} is cut short, so the session in it is lost; restore an earlier copy"
            ) from None
        raise InputError(f"{path} is not a state file of Everlong ({error})") from None
    return tensors, header["session"]


def _header(text: str | None, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(text) if text is not None else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path} holds tensors, but not the state of a session; session.save() writes those")
    if header.get("format") != FORMAT:
        raise StateError(
            f"{path} has state format {header.get('format')!r}, this version of Everlong reads {FORMAT}; "
            "restore it with the version that wrote it, or read the text again"
        )
    missing = {"model", "weights", "packed_as", "tokenizer", "session"} - header.keys()
    if missing or not isinstance(header["session"], dict):
        raise InputError(f"{path} is not complete: {', '.join(sorted(missing)) or 'session'} is missing")
    return header


def _require_same(header: dict[str, Any], model: AttachedModel, path: Path) -> None:
    if header["weights"] != model.weights_hash:
        raise StateError(
            f"{path} is the state of {header['model']} with other weights (hash {header['weights'][:12]}) "
            f"than those of {model.name} (hash {model.weights_hash[:12]}); "
            "load the model, adapter and dtype it was saved with"
        )
    if header["tokenizer"] != model.tokenizer_hash:
        raise StateError(
            f"{path} was written with another tokenizer or chat template than {model.name} has here; "
            "load the model together with the tokenizer it was saved with"
        )
    packed_as = header["packed_as"]
    if packed_as != model.packed_as:
        warnings.warn(
            f"{path} was written with weights={packed_as!r} and goes on with {model.packed_as!r}: "
            "nearly, not exactly, as it would have",
            stacklevel=5,
        )


def _is_cut_short(path: Path) -> bool:
    """Whether a safetensors header says that there should be more."""
    size = path.stat().st_size
    if size < 8:
        return True
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100_000_000:  # safetensors' own limit: no header
            return False
        if size < 8 + length:
            return True
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
        return bool(size < 8 + length + max(ends, default=0))
