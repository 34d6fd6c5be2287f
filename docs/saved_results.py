"""What the benchmark scripts saved, and the line that says where a result comes from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

sys.path.insert(0, str(ROOT / "benchmarks"))  # the scripts' own tables are used


def source(name: str, saved: dict[str, Any], script: str | None = None) -> str:
    """Say where a result comes from; the script has its name unless another is given."""
    machines = saved["machines"] if "machines" in saved else [saved["machine"]]
    where = [f"{machine['date']}, {machine['cpu']}, {machine['threads']} threads" for machine in machines]
    script = script or name
    return (
        f"([{name}.md](benchmarks/results/{name}.md), by [{script}.py](benchmarks/{script}.py); "
        f"{'; '.join(where)}.)"
    )


def load(name: str) -> dict[str, Any]:
    """Read what a benchmark script saved."""
    saved: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return saved
