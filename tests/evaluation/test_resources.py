"""What a measurement ran on, and the memory of a process."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers

import everlong
from everlong.errors import UnsupportedUseError
from everlong.evaluation import resources
from everlong.evaluation.resources import (
    allocated_bytes,
    describe_machine,
    machine_line,
    peak_bytes,
    reset_peak,
    resident_bytes,
)

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")


def test_the_machine_is_described_in_plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    before, machine, after = date.today(), describe_machine(), date.today()
    assert json.loads(json.dumps(machine)) == machine
    assert before <= date.fromisoformat(machine["date"]) <= after
    assert machine["threads"] == torch.get_num_threads()
    assert (machine["torch"], machine["transformers"]) == (torch.__version__, transformers.__version__)
    assert machine["everlong"] == everlong.__version__
    assert machine["cpu"] and machine["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert "SPIN" not in machine_line(describe_machine())
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert machine_line(describe_machine()).endswith("GOMP_SPINCOUNT 7")
    assert describe_machine()["OMP_WAIT_POLICY"] == "not set"


def test_its_line_names_the_processor_or_the_card() -> None:
    machine = describe_machine() | {"cpu": "Some CPU", "cores": 12, "threads": 3, "gpu": None}
    line = machine_line(machine)
    assert "Some CPU, 12 cores, 3 threads" in line and "\n" not in line
    for key in ("date", "torch", "transformers", "python", "OMP_WAIT_POLICY"):
        assert str(machine[key]) in line
    card = machine_line(machine | {"gpu": "Some Card"})
    assert "Some Card" in card and "Some CPU" not in card


@linux
def test_resident_memory_grows_with_what_is_held_and_the_peak_remembers_it() -> None:
    """In a process of its own: another's allocator may have that much at hand already."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HELD = """
import torch
from everlong.evaluation.resources import peak_bytes, reset_peak, resident_bytes

MIB = 2**20
reset_peak()
before = resident_bytes()
held = torch.ones(64 * MIB, dtype=torch.uint8)
with_it = resident_bytes()
assert 56 * MIB < with_it - before < 96 * MIB
del held
assert resident_bytes() < with_it - 48 * MIB
assert peak_bytes() > with_it - 8 * MIB
reset_peak()
assert peak_bytes() < with_it - 48 * MIB
"""


def test_a_system_without_proc_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(resources, "_CLEAR", tmp_path / "no" / "clear_refs")
    for ask in (resident_bytes, peak_bytes):
        with pytest.raises(UnsupportedUseError, match="does not have"):
            ask()
    with pytest.raises(UnsupportedUseError, match="reset its peak"):
        reset_peak()


def test_kibibytes_become_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t   9 kB\nVmHWM:\t     7 kB\nVmRSS:\t     5 kB\n")
    monkeypatch.setattr(resources, "_STATUS", status)
    assert (resident_bytes(), peak_bytes()) == (5 * 1024, 7 * 1024)


def test_what_pytorch_has_allocated_is_known_on_gpus_alone() -> None:
    assert allocated_bytes(torch.device("cpu")) is None
