"""Random faults of all kinds, one after another, over a job that is submitted until it is done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from jobs.spec import JobPaths
from pipeline import s3
from pipeline.storage import Store, open_store
from tests.check import check_output
from tests.cluster import Cluster, kill_node, ray_cluster
from tests.command import MODEL, submit, tandem
from tests.conftest import Demo, lead_to_store, new_bucket
from tests.faults import Corpus, actors, driver, names_in, title, workers, write_digits
from tests.proxy import Faults, Proxy
from tests.stores import ACCESS_KEY, SECRET_KEY, Radosgw, free_ports

SEED = int(os.environ.get("TANDEM_SOAK_SEED", "1"))
NODE_CPUS = 3
PATIENCE_S = 300.0
POOL = "pool: {replicas: 2, cpus: 1}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, demo: Demo) -> Iterator[Cluster]:
    """A head and a node, each with room for a replica and tasks."""
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    folder = tmp_path_factory.mktemp("ray")
    with ray_cluster(folder, keys, cpus=NODE_CPUS) as cluster:
        (folder / "pool.yaml").write_text(POOL)
        options = ("--port", str(*free_ports(1)), "--config", str(folder / "pool.yaml"), "--address", cluster.address)
        served = tandem("serve", "--model", MODEL, *options)
        assert served.code == 0, served.err
        yield cluster


@pytest.fixture
def proxy(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(radosgw.port) as proxy:
        lead_to_store(monkeypatch, proxy.port)
        yield proxy
    s3._client.cache_clear()


@pytest.mark.timeout(400)
def test_a_minute_of_faults_costs_no_image(cluster: Cluster, proxy: Proxy, radosgw: Radosgw, demo: Demo) -> None:
    _soak(cluster, proxy, radosgw, demo, copies=1, faults=5, pause_s=4, away_s=4)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_minutes_of_faults_cost_no_image(cluster: Cluster, proxy: Proxy, radosgw: Radosgw, demo: Demo) -> None:
    told = _soak(cluster, proxy, radosgw, demo, copies=11, faults=5 * len(Chaos.FAULTS), pause_s=10, away_s=10)
    assert all(told[fault.__name__] for fault in Chaos.FAULTS)


def _soak(
    cluster: Cluster, proxy: Proxy, radosgw: Radosgw, demo: Demo, *, copies: int, faults: int, pause_s: float,
    away_s: float,
) -> Counter[str]:  # fmt: skip
    """Submits one job after another until `faults` went on meanwhile, each until it is done and checked."""
    corpus = write_digits(open_store(f"s3://{new_bucket()}/in"), demo, copies=copies)
    chaos = Chaos(cluster, proxy, radosgw, pause_s=pause_s, away_s=away_s)
    while chaos.told.total() < faults:
        target = f"s3://{new_bucket()}/out"
        chaos.target = open_store(target)
        with chaos:
            _submit_until_done(cluster, corpus, target, lambda: chaos.told.total() < faults)
        assert _submit_until_done(cluster, corpus, target, _for(PATIENCE_S))
        check_output(target, corpus.keys, corpus.undisturbed)
        print(f"job done and checked; faults so far: {dict(chaos.told)}")
    return chaos.told


def _submit_until_done(cluster: Cluster, corpus: Corpus, target: str, going_on: Callable[[], bool]) -> bool:
    """Submits the job again and again; True once it is done, False when it goes on no longer."""
    while going_on():
        with suppress(subprocess.TimeoutExpired):  # then it goes on, and the next is refused
            done = submit(cluster.address, corpus.url, target)
            print(f"    ended with {done.code}: {(done.err.splitlines() or [''])[0]}")
            if done.code == 0:
                return True
        time.sleep(1)
    return False


def _for(seconds: float) -> Callable[[], bool]:
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() < end_s


class Chaos:
    """Faults at random, while the context lasts; as it ends, all that was taken away is given back."""

    def __init__(self, cluster: Cluster, proxy: Proxy, radosgw: Radosgw, *, pause_s: float, away_s: float) -> None:
        self.target: Store | None = None
        self.told: Counter[str] = Counter()
        self._cluster, self._proxy, self._radosgw = cluster, proxy, radosgw
        self._pause_s, self._away_s = pause_s, away_s
        self._random = random.Random(SEED)
        self._node: subprocess.Popen[bytes] | None = None
        self._nodes = 0
        self._errors: list[BaseException] = []

    def __enter__(self) -> None:
        self._add_node()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._proxy.faults = Faults()
        assert not self._errors, self._errors

    def _run(self) -> None:
        deck: list[Callable[[Chaos], bool]] = []
        try:
            while not self._end.wait(self._pause_s * self._random.uniform(0.5, 1.5)):
                deck = deck or self._random.sample(self.FAULTS, len(self.FAULTS))
                # one that finds nobody, as between two drivers, has its turn later
                fault = next((fault for fault in reversed(deck) if fault(self)), None)
                if fault:
                    deck.remove(fault)
                    self.told[fault.__name__] += 1
        except BaseException as error:
            self._errors.append(error)

    def kill_replica(self) -> bool:
        found = [one["pid"] for one in actors(self._cluster.address) if "pool" in one["class_name"]]
        return self._kill(found)

    def kill_caller(self) -> bool:
        found = [one["pid"] for one in actors(self._cluster.address) if "_Caller" in one["class_name"]]
        return self._kill(found)

    def kill_task(self) -> bool:
        found = [one["pid"] for one in workers(self._cluster.address)]
        return self._kill([one for one in found if title(one).startswith(("ray::Read", "ray::MapBatches"))])

    def kill_driver(self) -> bool:
        return self._kill(self._drivers())

    def stop_driver(self) -> bool:
        return self._kill(self._drivers(), signal.SIGTERM)

    def pause_driver(self) -> bool:
        paused = self._drivers()
        done = self._kill(paused, signal.SIGSTOP)
        self._end.wait(self._away_s)
        self._kill(paused, signal.SIGCONT)
        return done

    def lose_store(self) -> bool:
        self._radosgw.kill_gateway()
        self._end.wait(self._away_s)
        self._radosgw.start_gateway()
        return True

    def spoil_answers(self) -> bool:
        kind = self._random.choice(["slow_down", "reset", "short", "stall"])
        self._proxy.faults = Faults(**{kind: 0.1}, seed=self._random.randrange(1000))  # type: ignore[arg-type]
        self._end.wait(self._away_s)
        self._proxy.faults = Faults()
        return True

    def kill_node(self) -> bool:
        assert self._node is not None
        kill_node(self._node)
        self._end.wait(self._away_s)
        self._node = None
        self._add_node()
        return True

    FAULTS = (
        kill_replica, kill_caller, kill_task, kill_driver, stop_driver, pause_driver, lose_store, spoil_answers,
        kill_node,
    )  # fmt: skip

    def _add_node(self) -> None:
        if self._node is None:
            self._nodes += 1
            self._node = self._cluster.start_node(NODE_CPUS, f"node-{self._nodes}")

    def _drivers(self) -> list[int]:
        assert self.target is not None
        leased = any(JobPaths.parse_lease(name) for name in names_in(self.target))
        return [driver(self.target)] if leased else []

    def _kill(self, processes: list[int], kind: signal.Signals = signal.SIGKILL) -> bool:
        """Sends a signal to one of the processes, if there is one."""
        # one that has ended has no title; what has its number now would be another's
        living = [process for process in processes if title(process).startswith(("ray::", "python"))]
        if not living:
            return False
        with suppress(ProcessLookupError):
            os.kill(self._random.choice(living), kind)
        return True
