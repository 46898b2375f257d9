"""The `tandem` command as a user runs it: a process of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import BIN, clean_environment

TIMEOUT_S = 170


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code, and all that it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)


def tandem(*arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Runs the command to its end."""
    done = subprocess.run(
        [str(BIN / "tandem"), *arguments],
        env=clean_environment(environment or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return Done(done.returncode, done.stdout, done.stderr)
