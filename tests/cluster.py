"""A real Ray cluster for the tests, started as a platform engineer starts one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from tests.stores import free_ports

START_S = 90.0
OBJECT_STORE_BYTES = 1 << 30
# Of a cluster, and of those who come to it; a Ray of Tandem's own asks for a token.
OPEN = {"RAY_AUTH_MODE": "disabled"}
BIN = Path(sys.executable).parent


class Cluster:
    """A Ray head on loopback, and nodes beside it, each with processes of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, clean_environment({**OPEN, **environment})
        self._port, self._dashboard, *self._head_ports = free_ports(4)
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"http://127.0.0.1:{self._dashboard}"

    def start_head(self, cpus: int) -> None:
        """`ray start --head`; waits until the job API answers."""
        client, agent = self._head_ports
        self._start(
            "--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}", f"--num-cpus={cpus}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        )  # fmt: skip
        _wait_for(f"{self.address}/api/version", self._folder / "0.log")

    def start_node(self, cpus: int, name: str) -> subprocess.Popen[bytes]:
        """`ray start --address`; waits until the node is one of the cluster's."""
        (agent,) = free_ports(1)
        node = self._start(
            f"--address=127.0.0.1:{self._port}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}",
            f"--node-name={name}",
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while name not in self.nodes():
            assert time.monotonic() < deadline, f"node {name} did not come up"
            time.sleep(0.1)
        return node

    def nodes(self) -> dict[str, str]:
        """The ids of the living nodes, by their names."""
        found = cluster_state(self.address, "nodes")
        return {node["node_name"]: node["node_id"] for node in found if node["state"] == "ALIVE"}

    def stop(self) -> None:
        """Ends what it started, and only that."""
        for node in reversed(self._nodes):
            kill_node(node)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [
            str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *options,
            f"--object-store-memory={OBJECT_STORE_BYTES}",
        ]  # fmt: skip
        with (self._folder / f"{len(self._nodes)}.log").open("wb") as log:
            node = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
        self._nodes.append(node)
        return node


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """`kill -9` of the raylet and all that was started with it; its workers end by themselves."""
    # SIGTERM would drain the node for half a minute
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@contextmanager
def ray_cluster(folder: Path, environment: Mapping[str, str], *, cpus: int = 4) -> Iterator[Cluster]:
    """A cluster that is its head alone, for as long as the context lasts."""
    cluster = Cluster(folder, environment)
    try:
        cluster.start_head(cpus)
        yield cluster
    finally:
        cluster.stop()


def cluster_state(address: str, what: str) -> list[dict[str, Any]]:
    """The cluster's `actors`, `nodes` or `workers`, as Ray's state API tells of them."""
    response = httpx.get(f"{address}/api/v0/{what}", params={"detail": "true", "limit": 1000}, timeout=30)
    found: list[dict[str, Any]] = response.raise_for_status().json()["data"]["result"]["result"]
    return found


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would lead elsewhere, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "HF_"))}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **extra}


def _wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=1).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer after {START_S:.0f} s:\n{log.read_text()}")
