"""What of a job that cannot work is found before it runs: a look at INPUT and OUTPUT, without Ray."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa

from jobs.lease import uptime_s
from jobs.plan import Plan, check_same_input, check_same_spec, find_carried, find_input, input_store, read_plan
from jobs.report import Report, read_report
from jobs.spec import JobPaths, JobSpec
from pipeline.errors import OutputConflict, StorageError
from pipeline.shards import Found
from pipeline.storage import Store, open_store
from pipeline.witness import find_witness


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job that may run, and what INPUT and OUTPUT held at `looked_s`, by the clock of `Lease`.

    A new job has no `plan`; a finished one has a `report`. `witness` names an object of INPUT that can be read.
    """

    spec: JobSpec
    store: Store
    plan: Plan | None
    carried: pa.Schema
    found: Found
    names: list[str]
    looked_s: float
    witness: str = ""
    report: Report | None = None


def prepare(spec: JobSpec) -> Prepared:
    """Looks at INPUT and OUTPUT, without Ray: what cannot work is found here, in the time of two listings.

    Raises `StorageError` (`Denied` where OUTPUT cannot be written), `UsageError`, and `OutputConflict` for an OUTPUT
    that is another job's or nobody's.
    """
    looked_s, store = uptime_s(), open_store(spec.output)
    plan = read_plan(store)
    names = [info.name for info in store.list()] if plan else _foreign(store)
    if plan is not None:
        check_same_spec(plan, spec, spec.output)
        if JobPaths.SUCCESS in names:
            store.delete(name for name in names if name.startswith(JobPaths.STAGE))  # of a late worker
            report = read_report(plan, store)
            return Prepared(
                spec=spec, store=store, plan=plan, carried=plan.carried, names=names, looked_s=looked_s, report=report,
                found=Found(plan.shards, Counter(plan.skipped)),
            )  # fmt: skip
    found = find_input(spec)
    if plan is not None:
        check_same_input(plan, found, spec.output)
    witness = find_witness(input_store(spec), found.shards)
    carried = plan.carried if plan else find_carried(spec, found.shards, witness)
    _probe(store)
    return Prepared(
        spec=spec, store=store, plan=plan, carried=carried, found=found, names=names, looked_s=looked_s, witness=witness
    )


def _foreign(store: Store) -> list[str]:
    """The names under an OUTPUT without a plan, which must be none but what a driver writes before the plan counts."""
    names = []
    for info in store.list():
        ours = info.name.startswith((JobPaths.PLAN, JobPaths.PROBE)) or JobPaths.parse_lease(info.name)
        if not ours:
            raise OutputConflict(f"{store.url} holds other files ({info.name}); choose an OUTPUT that is empty")
        names.append(info.name)
    return names


def _probe(store: Store) -> None:
    """Finds out what OUTPUT allows before there is work to lose. Raises `Denied`, `StorageError`."""
    name = f"{JobPaths.PROBE}{uuid.uuid4().hex}"
    store.create(name, b"first")
    created = store.create(name, b"second")
    store.delete([name])
    if created:
        raise StorageError(
            f"{store.url}: the store ignores conditional writes (If-None-Match), which keep two drivers apart; choose "
            "an OUTPUT in one that has them, as AWS S3, Ceph, MinIO and R2 do"
        )
