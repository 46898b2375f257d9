"""The pool on Ray's own autoscaler: nodes come with a job and with requests, and go when nobody wants them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jobs.corpus import digits, encode
from jobs.online import Online
from pipeline.storage import open_store
from tests.check import check_output
from tests.cluster import Cluster
from tests.command import MODEL, submitting, tandem
from tests.conftest import Demo
from tests.faults import committing, wait_for, wait_until, write_digits
from tests.stores import free_ports

HEAD_CPUS = 3
MOST_NODES = 3
NODES_WITHIN_S = 150.0
# A logical GPU and all CPUs of a node for each replica, so that each has a node to itself. Steps of one image, so that
# a job waits for the pool and not for its decoders.
POOL = """
pool:
  max_step: {max_step}
  replicas: 0
  max_replicas: 2
  batch_max_replicas: 3
  upscale_delay_s: 1
  downscale_delay_s: 5
  max_surge_percent: 100
  gpus: 1
  cpus: 1
  device: cpu
  threads: 1
endpoint:
  timeout_s: 60
"""


@pytest.fixture
def cluster(tmp_path: Path, demo: Demo) -> Iterator[Cluster]:
    """A head that starts and stops nodes; the demo has run before, as only one Ray may be on the machine."""
    (tmp_path / "ray").mkdir()
    cluster = Cluster(tmp_path / "ray", {})
    try:
        cluster.start_autoscaling_head(HEAD_CPUS, MOST_NODES)
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.timeout(700)  # nodes, replicas and delays
def test_a_pool_grows_with_a_job_changes_under_requests_and_goes_to_zero_and_back(
    cluster: Cluster, demo: Demo, tmp_path: Path
) -> None:
    corpus = write_digits(open_store(str(tmp_path / "in")), demo, copies=4, per_shard=256)
    target = open_store(str(tmp_path / "out"))
    url = _serve(cluster, tmp_path)
    assert cluster.gpu_nodes() == 1

    with Online(5.0) as online, Online(10.0) as burst:
        with online.to(url):
            with submitting(cluster.address, corpus.url, target.url) as job:
                wait_for(committing, target)
                with burst.to(url):
                    wait_until(lambda: cluster.gpu_nodes() == MOST_NODES, NODES_WITHIN_S)
                _, err = job.communicate(timeout=170)
                assert job.returncode == 0, err
            _serve(cluster, tmp_path, url, max_step=2)  # another version of the deployment: all are replaced
            wait_until(lambda: cluster.gpu_nodes() == 1, NODES_WITHIN_S)
        assert online.answers.errors == burst.answers.errors == 0
        assert len(online.answers.replicas) >= 3
    check_output(target.url, corpus.keys, corpus.undisturbed)

    wait_until(lambda: cluster.gpu_nodes() == 0, NODES_WITHIN_S)
    assert httpx.get(f"{url}/readyz").is_success, "a pool that sleeps is ready, and is not woken to tell"
    assert cluster.gpu_nodes() == 0
    woken = httpx.post(f"{url}/predict", content=encode(digits()[0])[1], timeout=60)
    assert woken.is_success, woken.text
    assert cluster.gpu_nodes() == 1


def _serve(cluster: Cluster, folder: Path, url: str = "", *, max_step: int = 1) -> str:
    """`tandem serve`, also again with another configuration; returns the URL."""
    port = url.rpartition(":")[2] or str(free_ports(1)[0])
    config = folder / f"{time.monotonic_ns()}.yaml"
    config.write_text(POOL.format(max_step=max_step))
    served = tandem("serve", "--model", MODEL, "--port", port, "--config", str(config), "--address", cluster.address)
    assert served.code == 0, served.err
    return f"http://127.0.0.1:{port}"
