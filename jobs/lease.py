"""One driver for each OUTPUT: a lease in the store itself.

A lease is an object under a number, `_tandem/lease/00000003.json`. To take it is to create the next number, which a
store lets only one driver do (`If-None-Match: *`; a hard link in a folder). Who holds the highest number holds OUTPUT,
and renews the object while it works. A driver that dies leaves an object that grows old, and the next driver creates
the number after it; one that was paused finds that its own grew old, and stops before it writes any more.

Ages are told by the store's clock alone, so the drivers' clocks need not agree.
"""

from __future__ import annotations

import json
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
RENEW_S = 8.0  # three renewals may fail
POLL_S = 1.0


class Lease:
    """OUTPUT, held for as long as the context lasts.

    `names` are those that the caller's view of OUTPUT rests on: where another driver came in between, it is refused.
    """

    def __init__(self, store: Store, names: Iterable[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._seen = max((number for name in names if (number := JobPaths.parse_lease(name))), default=0)
        self._name = JobPaths.lease(self._seen + 1)
        self._owner = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "place": _place()}
        self.waited = False  # for another driver's lease to end: what the caller has seen of OUTPUT may be old
        self._renewed_s = 0.0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="tandem-lease", daemon=True)

    def __enter__(self) -> Lease:
        """Takes the lease, after waiting for one that is not renewed to end. Raises `OutputConflict`."""
        if self._seen:
            self._wait_for(JobPaths.lease(self._seen))
        started_s = self._clock()
        if not self._store.create(self._name, self._content(held=True)):
            raise OutputConflict(f"{self._store.url}: another driver took this OUTPUT just now")
        self._renewed_s = started_s
        if self._seen:
            self._store.delete([JobPaths.lease(self._seen)])
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()
        if self._clock() - self._renewed_s < LEASE_S:
            with suppress(StorageError):  # then it ends by growing old
                self._store.write(self._name, self._content(held=False))

    def check(self) -> None:
        """Raises `JobError` where OUTPUT may be another driver's by now; to be called before each commit."""
        if (age_s := self._clock() - self._renewed_s) > LEASE_S:
            raise JobError(
                f"{self._store.url}: this driver could not renew its lease for {age_s:.0f} s, and another one may work "
                "here now; submit the job again to go on with it"
            )

    def _wait_for(self, name: str) -> None:
        """Waits until nobody holds the lease `name`. Raises `OutputConflict` where it is renewed meanwhile."""
        try:
            holder, etag = self._read(name), self._store.stat(name).etag
            self.waited = holder["held"]
            while holder["held"] and not _gone(holder) and self._store.age_s(name) <= LEASE_S:
                time.sleep(POLL_S)
                if self._store.stat(name).etag != etag and self._read(name)["held"]:
                    told = f"process {holder['pid']} on {holder['host']}"
                    raise OutputConflict(f"{self._store.url}: another driver works on this OUTPUT ({told})")
        except NotFound as error:
            raise OutputConflict(f"{self._store.url}: another driver took this OUTPUT just now") from error

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(self._store.read(name))
            kinds = {"host": str, "pid": int, "place": str, "held": bool}
            return {name: kind(content[name]) for name, kind in kinds.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise OutputConflict(f"{self._store.url}/{name} is not a lease; submit to a new OUTPUT") from error

    def _keep(self) -> None:
        while not self._released.wait(RENEW_S):
            started_s = self._clock()
            if started_s - self._renewed_s > LEASE_S:
                return  # too late: it may be taken, and must not look held again
            try:
                self._store.write(self._name, self._content(held=True))
            except StorageError:
                continue  # `check` tells, if it goes on
            self._renewed_s = started_s

    def _content(self, *, held: bool) -> bytes:
        # the time makes each renewal's content, and so its tag, another
        return json.dumps({**self._owner, "held": held, "written_at": time.time()}).encode()


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
