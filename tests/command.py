"""The `tandem` command as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.models import shipped
from tests.cluster import BIN, OPEN, clean_environment

TIMEOUT_S = 170
MODEL = str(shipped("digits-vit"))
TOP_K = 3


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


def tandem_in_terminal(*arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Runs the command with a terminal as its standard error, as a person sees it."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [str(BIN / "tandem"), *arguments],
        env=clean_environment({"TERM": "xterm", **(environment or {})}),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as process:
        os.close(theirs)
        shown = bytearray()
        with suppress(OSError):  # how a terminal tells that nobody writes to it any more
            while part := os.read(ours, 1 << 16):
                shown += part
        os.close(ours)
        assert process.stdout is not None
        return Done(process.wait(TIMEOUT_S), process.stdout.read(), shown.decode())


def tandem(*arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Runs the command to its end."""
    done = subprocess.run(
        [str(BIN / "tandem"), *arguments],
        env=clean_environment({**(OPEN if "--address" in arguments else {}), **(environment or {})}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def submit(address: str, source: str, target: str, *options: str) -> Done:
    """`tandem submit --wait --json` to a cluster, with the way to the store, but not its keys, in its environment."""
    return tandem("submit", *_submission(address, source, target), *options, environment=_way())


@contextmanager
def submitting(address: str, source: str, target: str) -> Iterator[subprocess.Popen[str]]:
    """The same, running while the context lasts."""
    with subprocess.Popen(
        [str(BIN / "tandem"), "submit", *_submission(address, source, target)],
        env=clean_environment({**OPEN, **_way()}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _submission(address: str, source: str, target: str) -> tuple[str, ...]:
    return (source, target, "--model", MODEL, "--top-k", str(TOP_K), "--wait", "--json", "--address", address)


def _way() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in ("AWS_ENDPOINT_URL", "AWS_REGION")}
