"""Fixtures that many tests share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline import s3
from pipeline.storage import Store, open_store
from tests.cluster import Cluster, ray_cluster
from tests.command import MODEL, Done, tandem, tandem_in_terminal
from tests.poison import poisoned_environment
from tests.stores import ACCESS_KEY, SECRET_KEY, Radosgw, environment, free_ports, missing_programs, moto

# The same examples on every run, and none that fails because the machine is busy.
settings.register_profile("tandem", deadline=None, derandomize=True)
settings.load_profile("tandem")


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    with moto() as port:
        yield port


@pytest.fixture(scope="session")
def radosgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Radosgw]:
    """A real S3 store. Its absence fails the suite where it must be there, and skips its tests elsewhere."""
    if missing := missing_programs():
        reason = f"Ceph's {', '.join(missing)} is not installed: run .ci/install-store"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    gateway = Radosgw(tmp_path_factory.mktemp("radosgw"))
    try:
        gateway.start()
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture(params=["local", "moto", "radosgw"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store: a folder, and a prefix in a bucket of each S3 store."""
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    port = request.getfixturevalue("moto_port") if request.param == "moto" else request.getfixturevalue("radosgw").port
    lead_to_store(request.getfixturevalue("monkeypatch"), port)
    yield f"s3://{new_bucket()}/some/prefix"
    s3._client.cache_clear()


@pytest.fixture
def radosgw_bucket(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket in the real S3 store, which is the one that this process speaks to."""
    lead_to_store(monkeypatch, radosgw.port)
    yield new_bucket()
    s3._client.cache_clear()


@pytest.fixture
def store(store_url: str) -> Store:
    return open_store(store_url)


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which no `tandem serve` is known but one that the tests start in it."""
    return {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}


@dataclass(frozen=True)
class Demo:
    """A demo that has run, and the folder that it ran in."""

    done: Done
    folder: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, state: dict[str, str]) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    return Demo(tandem_in_terminal("demo", "--json", cwd=folder, environment=state), folder)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that have a Ray by a fixture: a machine takes one at a time, and the other tests may run beside.

    Those of the shared cluster come last: what starts a Ray of its own must not find another beside it.
    """
    for item in items:
        if {"demo", "state", "shared_cluster"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
    items.sort(key=lambda item: "shared_cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def address(shared_cluster: Cluster) -> str:
    """The shared cluster's job API."""
    return shared_cluster.address


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that has credentials of its own; where the store is, comes with each job.

    Its processes die of `tests.poison.POISON`.
    """
    folder = tmp_path_factory.mktemp("ray")
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with ray_cluster(folder, keys | poisoned_environment(folder / "poison")) as one:
        yield one


@pytest.fixture(scope="session")
def endpoint(address: str) -> str:
    """The URL of an endpoint that `tandem serve` deployed into the cluster."""
    (port,) = free_ports(1)
    done = tandem("serve", "--model", MODEL, "--port", str(port), "--address", address)
    assert done.code == 0, done.err
    url = f"http://127.0.0.1:{port}"
    assert url in done.out
    return url


def lead_to_store(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Makes the S3 store at `port` the one that this process, and those that it starts, speak to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(port).items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()


def new_bucket() -> str:
    """The name of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3._client().create_bucket(Bucket=name)
    return name
