"""What a driver finds out and decides without Ray: before the work, and around a commit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError

from deployments.config import Config, PoolConfig
from jobs import lease, run
from jobs.commit import commit_shard
from jobs.failures import receipts
from jobs.plan import Plan, drop_other_plans, find_input, make_plan, read_plan, write_plan
from jobs.prepare import prepare
from jobs.receipts import Receipt
from jobs.run import run_job
from jobs.spec import JobPaths, JobSpec
from pipeline.chunks import ChunkLimits, chunks, to_ipc
from pipeline.errors import Denied, JobError, OutputConflict, StorageError, TandemError
from pipeline.inputs import Columns, open_reader
from pipeline.local import LocalStore
from pipeline.model_info import ModelInfo
from pipeline.output import scored
from pipeline.storage import Store
from pipeline.transform import ImageTransform
from tests.corpora import tar_of
from tests.faults import names_in

INFO = ModelInfo(
    model="org/name",
    revision="abc",
    labels=("cat", "dog"),
    transform=ImageTransform(height=2, width=2, resize_to=(2, 2)),
    dtype="float32",
    versions={},
)
REPORT = {
    "output": "OUT", "model": "org/name", "revision": "abc", "shards": 1, "resumed": 0,
    "images": 2, "scored": 1, "errors": 1,
    "skipped": {"hidden": 3}, "run_images": 2, "seconds": 1.0, "startup_s": 0.5, "images_per_s": 4.0,
    "replicas": {"a": 2}, "stage_seconds": {},
}  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    LocalStore(tmp_path / "in").write("a.tar", tar_of({"one.png": b"1", "two.png": b"2"}))
    return JobSpec(input=str(tmp_path / "in"), output=str(tmp_path / "out"), model="org/name", top_k=1)


def test_looking_at_an_output_leaves_nothing_in_it(spec: JobSpec) -> None:
    job = prepare(spec)
    assert names_in(job.store) == []
    assert [shard.name for shard in job.found] == ["a.tar"]


def test_a_store_that_cannot_keep_two_drivers_apart_is_refused(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self: LocalStore, name: str, data: bytes) -> bool:
        self.write(name, data)
        return True

    monkeypatch.setattr(LocalStore, "create", create)
    with pytest.raises(StorageError, match="ignores conditional writes"):
        prepare(spec)


def test_what_a_driver_left_that_died_before_its_plan_counted_is_no_foreign_file(spec: JobSpec) -> None:
    store = LocalStore(Path(spec.output))
    for name in (JobPaths.plan("0" * 64), JobPaths.lease(1), f"{JobPaths.PROBE}1234"):
        store.write(name, b"{}")
    assert prepare(spec).plan is None

    store.write("theirs.txt", b"")
    with pytest.raises(OutputConflict, match=r"holds other files \(theirs.txt\)"):
        prepare(spec)


def test_a_job_that_another_driver_finishes_meanwhile_is_done(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "give_way", lambda: None)
    store = LocalStore(Path(spec.output))
    write_plan(store, _plan(spec))
    store.write(JobPaths.lease(1), _lease_of_one_who_died())
    job = prepare(spec)
    store.write(JobPaths.SUCCESS, json.dumps(REPORT).encode())

    report = run_job(job, Config())

    assert (report.resumed, report.run_images) == (1, 0)
    assert (report.images, report.scored, report.errors, report.skipped) == (2, 1, 1, {"hidden": 3})
    assert json.loads(store.read(JobPaths.SUCCESS)) == REPORT


def test_what_a_late_worker_staged_is_dropped_when_a_finished_job_is_submitted_again(spec: JobSpec) -> None:
    store, plan = LocalStore(Path(spec.output)), _plan(spec)
    write_plan(store, plan)
    _stage(store, plan)
    store.write(JobPaths.SUCCESS, json.dumps(REPORT).encode())
    assert prepare(spec).report is not None
    assert names_in(store) == sorted([JobPaths.SUCCESS, JobPaths.JOB, json.loads(store.read(JobPaths.JOB))["plan"]])


def test_of_two_drivers_that_plan_at_once_both_go_by_the_plan_that_stands(spec: JobSpec) -> None:
    store = LocalStore(Path(spec.output))
    first, second = _plan(spec), replace(_plan(spec), versions={"tandem": "another"})
    assert write_plan(store, first) == first
    assert write_plan(store, second) == first

    LocalStore(Path(spec.input)).write("b.tar", tar_of({"one.png": b"1"}))
    with pytest.raises(OutputConflict, match=r"b\.tar came after the job was planned"):
        write_plan(store, _plan(spec))
    with pytest.raises(OutputConflict, match="top_k was 1, now 2"):
        write_plan(store, replace(first, spec=replace(spec, top_k=2)))
    assert read_plan(store) == first


def test_plans_that_never_counted_are_dropped(spec: JobSpec) -> None:
    store, plan = LocalStore(Path(spec.output)), _plan(spec)
    write_plan(store, plan)
    before = names_in(store)
    store.write(JobPaths.plan("0" * 64), b"of a driver that died")
    drop_other_plans(store)
    assert names_in(store) == before
    assert read_plan(store) == plan


def test_a_stage_that_is_gone_is_no_loss_where_the_output_stands(spec: JobSpec) -> None:
    job, plan = prepare(spec), _plan(spec)
    staged = _stage(job.store, plan)
    commit_shard(job.store, plan, plan.shards[0], staged)
    before = job.store.read("a.parquet")

    commit_shard(job.store, plan, plan.shards[0], staged)

    assert names_in(job.store) == ["a.parquet"]
    assert job.store.read("a.parquet") == before
    assert pq.read_table(pa.BufferReader(before)).column("key").to_pylist() == ["one", "two"]


def test_an_error_file_of_an_earlier_try_does_not_outlive_it(spec: JobSpec) -> None:
    job, plan = prepare(spec), _plan(spec)
    job.store.write(JobPaths.errors(plan.shards[0]), b"of a driver that died before it wrote the output")
    commit_shard(job.store, plan, plan.shards[0], _stage(job.store, plan))
    assert names_in(job.store) == ["a.parquet"]


@pytest.mark.parametrize(
    ("raised", "kind", "told"),
    [
        (Denied("the disk is full"), Denied, "the disk is full"),
        (TypeError("no such argument"), JobError, "a worker failed: TypeError: no such argument"),
        (MemoryError(), JobError, "a worker failed: MemoryError"),
    ],
)
def test_an_error_of_a_worker_is_told_in_its_own_words(raised: Exception, kind: type[TandemError], told: str) -> None:
    class Path:
        def receipts(self, work: object, pool: object) -> Iterator[Receipt]:
            advice = "\nTo change retry attempts, configure Ray"  # as Ray Data adds it
            raised.args = (f"{raised}{advice}",) if raised.args else ()
            raise RayTaskError("map", "a stack", raised).as_instanceof_cause()
            yield

    with pytest.raises(TandemError) as caught:
        list(receipts(Path(), [], PoolConfig()))  # type: ignore[arg-type]
    assert (type(caught.value), str(caught.value)) == (kind, told)


def test_a_stage_that_is_gone_without_an_output_is_told(spec: JobSpec) -> None:
    job, plan = prepare(spec), _plan(spec)
    staged = _stage(job.store, plan)
    job.store.delete(staged[:1])
    with pytest.raises(JobError, match=r"staged chunks of a.tar are gone .*000000.arrow"):
        commit_shard(job.store, plan, plan.shards[0], staged)
    assert "a.parquet" not in names_in(job.store)


def _plan(spec: JobSpec) -> Plan:
    return make_plan(spec, find_input(spec), pa.schema([]), INFO)


def _stage(store: Store, plan: Plan) -> list[str]:
    """Stages the shard's two images as chunks of one."""
    names = []
    source: Store = LocalStore(Path(plan.spec.input))
    for chunk in chunks(open_reader(source, plan.shards[0], Columns()), "a.tar", ChunkLimits(images=1)):
        rows = scored(chunk.rows, INFO.labels, np.array([[1]]), np.array([[0.5]], np.float32))
        names.append(JobPaths.staged(0, chunk.index, last=chunk.last))
        store.write(names[-1], to_ipc(rows))
    return names


def _lease_of_one_who_died() -> bytes:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    told = {"owner": "x", "host": "here", "pid": process.pid, "place": lease._place(), "held": True}
    return json.dumps(told).encode()
