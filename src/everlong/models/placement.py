"""Where a model goes and in which type: device and dtype that were asked for, or fitting ones; the room."""

from __future__ import annotations

from pathlib import Path

import torch

from everlong.errors import ConfigurationError
from everlong.registry import unknown_name

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The types a model can be loaded in, by name."""

_MEMORY = Path("/proc/meminfo")


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device a model goes to: the one asked for, else CUDA if it is there, else the CPU.

    Raises
    ------
    ConfigurationError
        If the device is not known or not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or ["unknown"])[0]
        raise ConfigurationError(
            f"device {str(device)!r} cannot be used here: {first}; try device='cpu'"
        ) from error
    return chosen


def unpacked_dtype(device: torch.device) -> torch.dtype:
    """Return the type for weights that were unpacked from 4-bit blocks, and so have no type of their own."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """Return the type of the weights; "auto", the checkpoint's own, where nothing was asked for off the CPU.

    Raises
    ------
    UnknownNameError, ConfigurationError
        If it is not one of :data:`DTYPES`.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in DTYPES:
            raise unknown_name("dtype", dtype, list(DTYPES))
        return DTYPES[name]
    if dtype not in DTYPES.values():
        raise ConfigurationError(f"a model cannot be loaded as {dtype}; choose one of {', '.join(DTYPES)}")
    return dtype


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that can be taken on `device` without swapping; None: not known there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0]) if device.type == "cpu" else None
    except (OSError, KeyError, ValueError):
        return None
