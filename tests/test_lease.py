"""One driver for each OUTPUT, on every kind of store."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

import pytest

from jobs import lease as module
from jobs.lease import Fence, Lease, refuse_held, uptime_s
from jobs.spec import JobPaths
from pipeline.errors import JobError, NotFound, OutputConflict
from pipeline.local import LocalStore
from pipeline.storage import ObjectInfo, Store


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
    monkeypatch.setattr(module, "FENCE_S", 60.0)
    with Lease(store, []) as first:
        fence = Fence(store, first.owner)
        fence.check()
    with Lease(store, names(store)):
        fence.check()  # asked just now
        monkeypatch.setattr(module, "FENCE_S", 0.0)
        with pytest.raises(JobError, match="another driver works on this OUTPUT now"):
            fence.check()


def test_a_renewal_that_lands_after_a_takeover_ends_the_driver_that_sent_it(tmp_path: Path) -> None:
    paused, clock = _Late(tmp_path), _Clock()
    other = LocalStore(tmp_path)
    with Lease(paused, [], clock=clock) as first, ExitStack() as later:
        second = Lease(_Old(tmp_path), names(other), clock=clock)
        clock.now += module.LEASE_S - 1
        paused.before_write = lambda: later.enter_context(second)
        with pytest.raises(JobError, match="another driver works"):
            first._renew()
        with pytest.raises(JobError, match="another driver works"):
            first.check()
        second.check()
        assert names(other) == [JobPaths.lease(2)]


def test_a_renewal_that_lands_while_a_newcomer_takes_over_keeps_the_newcomer_out(tmp_path: Path) -> None:
    clock = _Clock()
    with Lease(LocalStore(tmp_path), [], clock=clock) as first:
        newcomer = _Old(tmp_path)
        newcomer.before_create = first._renew
        with pytest.raises(OutputConflict, match="just now"):
            Lease(newcomer, names(newcomer), clock=clock).__enter__()
        first.check()
        assert names(newcomer) == [JobPaths.lease(1)]


def test_a_lease_that_was_created_by_a_lost_call_is_this_drivers(tmp_path: Path) -> None:
    clock = _Clock()
    with Lease(LocalStore(tmp_path), [], clock=clock) as lease:
        LocalStore(tmp_path).create(JobPaths.lease(2), lease._content(held=True))
        clock.now += module.LEASE_S + 1
        lease.check()
        assert names(LocalStore(tmp_path)) == [JobPaths.lease(2)]


@pytest.mark.usefixtures("long_lease")
@pytest.mark.parametrize("seed", range(10))
def test_in_any_order_of_requests_no_two_drivers_hold_the_output(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        world = _World()
        try:
            for _ in range(15):
                world.now += chance.choice((0.0, 2.0, module.LEASE_S - 1))
                driver = chance.randrange(2)
                for _ in range(chance.choice((1, 2, 3, 4, 12))):
                    world.step(driver)
                    assert len(world.holders()) <= 1
        finally:
            world.end()


@pytest.mark.usefixtures("long_lease")
def test_an_output_in_use_is_refused_before_a_lease_is_taken(store: Store) -> None:
    with Lease(store, names(store)):
        before = names(store)
        with pytest.raises(OutputConflict, match=r"another driver works on this OUTPUT \(process \d+ on "):
            refuse_held(store, before)
        assert names(store) == before
    refuse_held(store, names(store))  # it was released
    refuse_held(store, [])


def test_a_lease_that_is_not_renewed_is_left_to_the_one_who_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEASE_S", 60.0)
    monkeypatch.setattr(module, "NOTICE_S", 0.1)
    store = LocalStore(tmp_path)
    abandon(store)
    refuse_held(store, names(store))
    assert names(store) == [JobPaths.lease(1)]

    monkeypatch.setattr(module, "RENEW_S", 60.0)  # at once: its process ended
    store.write(JobPaths.lease(1), b"{}")
    store.delete([JobPaths.lease(1)])
    abandon(store, pid=_ended_process(), place=module._place())
    refuse_held(store, names(store))


def test_something_else_under_a_leases_name_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.write(JobPaths.lease(1), b"not a lease")
    with pytest.raises(OutputConflict, match="is not a lease"):
        Lease(store, names(store)).__enter__()


def test_the_numbers_in_names_are_read_back() -> None:
    assert [JobPaths.parse_lease(JobPaths.lease(number)) for number in (1, 10**9)] == [1, 10**9]
    assert JobPaths.parse_lease("_tandem/lease/x.json") is None
    assert JobPaths.parse_lease("lease/00000001.json") is None


class _Late(LocalStore):
    """A folder in which something happens before a write lands."""

    before_write: Callable[[], object] | None = None

    def write(self, name: str, data: bytes) -> None:
        happens, self.before_write = self.before_write, None
        if happens:
            happens()
        super().write(name, data)


class _Old(LocalStore):
    """A folder whose leases look lapsed, and in which something happens before one is created."""

    before_create: Callable[[], object] | None = None

    def age_s(self, name: str) -> float:
        return module.LEASE_S + 1

    def create(self, name: str, data: bytes) -> bool:
        happens, self.before_create = self.before_create, None
        if happens:
            happens()
        return super().create(name, data)


class _World:
    """A store in memory, two drivers that take OUTPUT and renew for ever, and one clock.

    Each driver is a thread that stops before and after each of its requests, and runs on when it is stepped. So a PUT
    can land long after it was sent, and its answer come long after that.
    """

    url = "memory"

    def __init__(self) -> None:
        self.now, self._count, self._ended = 1000.0, 0, False
        self._objects: dict[str, tuple[bytes, float, str]] = {}
        self._leases: dict[int, Lease] = {}
        self._turns = [threading.Semaphore(0) for _ in range(2)]
        self._stopped = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._drive, args=(driver,)) for driver in range(2)]
        self._number = {thread: driver for driver, thread in enumerate(self._threads)}
        for thread in self._threads:
            thread.start()

    def step(self, driver: int) -> None:
        """Lets the driver run to its next request, or the end of it."""
        self._turns[driver].release()
        self._stopped.acquire()

    def end(self) -> None:
        self._ended = True
        for driver, thread in enumerate(self._threads):
            self._turns[driver].release()
            thread.join()

    def holders(self) -> list[int]:
        """The drivers that would commit now, without another look at the store."""
        return [driver for driver, lease in self._leases.items() if not lease._lapsed()]

    def _drive(self, driver: int) -> None:
        with suppress(_Ended):
            self._turns[driver].acquire()
            while not self._ended:
                with suppress(JobError):
                    self._take_and_renew(driver)
                self._leases.pop(driver, None)
                self._turn()

    def _take_and_renew(self, driver: int) -> None:
        if self._held():
            return
        lease = Lease(cast(Store, self), [*self._objects], clock=lambda: self.now)
        etag = lease._wait_for(JobPaths.lease(lease._seen)) if lease._seen else ""
        if not lease._take(lease._number, etag):
            return
        self._leases[driver] = lease
        while True:
            self._turn()
            lease._renew()

    def _held(self) -> bool:
        """Whether a newcomer would sleep, which is no step of a simulation."""
        newest = max(self._objects, default="")
        return bool(newest) and self.now - self._objects[newest][1] <= module.LEASE_S + module.ROUNDING_S

    def _turn(self) -> None:
        self._stopped.release()
        self._turns[self._number[threading.current_thread()]].acquire()
        if self._ended:
            raise _Ended

    def write(self, name: str, data: bytes) -> None:
        self._turn()
        self._put(name, data)
        self._turn()

    def create(self, name: str, data: bytes) -> bool:
        self._turn()
        if created := name not in self._objects:
            self._put(name, data)
        self._turn()
        return created

    def _put(self, name: str, data: bytes) -> None:
        self._count += 1
        self._objects[name] = data, self.now, str(self._count)

    def read(self, name: str, *, etag: str = "") -> bytes:
        self._turn()
        return self._object(name)[0]

    def stat(self, name: str) -> ObjectInfo:
        self._turn()
        data, _, etag = self._object(name)
        return ObjectInfo(name=name, size=len(data), etag=etag)

    def age_s(self, name: str) -> float:
        return self.now - self._object(name)[1]

    def list(self, under: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        self._turn()
        return iter([ObjectInfo(name=name, size=0, etag="") for name in sorted(self._objects)])

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._turn()
            self._objects.pop(name, None)

    def _object(self, name: str) -> tuple[bytes, float, str]:
        if name not in self._objects:
            raise NotFound(name)
        return self._objects[name]


class _Ended(BaseException):
    """The simulation is over."""


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
