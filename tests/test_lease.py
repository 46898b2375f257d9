"""One driver for each OUTPUT, on every kind of store."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from jobs import lease as module
from jobs.lease import Fence, Lease, uptime_s
from jobs.spec import JobPaths
from pipeline.errors import JobError, OutputConflict
from pipeline.local import LocalStore
from pipeline.storage import Store


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in life, but a tenth; S3 tells ages in whole seconds."""
    monkeypatch.setattr(module, "LEASE_S", 3.0)
    monkeypatch.setattr(module, "RENEW_S", 0.8)
    monkeypatch.setattr(module, "POLL_S", 0.1)


@pytest.fixture
def long_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait for a lease would take longer than any busy machine does without."""
    monkeypatch.setattr(module, "LEASE_S", 60.0)


def names(store: Store) -> list[str]:
    return [info.name for info in store.list()]


def abandon(store: Store, **differences: object) -> None:
    """Leaves the lease of a driver that ended without giving it back."""
    told = {"owner": "another", "host": "elsewhere", "pid": 1, "place": "elsewhere", "held": True, **differences}
    assert store.create(JobPaths.lease(1), json.dumps(told).encode())


def test_of_many_drivers_at_once_one_has_the_output(store: Store) -> None:
    seen, won, refused = names(store), list[Lease](), list[OutputConflict]()
    start, end = threading.Barrier(6), threading.Event()

    def drive() -> None:
        start.wait()
        try:
            with Lease(store, seen) as lease:
                won.append(lease)
                end.wait(10)
        except OutputConflict as error:
            refused.append(error)

    threads = [threading.Thread(target=drive) for _ in range(6)]
    for thread in threads:
        thread.start()
    while len(won) + len(refused) < 6:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)


@pytest.mark.usefixtures("long_lease")
def test_a_driver_that_works_keeps_another_out_and_is_named(store: Store) -> None:
    with Lease(store, names(store)) as first:
        started = time.monotonic()
        with pytest.raises(OutputConflict, match=r"another driver works on this OUTPUT \(process \d+ on "):
            Lease(store, names(store)).__enter__()
        assert time.monotonic() - started < module.LEASE_S / 2
        first.check()


def test_it_is_kept_for_longer_than_a_lease_lasts_by_renewing_it(store: Store) -> None:
    with Lease(store, names(store)) as lease:
        time.sleep(module.LEASE_S * 1.5)
        lease.check()
        with pytest.raises(OutputConflict):
            Lease(store, names(store)).__enter__()


@pytest.mark.usefixtures("long_lease")
def test_a_lease_that_was_given_back_is_taken_at_once_and_leaves_one_object(store: Store) -> None:
    for _ in range(3):
        started = time.monotonic()
        with Lease(store, names(store)) as lease:
            assert not lease.stale
            assert time.monotonic() - started < module.LEASE_S / 2
    assert names(store) == [JobPaths.lease(3)]


def test_what_a_driver_did_that_ended_since_the_caller_looked_is_looked_at_again(store: Store) -> None:
    looked_s = uptime_s()
    with Lease(store, []):
        seen = names(store)
    with Lease(store, seen, looked_s=looked_s) as after:
        assert after.stale
    with Lease(store, names(store), looked_s=uptime_s() + 60.0) as later:
        assert not later.stale


def test_a_driver_that_died_elsewhere_is_waited_for(store: Store) -> None:
    abandon(store)
    with Lease(store, names(store)) as lease:
        assert lease.stale
        assert store.age_s(JobPaths.lease(2)) <= 2
    assert names(store) == [JobPaths.lease(2)]


@pytest.mark.usefixtures("long_lease")
def test_a_process_of_this_machine_that_ended_is_not_waited_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    abandon(store, pid=_ended_process(), place=module._place())
    started = time.monotonic()
    with Lease(store, names(store)) as lease:
        assert lease.stale
        assert time.monotonic() - started < module.LEASE_S / 2


def test_the_same_process_id_on_another_machine_is_another_process(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    abandon(store, pid=_ended_process())
    started = time.monotonic()
    with Lease(store, names(store)):
        assert time.monotonic() - started >= module.LEASE_S * 0.9


def test_a_driver_that_came_between_is_not_overlooked(store: Store) -> None:
    seen = names(store)
    with Lease(store, seen):
        pass
    with pytest.raises(OutputConflict, match="just now"):
        Lease(store, seen).__enter__()


def test_a_driver_that_was_paused_and_replaced_stops_and_does_not_look_alive_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, clock = LocalStore(tmp_path), _Clock()
    with Lease(store, [], clock=clock) as paused:
        clock.now += module.LEASE_S + 1
        other = Lease(store, names(store))
        monkeypatch.setattr(store, "age_s", lambda name: module.LEASE_S + 1)
        other.__enter__()
        for _ in range(2):
            with pytest.raises(JobError, match="could not renew its lease for more than 3 s, and another driver works"):
                paused.check()
            time.sleep(module.RENEW_S * 2)
        other.check()
        other.__exit__(None, None, None)
    assert names(store) == [JobPaths.lease(2)]
    assert json.loads(store.read(JobPaths.lease(2)))["owner"] == other.owner


def test_a_driver_that_was_paused_and_not_replaced_takes_the_next_number_and_goes_on(store: Store) -> None:
    clock = _Clock()
    with Lease(store, [], clock=clock) as paused:
        clock.now += module.LEASE_S + 1
        paused.check()
        paused.check()
        assert names(store) == [JobPaths.lease(2)]
        with pytest.raises(OutputConflict, match="another driver works"):
            Lease(store, names(store)).__enter__()
    assert not json.loads(store.read(JobPaths.lease(2)))["held"]


def test_a_driver_that_slept_while_two_came_and_went_does_not_take_a_number_between(store: Store) -> None:
    clock = _Clock()
    with Lease(store, [], clock=clock) as paused:
        clock.now += module.LEASE_S + 1
        store.delete([JobPaths.lease(1)])
        store.write(JobPaths.lease(3), store_content := b'{"held": true}')
        with pytest.raises(JobError, match="another driver works"):
            paused.check()
    assert names(store) == [JobPaths.lease(3)]
    assert store.read(JobPaths.lease(3)) == store_content
    with pytest.raises(OutputConflict, match="just now"):
        Lease(store, [JobPaths.lease(1)]).__enter__()


def test_workers_go_on_while_their_own_driver_holds_the_output(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FENCE_S", 0.0)
    clock = _Clock()
    with Lease(store, [], clock=clock) as lease:
        fence = Fence(store, lease.owner)
        fence.check()
        clock.now += module.LEASE_S + 1
        lease.check()  # with the next number
        fence.check()


def test_workers_of_a_driver_that_was_replaced_are_kept_off(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FENCE_S", 0.3)
    with Lease(store, []) as first:
        fence = Fence(store, first.owner)
        fence.check()
    with Lease(store, names(store)):
        fence.check()  # asked just now
        time.sleep(module.FENCE_S)
        with pytest.raises(JobError, match="another driver works on this OUTPUT now"):
            fence.check()


def test_something_else_under_a_leases_name_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write(JobPaths.lease(1), b"not a lease")
    with pytest.raises(OutputConflict, match="is not a lease"):
        Lease(store, names(store)).__enter__()


def test_the_numbers_in_names_are_read_back() -> None:
    assert [JobPaths.parse_lease(JobPaths.lease(number)) for number in (1, 10**9)] == [1, 10**9]
    assert JobPaths.parse_lease("_tandem/lease/x.json") is None
    assert JobPaths.parse_lease("lease/00000001.json") is None


class _Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _ended_process() -> int:
    import subprocess
    import sys

    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid
