"""Real S3 stores on loopback for the tests: Ceph's radosgw, and the emulator that the demo uses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")


def environment(port: int) -> dict[str, str]:
    """What leads boto3, pyarrow and everything else to the store at `port`, and to no other."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        # Ceph 16 answers 411 to the checksums that pyarrow adds unasked
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


@contextmanager
def moto() -> Iterator[int]:
    """The S3 emulator; its port."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_port(port)
            yield port
        finally:
            server.terminate()


def missing_programs() -> list[str]:
    """What radosgw needs and this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


class Radosgw:
    """A one-node Ceph with its data in memory (4 GiB at most): a monitor, an object store daemon and the gateway.

    No authentication between the daemons and nothing but loopback, so it needs no root and no set-up.
    """

    def __init__(self, folder: Path) -> None:
        self.port, monitor_v2, monitor_v1 = free_ports(3)
        self._folder, self._daemons = folder, dict[str, subprocess.Popen[bytes]]()
        for name in ("mon", "osd", "run", "log"):
            (folder / name).mkdir(parents=True)
        self._monitor = f"[v2:127.0.0.1:{monitor_v2},v1:127.0.0.1:{monitor_v1}]"
        self._fsid, self._osd = str(uuid.uuid4()), str(uuid.uuid4())
        (folder / "ceph.conf").write_text(self._configuration())

    def start(self) -> None:
        """Starts the three daemons, makes the user, and waits until the gateway listens."""
        monmap = str(self._folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", self._monitor, monmap, conf=False)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._daemon("mon", "ceph-mon", "-i", "a")
        self._run("ceph", "osd", "new", self._osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", self._osd)
        self._daemon("osd", "ceph-osd", "-i", "0")
        keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        self._run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        self.start_gateway()

    def start_gateway(self) -> None:
        """Starts the gateway alone, and waits until it listens."""
        self._daemon("gateway", "radosgw", "-n", "client.rgw.a")
        wait_for_port(self.port)

    def kill_gateway(self) -> None:
        """Ends the gateway at once: the data stays, the store is gone."""
        self._daemons["gateway"].kill()
        self._daemons.pop("gateway").wait()

    def stop(self) -> None:
        """Ends what runs."""
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGKILL)  # there is no data to keep
            daemon.wait()

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        with (self._folder / "log" / f"{name}.out").open("ab") as log:
            command = [program, "-c", str(self._folder / "ceph.conf"), *arguments, "-f"]
            self._daemons[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _run(self, program: str, *arguments: str, conf: bool = True) -> None:
        command = [program, *(("-c", str(self._folder / "ceph.conf")) if conf else ()), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")

    def _configuration(self) -> str:
        folder = self._folder
        return f"""
[global]
fsid = {self._fsid}
mon host = {self._monitor}
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
keyring = /dev/null
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
crash dir = {folder}/log
osd pool default size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
[mon]
mon data = {folder}/mon
paxos propose interval = 0.05
mon cluster log file = {folder}/log/cluster.log
[osd]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd client watch timeout = 1
[client]
rgw frontends = beast endpoint=127.0.0.1:{self.port} tcp_nodelay=1
"""


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nothing uses now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def wait_for_port(port: int) -> None:
    """Waits until something listens. Raises `TimeoutError`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port} after {START_S:.0f} s")
