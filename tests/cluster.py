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
import yaml

from tests.stores import free_ports

START_S = 90.0
OBJECT_STORE_BYTES = 1 << 30
HEAD_ID = "f" * 51 + "00000"  # as Ray's provider of local nodes wants it
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
        self.gcs_address = f"127.0.0.1:{self._port}"

    def start_head(self, cpus: int, *options: str) -> None:
        """`ray start --head`; waits until the job API answers."""
        client, agent = self._head_ports
        self._start(
            "--head", f"--port={self._port}", f"--dashboard-port={self._dashboard}", f"--num-cpus={cpus}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", *options,
        )  # fmt: skip
        _wait_for(f"{self.address}/api/version", self._folder / "0.log")

    def start_autoscaling_head(self, cpus: int, gpu_nodes: int) -> None:
        """The same with Ray's autoscaler (v2), which starts and stops up to so many nodes of a logical GPU each."""
        config = {
            "cluster_name": "local",
            "max_workers": gpu_nodes,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 1.0,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
                "head_node_id": HEAD_ID,
                "gcs_address": self.gcs_address,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0},
                "gpu": {
                    "resources": {"CPU": 1, "GPU": 1, "object_store_memory": OBJECT_STORE_BYTES // 4},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": gpu_nodes,
                },
            },
            "auth": {},
            "docker": {},
            **{f"{what}_commands": [] for what in ("initialization", "setup", "head_setup", "worker_setup")},
            **{f"{what}_start_ray_commands": [] for what in ("head", "worker")},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
        }
        path = self._folder / "autoscaler.yaml"
        path.write_text(yaml.safe_dump(config))
        self._environment |= {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        self.start_head(cpus, f"--autoscaling-config={path}")

    def gpu_nodes(self) -> int:
        """The living nodes that have a GPU."""
        nodes = cluster_state(self.address, "nodes")
        return sum(node["state"] == "ALIVE" and "GPU" in node["resources_total"] for node in nodes)

    def start_node(self, cpus: int, name: str) -> subprocess.Popen[bytes]:
        """`ray start --address`; waits until the node is one of the cluster's."""
        (agent,) = free_ports(1)
        node = self._start(
            f"--address={self.gcs_address}", f"--num-cpus={cpus}", f"--dashboard-agent-listen-port={agent}",
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
