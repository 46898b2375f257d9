"""What every benchmark says about where and when it ran, and where its results are kept."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ray", "torch", "transformers", "pyarrow", "numpy")


def machine() -> dict[str, Any]:
    """Date, hardware and versions."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Keeps results as `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**machine(), **content}, indent=2) + "\n")
    return path


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of them, 0 to 1, do not pass."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)
