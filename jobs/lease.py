"""One driver for each OUTPUT: a lease in the store itself.

A lease is an object under a number, `_tandem/lease/00000003.json`. To take it is to create the next number, which a
store lets only one driver do (`If-None-Match: *`; a hard link in a folder). Who holds the highest number holds OUTPUT,
and renews the object while it works. A driver that dies leaves an object that grows old, and the next driver creates
the number after it. One that was paused, or cut off from the store, finds that its own grew old: it must create the
next number too, and stops where another driver was there first.

Ages are the store's: the drivers' clocks need not agree. A PUT may land long after it was sent, so neither side trusts
what it saw before it wrote:

- The holder of N writes N, then lists. It has renewed only if N is the highest number.
- A newcomer finds N lapsed, creates N + 1, then looks at N again. It holds OUTPUT only if N is as it was.

The store is strongly consistent, so of a renewal and a takeover that cross, at least one sees the other:

- The renewal lands before the newcomer looks again: the newcomer withdraws N + 1. The holder goes on, or stops if it
  listed N + 1 meanwhile; then nobody holds OUTPUT, and the next driver may take it.
- It lands later: the holder's listing comes later still, shows N + 1, and the holder stops. If N was deleted by then,
  the renewal created it again; a lower number has no meaning, and whoever renews or stops deletes it.
- The newcomer holds OUTPUT only if no renewal landed for `LEASE_S`. The holder counts from before it sent its last
  renewal, and so has stopped to trust its lease by then (`ROUNDING_S` makes up for times in whole seconds).
- Two newcomers at once: one creates N + 1, the other is refused. A creation that lands late, under a number that came
  and went, is lower than the highest number, and counts for nothing.
- A renewal of a driver that ended lands late: N looks renewed, and the next driver waits for it to lapse.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from jobs.spec import JobPaths
from pipeline.errors import JobError, NotFound, OutputConflict, StorageError
from pipeline.storage import Store

LEASE_S = 30.0  # a lease that is older is nobody's
RENEW_S = 3.0  # also how soon a second driver sees that the first is at work
POLL_S = 0.25
NOTICE_S = 1.5  # after which a renewal that was due is visible to others
ROUNDING_S = 0.5  # S3 states times in whole seconds: an age is off by less than one
FENCE_S = 5.0
AGE_ERROR_S = 2.0


def uptime_s() -> float:
    """A clock that goes on while the machine sleeps, unlike time.monotonic."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """OUTPUT, held for as long as the context lasts.

    `names` are those that the caller's view of OUTPUT rests on, listed from `looked_s` on, by `clock`: where another
    driver came in between, it is refused.
    """

    def __init__(
        self,
        store: Store,
        names: Iterable[str],
        *,
        looked_s: float = math.inf,
        clock: Callable[[], float] = uptime_s,
    ) -> None:
        self._store, self._clock, self._looked_s = store, clock, looked_s
        self._seen = max((number for name in names if (number := JobPaths.parse_lease(name))), default=0)
        self._number = self._seen + 1
        self.owner = uuid.uuid4().hex
        self._owner = {"owner": self.owner, "host": socket.gethostname(), "pid": os.getpid(), "place": _place()}
        self.stale = False  # another driver worked on OUTPUT after the caller had looked
        self._renewed_s = 0.0
        self._lost = False
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="tandem-lease", daemon=True)

    def __enter__(self) -> Lease:
        """Takes the lease, after waiting for one that is not renewed to end. Raises `OutputConflict`."""
        etag = self._wait_for(JobPaths.lease(self._seen)) if self._seen else ""
        if not self._take(self._number, etag):
            raise OutputConflict(f"{self._store.url}: another driver took this OUTPUT just now")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        if not self._lapsed():
            with suppress(StorageError):  # then it ends by growing old
                self._store.write(JobPaths.lease(self._number), self._content(held=False))

    def check(self) -> None:
        """Raises `JobError` where OUTPUT is another driver's by now; to be called before each commit."""
        if self._lapsed():
            self._renew()

    def _lapsed(self) -> bool:
        return self._lost or self._clock() - self._renewed_s > LEASE_S - ROUNDING_S

    def _renew(self) -> None:
        """Renews the lease or, where it lapsed and may be another driver's, takes the next. Raises `JobError`."""
        with self._renewing:
            if self._lost or not (self._take_next() if self._lapsed() else self._rewrite()):
                self._lost = True
                raise JobError(
                    f"{self._store.url}: this driver could not renew its lease for more than {LEASE_S:.0f} s, and "
                    "another driver works on this OUTPUT now"
                )

    def _rewrite(self) -> bool:
        """Renews the lease; False where a higher number is there by the time that the renewal has landed."""
        started_s = self._clock()
        self._store.write(JobPaths.lease(self._number), self._content(held=True))
        numbers = _numbers(self._store)
        newest = max(numbers, default=0)
        self._store.delete(JobPaths.lease(number) for number in numbers if number < newest)
        if newest != self._number:
            return False
        self._renewed_s = started_s
        return True

    def _take_next(self) -> bool:
        if not self._take(self._number + 1):
            return False
        self._number += 1
        return True

    def _take(self, number: int, etag: str = "") -> bool:
        """Creates the lease and drops the one before it; False where another driver has it, or one behind it.

        `etag` is that of the lease before it, as it was found lapsed: where it was renewed since, False.
        """
        started_s, name, former = self._clock(), JobPaths.lease(number), JobPaths.lease(number - 1)
        if not self._store.create(name, self._content(held=True)) and not self._owns(name):
            return False
        if _newest(self._store) != number:  # two drivers came and went since this one looked
            self._store.delete([name])
            return False
        if etag and not _unchanged(self._store, former, etag):
            self._store.delete([name])
            return False
        self._renewed_s = started_s
        if number > 1:
            self._store.delete([former])
        return True

    def _owns(self, name: str) -> bool:
        """Whether the lease is this driver's: of a try to create it whose answer was lost."""
        with suppress(NotFound):
            return bool(_read(self._store, name)["owner"] == self.owner)
        return False

    def _wait_for(self, name: str) -> str:
        """The etag of the lease `name`, once nobody holds it. Raises `OutputConflict` where it is renewed meanwhile."""
        try:
            etag = self._store.stat(name).etag
            holder = _read(self._store, name)
            looked_ago_s = self._clock() - self._looked_s
            self.stale = holder["held"] or self._store.age_s(name) < looked_ago_s + AGE_ERROR_S
            while not _free(self._store, name, holder):
                time.sleep(POLL_S)
                etag = _refuse_renewed(self._store, name, holder, etag)
        except NotFound as error:
            raise OutputConflict(f"{self._store.url}: another driver took this OUTPUT just now") from error
        return etag

    def _keep(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                self._renew()
            except StorageError:
                continue  # the store may come back; until then `check` tells
            except JobError:
                return  # it stays lapsed, and `check` tells

    def _content(self, *, held: bool) -> bytes:
        # the time makes each renewal's content, and so its tag, another
        return json.dumps({**self._owner, "held": held, "written_at": time.time()}).encode()


class Fence:
    """Keeps a driver's workers off OUTPUT once another driver has it. Travels to them, so it holds no connection."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store, self._owner = store, owner
        self._checked_s = -FENCE_S

    def check(self) -> None:
        """Raises `JobError` where another driver took OUTPUT more than `FENCE_S` ago. Asks the store that seldom."""
        if uptime_s() - self._checked_s <= FENCE_S:
            return
        started_s = uptime_s()
        newest = self._newest_owner()
        if newest not in (self._owner, None):
            raise JobError(f"{self._store.url}: another driver works on this OUTPUT now")
        if newest:
            self._checked_s = started_s

    def _newest_owner(self) -> str | None:
        """Whose the newest lease is, or None where it gave way to a newer one just now."""
        try:
            return str(_read(self._store, JobPaths.lease(_newest(self._store)))["owner"])
        except NotFound:
            return None


def refuse_held(store: Store, names: Iterable[str]) -> None:
    """Raises `OutputConflict` where another driver works on OUTPUT: within `RENEW_S` and `NOTICE_S` of this call.

    `names` are those under OUTPUT. Returns at once where the newest lease was released, lapsed, or is that of a process
    that ended; and where it was not renewed in that time: whether it lapses, `Lease` waits to see. Takes nothing.
    """
    number = max((number for name in names if (number := JobPaths.parse_lease(name))), default=0)
    if not number:
        return
    name, ends_s = JobPaths.lease(number), uptime_s() + RENEW_S + NOTICE_S
    try:
        etag = store.stat(name).etag
        holder = _read(store, name)
        while not _free(store, name, holder) and uptime_s() < ends_s:
            time.sleep(POLL_S)
            etag = _refuse_renewed(store, name, holder, etag)
    except NotFound as error:
        raise OutputConflict(f"{store.url}: another driver took this OUTPUT just now") from error


def _free(store: Store, name: str, holder: dict[str, Any]) -> bool:
    """Whether the lease is nobody's: released, lapsed, or of a process that ended."""
    return not holder["held"] or _gone(holder) or store.age_s(name) > LEASE_S + ROUNDING_S


def _refuse_renewed(store: Store, name: str, holder: dict[str, Any], etag: str) -> str:
    """The lease's etag now. Raises `OutputConflict` where its holder renewed it; where it released it, notes that."""
    now = store.stat(name).etag
    if now != etag:
        holder |= _read(store, name)
        if holder["held"]:
            told = f"process {holder['pid']} on {holder['host']}"
            raise OutputConflict(f"{store.url}: another driver works on this OUTPUT ({told})")
    return now


def _unchanged(store: Store, name: str, etag: str) -> bool:
    """Whether the lease was not written since it had `etag`; one that is gone was not."""
    with suppress(NotFound):
        return store.stat(name).etag == etag
    return True


def _numbers(store: Store) -> list[int]:
    names = (info.name for info in store.list(JobPaths.LEASE))
    return [number for name in names if (number := JobPaths.parse_lease(name))]


def _newest(store: Store) -> int:
    """The highest number of a lease, or 0."""
    return max(_numbers(store), default=0)


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(store.read(name))
        kinds = {"owner": str, "host": str, "pid": int, "place": str, "held": bool}
        return {name: kind(content[name]) for name, kind in kinds.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputConflict(f"{store.url}/{name} is not a lease; submit to a new OUTPUT") from error


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended: there is nothing to wait for."""
    if not holder["place"] or holder["place"] != _place():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _place() -> str:
    """Where process ids mean the same: a start of a machine, and a container on it. Empty where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
