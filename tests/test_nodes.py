"""A node that dies in the middle of a job, with the replica, the tasks and the objects that it held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import open_store
from tests.check import check_output
from tests.cluster import Cluster, kill_node, ray_cluster
from tests.command import MODEL, submitting, tandem
from tests.conftest import Demo, lead_to_store, new_bucket
from tests.faults import Corpus, actors, committing, wait_for, workers, write_digits
from tests.stores import ACCESS_KEY, SECRET_KEY, Radosgw, free_ports

NODE_CPUS = 3
REPLICA_CPUS = 2  # so that head and node have room for one each, and for some tasks beside it


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, demo: Demo) -> Iterator[Cluster]:
    """A head; the demo has run before, as only one Ray may be on the machine."""
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with ray_cluster(tmp_path_factory.mktemp("ray"), keys, cpus=NODE_CPUS) as cluster:
        yield cluster


@pytest.fixture
def corpus(radosgw: Radosgw, demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    lead_to_store(monkeypatch, radosgw.port)
    return write_digits(open_store(f"s3://{new_bucket()}/in"), demo, share=0.5)


@pytest.mark.timeout(400)  # the demo, a cluster and its nodes come first
def test_a_node_that_dies_with_a_replica_and_tasks_costs_no_image(
    cluster: Cluster, corpus: Corpus, tmp_path: Path
) -> None:
    node = cluster.start_node(NODE_CPUS, "node")
    (tmp_path / "pool.yaml").write_text(f"pool: {{replicas: 2, cpus: {REPLICA_CPUS}}}")
    config, (port,) = str(tmp_path / "pool.yaml"), free_ports(1)
    served = tandem("serve", "--model", MODEL, "--port", str(port), "--config", config, "--address", cluster.address)
    assert served.code == 0, served.err
    target = open_store(f"s3://{new_bucket()}/out")

    with submitting(cluster.address, corpus.url, target.url) as process:
        wait_for(committing, target)
        assert _is_busy(cluster, "node")
        kill_node(node)
        _, err = process.communicate(timeout=170)

    assert process.returncode == 0, err
    check_output(target.url, corpus.keys, corpus.undisturbed)


def _is_busy(cluster: Cluster, name: str) -> bool:
    """Whether the node holds a replica of the pool and workers of the job."""
    node = cluster.nodes()[name]
    replicas = [one for one in actors(cluster.address) if one["class_name"].startswith("ServeReplica:tandem-pool")]
    held = [one for one in replicas if one["node_id"] == node]
    tasks = [one for one in workers(cluster.address) if one["node_id"] == node]
    return bool(held) and len(tasks) > len(held)
