"""A real Ray cluster for the tests, started as a platform engineer starts one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.stores import free_ports

START_S = 90.0
BIN = Path(sys.executable).parent


@contextmanager
def ray_head(folder: Path, environment: Mapping[str, str], *, cpus: int = 4) -> Iterator[str]:
    """`ray start --head` with an environment; the address of its job API. Ends only what it started."""
    port, dashboard, client, agent = free_ports(4)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--num-cpus={cpus}", "--disable-usage-stats",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=clean_environment(environment), stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for(f"{address}/api/version", folder / "head.log")
        yield address
    finally:
        # SIGTERM would drain the node for half a minute; workers end with their raylet
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would lead elsewhere, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "HF_"))}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **extra}


def _wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=1).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer after {START_S:.0f} s:\n{log.read_text()}")
