"""What a measurement ran on, and how much memory a process holds."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from everlong import __version__
from everlong.errors import UnsupportedUseError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def describe_machine() -> dict[str, Any]:
    """Return the machine and versions a result was measured with, for people who compare results."""
    return {
        "date": date.today().isoformat(),
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "everlong": __version__,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set"),
    }


def machine_key() -> str:
    """Return what tells this machine and its versions from all others, whatever the day."""
    machine = {name: value for name, value in describe_machine().items() if name != "date"}
    return hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()[:12]


def machine_line(machine: dict[str, Any]) -> str:
    """Return :func:`describe_machine` as one line."""
    turns = machine.get("GOMP_SPINCOUNT", "not set")
    spinning = "" if turns == "not set" else f", GOMP_SPINCOUNT {turns}"
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    return (
        f"{machine['date']}; {where}; torch {machine['torch']}, transformers {machine['transformers']}, "
        f"Python {machine['python']}; OMP_WAIT_POLICY {machine['OMP_WAIT_POLICY']}{spinning}"
    )


def resident_bytes() -> int:
    """Return this process's resident memory (Linux)."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the largest resident memory since the start, or since :func:`reset_peak` (Linux)."""
    return _status("VmHWM")


def allocated_bytes(device: torch.device) -> int | None:
    """Return what PyTorch has allocated on `device`, where it keeps account of that."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def reset_peak() -> None:
    """Begin the peak anew from what is resident now (Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        raise UnsupportedUseError(
            f"this system does not let a process reset its peak memory: {error}"
        ) from error


def _status(key: str) -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError as error:
        raise UnsupportedUseError(
            f"resident memory is read from {_STATUS}, which this system ({sys.platform}) does not have"
        ) from error
    kibibytes = next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(kibibytes)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
