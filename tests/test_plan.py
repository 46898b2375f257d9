"""A plan comes back as it was written, and a job that differs from it, or a damaged plan, is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.plan import (
    FORMAT_VERSION,
    Plan,
    check_same_input,
    check_same_model,
    check_same_spec,
    find_carried,
    find_input,
    make_plan,
    read_plan,
    write_plan,
)
from jobs.spec import MAX_TOP_K, JobPaths, JobSpec, portable
from pipeline.chunks import ChunkLimits
from pipeline.errors import JobError, NotFound, OutputConflict, UsageError
from pipeline.inputs import Columns
from pipeline.local import LocalStore
from pipeline.model_info import ModelInfo
from pipeline.shards import Found
from pipeline.transform import ImageTransform

_INFO = ModelInfo(
    model="org/name",
    revision="abc",
    labels=("cat", "dog"),
    transform=ImageTransform(height=2, width=2, resize_to=(2, 2)),
    dtype="bfloat16",
    versions={"torch": "2.13"},
)
_SPEC = JobSpec(
    input="s3://bucket/in",
    output="s3://bucket/out",
    model="org/name",
    format="parquet",
    top_k=3,
    columns=Columns(image="photo", key="name", carry=("label", "width")),
    limits=ChunkLimits(images=7, bytes=100),
)


_CARRIED = pa.schema([("label", pa.int64()), ("width", pa.timestamp("ns", "UTC"))])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of three tar shards, one of a name that is not ASCII."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.tar", "b.tar", "\u00e9.tar"):
        (folder / name).write_bytes(name.encode() * 10)
    return folder


@pytest.fixture
def plan(source: Path, tmp_path: Path) -> Plan:
    spec = JobSpec(input=str(source), output=str(tmp_path / "out"), model="org/name")
    return make_plan(spec, find_input(spec), _CARRIED, _INFO)


@pytest.fixture
def store(plan: Plan) -> LocalStore:
    """OUTPUT, with the plan written."""
    store = LocalStore(Path(plan.spec.output))
    write_plan(store, plan)
    return store


def test_a_plan_comes_back_as_it_was_written(store: LocalStore, plan: Plan) -> None:
    assert read_plan(store) == plan
    assert [shard.output for shard in plan.shards] == ["a.parquet", "b.parquet", "\u00e9.parquet"]
    assert plan.versions.keys() == {"tandem", "torch"}


def test_an_output_without_a_plan_has_none(tmp_path: Path, plan: Plan) -> None:
    store = LocalStore(tmp_path / "other")
    assert read_plan(store) is None
    write_plan(store, plan)
    store.delete([JobPaths.JOB])
    assert read_plan(store) is None, "the job file is written last, so without it there is no plan yet"


def _plan_name(store: LocalStore) -> str:
    return str(json.loads(store.read(JobPaths.JOB))["plan"])


def _edit(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps(json.loads(text) | changes).encode()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (JobPaths.JOB, lambda text: text[:40]),
        (JobPaths.JOB, lambda text: b""),
        (JobPaths.JOB, lambda text: b"[]"),
        (JobPaths.JOB, lambda text: b"\xff\xfe"),
        (JobPaths.JOB, lambda text: b'{"version": 1}'),
        (JobPaths.JOB, _edit(spec={})),
        (JobPaths.JOB, _edit(spec=None)),
        (JobPaths.PLAN, lambda text: text[:-10]),
        (JobPaths.PLAN, lambda text: text.replace(b"a.tar", b"c.tar")),
        (JobPaths.PLAN, lambda text: b""),
    ],
)
def test_a_damaged_plan_is_refused(store: LocalStore, name: str, damage: Callable[[bytes], bytes]) -> None:
    name = name if name == JobPaths.JOB else _plan_name(store)
    store.write(name, damage(store.read(name)))
    with pytest.raises(JobError, match="submit to a new OUTPUT"):
        read_plan(store)


def test_a_job_file_without_its_shards_is_refused(store: LocalStore) -> None:
    store.delete([_plan_name(store)])
    with pytest.raises(JobError, match=r"job\.json without its plan .*_tandem/plan-[0-9a-f]{16}\.jsonl does not exist"):
        read_plan(store)


def test_a_plan_of_a_later_format_is_refused_whatever_else_it_holds(store: LocalStore) -> None:
    store.write(JobPaths.JOB, b'{"version": 99}')
    with pytest.raises(JobError, match=f"format 99; this Tandem reads {FORMAT_VERSION}"):
        read_plan(store)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input": "s3://bucket/other"}, "input was 's3://bucket/in', now 's3://bucket/other'"),
        ({"model": "org/other"}, "model was 'org/name', now 'org/other'"),
        ({"format": None}, "format was 'parquet', now None"),
        ({"top_k": 4}, "top_k was 3, now 4"),
        ({"columns": Columns(image="photo", key="name", carry=("label",))}, r"columns.carry was \['label', 'width'\]"),
        ({"columns": Columns(carry=("label", "width"))}, "columns.image was 'photo', now None; columns.key was 'name'"),
    ],
)
def test_a_changed_spec_is_refused_with_the_difference(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OutputConflict, match=told):
        check_same_spec(
            make_plan(_SPEC, Found([], Counter()), _CARRIED, _INFO),
            dataclasses.replace(_SPEC, **changes),
            "s3://bucket/out",
        )


@pytest.mark.parametrize("changes", [{}, {"input": "s3://bucket/in/"}, {"output": "s3://bucket/out/"}])
def test_the_same_spec_is_not_refused_however_it_is_written(changes: dict[str, Any]) -> None:
    check_same_spec(
        make_plan(_SPEC, Found([], Counter()), _CARRIED, _INFO),
        dataclasses.replace(_SPEC, **changes),
        "s3://bucket/out",
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"revision": "def"}, "model revision was 'abc', now 'def'"),
        ({"dtype": "float32"}, "dtype was 'bfloat16', now 'float32'"),
    ],
)
def test_another_model_is_refused_with_the_difference(plan: Plan, changes: dict[str, Any], told: str) -> None:
    check_same_model(plan, _INFO, "OUTPUT")
    with pytest.raises(OutputConflict, match=told):
        check_same_model(plan, dataclasses.replace(_INFO, **changes), "OUTPUT")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "b.tar").write_bytes(b"other"), "shard b.tar changed"),
        (lambda folder: (folder / "a.tar").unlink(), "shard a.tar is gone"),
        (lambda folder: (folder / "0.tar").write_bytes(b"new"), "shard 0.tar came after"),
        (lambda folder: (folder / "a.tgz").write_bytes(b"new"), "shard a.tgz came after"),
        (lambda folder: (folder / "a.tar").rename(folder / "c.tar"), "shard a.tar is gone"),
    ],
)
def test_a_changed_input_is_refused_and_the_shard_named(
    plan: Plan, source: Path, change: Callable[[Path], None], told: str
) -> None:
    check_same_input(plan, find_input(plan.spec), "OUTPUT")
    change(source)
    with pytest.raises(OutputConflict, match=told):
        check_same_input(plan, find_input(plan.spec), "OUTPUT")


def test_an_input_can_be_one_file(source: Path, tmp_path: Path) -> None:
    spec = JobSpec(input=str(source / "b.tar"), output=str(tmp_path / "out"), model="org/name")
    assert [shard.name for shard in find_input(spec)] == ["b.tar"]


def test_an_input_that_is_not_there_is_told(tmp_path: Path) -> None:
    spec = JobSpec(input=str(tmp_path / "nope"), output=str(tmp_path / "out"), model="org/name")
    with pytest.raises(NotFound, match="nope"):
        find_input(spec)


def test_an_output_file_tells_where_it_comes_from(plan: Plan) -> None:
    metadata = plan.metadata(plan.shards[1])
    assert metadata["shard"] == "b.tar"
    assert metadata["shard_etag"] == plan.shards[1].etag
    assert (metadata["model"], metadata["revision"], metadata["dtype"]) == ("org/name", "abc", "bfloat16")
    assert metadata["version.torch"] == "2.13"
    assert all(isinstance(value, str) for value in metadata.values())


@pytest.mark.parametrize("spec", [_SPEC, JobSpec(input="s3://b/a", output="s3://b/c", model="m")])
def test_a_spec_comes_back_from_json(spec: JobSpec) -> None:
    assert JobSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("top_k", [0, -1, MAX_TOP_K + 1])
def test_a_top_k_that_cannot_be_is_refused(top_k: int) -> None:
    with pytest.raises(UsageError, match=f"--top-k is {top_k}; it can be 1 to {MAX_TOP_K}"):
        dataclasses.replace(_SPEC, top_k=top_k)


def test_a_format_that_cannot_be_is_refused_and_the_known_ones_listed() -> None:
    with pytest.raises(UsageError, match="--format is 'zip'; it can be auto, tar, parquet, images"):
        JobSpec(input="s3://b/a", output="s3://b/c", model="m", format="zip")  # type: ignore[arg-type]


_WITHIN = [
    ("s3://b/a", "s3://b/a"),
    ("s3://b/a", "s3://b/a/"),
    ("s3://b/a", "s3://b/a/out"),
    ("s3://b", "s3://b/out"),
    ("/data/in", "/data/in/out"),
    ("/data/in", "/data/x/../in/out"),
    ("/data/in", "file:///data/in"),
    ("/", "/data"),
    ("in", "in/out"),
]


@pytest.mark.parametrize(("one", "other"), [*_WITHIN, *(pair[::-1] for pair in _WITHIN)])
def test_input_and_output_within_each_other_are_refused(one: str, other: str) -> None:
    with pytest.raises(UsageError, match="lie within each other"):
        JobSpec(input=one, output=other, model="m")


@pytest.mark.parametrize(
    ("one", "other"), [("s3://b/a", "s3://b/ab"), ("s3://b/a", "s3://c/a"), ("/a", "s3://a"), ("/data/in", "/data/in2")]
)
def test_input_and_output_beside_each_other_are_not_refused(one: str, other: str) -> None:
    JobSpec(input=one, output=other, model="m")
    JobSpec(input=other, output=one, model="m")


def test_an_output_that_a_link_leads_into_the_input_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UsageError, match="lie within each other"):
        JobSpec(input=str(source), output=str(tmp_path / "link" / "out"), model="m")


@pytest.mark.parametrize(
    ("carry", "told"),
    [
        (("width", "label", "width"), "--carry width is given twice"),
        (("label", "label"), "--carry label is given twice"),
        (("label", "input_label"), "--carry label and --carry input_label would both be column input_label"),
        (("input_score", "score"), "--carry input_score and --carry score would both be column input_score"),
    ],
)
def test_carried_columns_of_one_name_are_refused(carry: tuple[str, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        dataclasses.replace(_SPEC, columns=Columns(carry=carry))


def test_a_model_folder_is_made_absolute_and_a_hub_id_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert portable("mine") == str(tmp_path / "mine")
    assert [portable(name) for name in ("org/name@main", "~nobody-here/x", "")] == [
        "org/name@main",
        "~nobody-here/x",
        "",
    ]


def test_other_limits_of_chunks_do_not_keep_a_job_from_going_on() -> None:
    plan = make_plan(_SPEC, Found([], Counter()), _CARRIED, _INFO)
    check_same_spec(plan, dataclasses.replace(_SPEC, limits=ChunkLimits()), "s3://bucket/out")
    assert plan.spec.limits == _SPEC.limits


def test_a_plan_from_before_first_chunks_were_small_keeps_its_chunks() -> None:
    content = json.loads(_SPEC.to_json())
    del content["limits"]["first"]
    limits = JobSpec.from_json(json.dumps(content)).limits
    assert [limits.images_of(index) for index in range(3)] == [_SPEC.limits.images] * 3


def _parquet(path: Path, **columns: pa.Array) -> None:
    pq.write_table(pa.table({"image": pa.array([b""], pa.binary()), **columns}), path)


def _parquet_spec(folder: Path, *carry: str) -> JobSpec:
    columns = Columns(carry=carry)
    return JobSpec(input=str(folder), output=str(folder.parent / "out"), model="org/name", columns=columns)


def test_carried_columns_have_the_types_of_the_first_shard_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"damaged")
    _parquet(tmp_path / "in" / "b.parquet", width=pa.array([7], pa.int16()))
    spec = _parquet_spec(tmp_path / "in", "width")
    assert find_carried(spec, find_input(spec).shards) == pa.schema([("width", pa.int16())])


def test_a_column_that_is_not_there_is_wrong_usage_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    _parquet(tmp_path / "in" / "a.parquet")
    spec = _parquet_spec(tmp_path / "in", "width")
    with pytest.raises(UsageError, match="no column 'width'"):
        find_carried(spec, find_input(spec).shards)


def test_damaged_shards_do_not_keep_a_job_from_its_error_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(b"damaged")
    spec = _parquet_spec(tmp_path / "in")
    assert find_carried(spec, find_input(spec).shards) == pa.schema([])
