"""The plan: what the input held and which model scores it, written before any work, compared when a job goes on."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from jobs.spec import JobPaths, JobSpec
from pipeline import __version__
from pipeline.chunks import ChunkLimits
from pipeline.errors import JobError, NotFound, OutputConflict, Refused, ShardError, UsageError
from pipeline.inputs import Columns, open_reader
from pipeline.inputs.tar_scan import check_suffixes
from pipeline.model_info import ModelInfo
from pipeline.shards import Found, Shard, find_shards
from pipeline.storage import Store, open_store, split_object
from pipeline.witness import Witnessed

FORMAT_VERSION = 2
SHARDS_TRIED = 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job's spec, the model that scores, the columns that are carried along, and its shards in order.

    `skipped` counts the objects under INPUT that are in no shard, by reason.
    """

    spec: JobSpec
    revision: str
    dtype: str
    versions: dict[str, str]
    carried: pa.Schema
    shards: list[Shard]
    skipped: dict[str, int] = field(default_factory=dict)

    def metadata(self, shard: Shard) -> dict[str, str]:
        """What an output file says of its origin."""
        return {
            "input": f"{self.spec.input.rstrip('/')}",
            "shard": shard.name,
            "shard_etag": shard.etag,
            "model": self.spec.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "top_k": str(self.spec.top_k),
            **{f"version.{name}": number for name, number in self.versions.items()},
        }


def find_input(spec: JobSpec) -> Found:
    """The shards that INPUT holds now: a prefix, a folder, or one object. Raises `NotFound`, `UsageError`."""
    if single := split_object(spec.input):
        store, name = single
        return find_shards([store.stat(name)], format=spec.format, where=spec.input)
    return find_shards(open_store(spec.input).list(), format=spec.format, where=spec.input)


def input_store(spec: JobSpec) -> Store:
    """The store whose names the plan's shards are."""
    single = split_object(spec.input)
    return single[0] if single else open_store(spec.input)


def find_carried(spec: JobSpec, shards: Sequence[Shard], witness: str = "") -> pa.Schema:
    """The columns that are carried along, with the types that the first readable shard gives them.

    `witness` names an object that can be read, beside which one that cannot is refused alone.

    Raises `UsageError` where the first shards do not have what is asked for, or where they leave a choice open.
    """
    store, problems = Witnessed(input_store(spec), witness), []
    if shards and shards[0].format == "tar" and (spec.columns.carry or spec.columns.image):
        with suppress(ShardError, Refused):  # damaged ones have error rows
            check_suffixes(store, shards[:SHARDS_TRIED], spec.columns)
    for shard in shards[:SHARDS_TRIED]:
        try:
            with closing(open_reader(store, shard, spec.columns)) as reader:
                return reader.carried
        except (ShardError, Refused) as error:
            problems.append(str(error))
    if spec.columns != Columns():
        raise UsageError(problems[0])
    return pa.schema([])  # damaged, all of them: each is told in the error table


def make_plan(spec: JobSpec, found: Found, carried: pa.Schema, info: ModelInfo) -> Plan:
    """The plan of a new job."""
    return Plan(
        spec=spec,
        revision=info.revision,
        dtype=info.dtype,
        versions={"tandem": __version__, **info.versions},
        carried=carried,
        shards=found.shards,
        skipped=dict(found.skipped),
    )


def write_plan(store: Store, plan: Plan) -> Plan:
    """Writes the plan: first its shards, then the file that makes it count, unless another driver was first.

    Returns the plan that stands. Raises `OutputConflict` where that is another job's, or another INPUT's.
    """
    lines = "".join(json.dumps(dataclasses.asdict(shard)) + "\n" for shard in plan.shards).encode()
    digest = hashlib.sha256(lines).hexdigest()
    store.write(JobPaths.plan(digest), lines)
    job = {
        "version": FORMAT_VERSION,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": json.loads(plan.spec.to_json()),
        "revision": plan.revision,
        "dtype": plan.dtype,
        "versions": plan.versions,
        "carried": base64.b64encode(plan.carried.serialize()).decode(),
        "shards": len(plan.shards),
        "skipped": plan.skipped,
        "plan": JobPaths.plan(digest),
        "plan_sha256": digest,
    }
    if store.create(JobPaths.JOB, json.dumps(job, indent=2).encode()):
        return plan
    standing = read_plan(store)
    if standing is None:
        raise OutputConflict(f"{store.url}: another driver planned a job here and removed it; submit again")
    check_same_spec(standing, plan.spec, plan.spec.output)
    check_same_input(standing, plan.shards, plan.spec.output)
    return standing


def drop_other_plans(store: Store) -> None:
    """Deletes the shards of plans that never counted: of drivers that died, or lost the race to plan."""
    standing = json.loads(store.read(JobPaths.JOB))["plan"]
    names = [info.name for info in store.list(JobPaths.FOLDER)]
    store.delete(name for name in names if name.startswith(JobPaths.PLAN) and name != standing)


def read_plan(store: Store) -> Plan | None:
    """The plan that OUTPUT holds, or None. Raises `JobError` for one that is damaged or of another version."""
    try:
        written = store.read(JobPaths.JOB)
    except NotFound:
        return None
    try:
        job: dict[str, Any] = json.loads(written)
        if job["version"] != FORMAT_VERSION:
            raise JobError(
                f"{store.url} holds a job of format {job['version']}; this Tandem reads {FORMAT_VERSION}; {_NEW}"
            )
        lines = store.read(job["plan"])
        if hashlib.sha256(lines).hexdigest() != job["plan_sha256"]:
            raise JobError(f"{store.url}/{job['plan']} does not belong to {JobPaths.JOB}; {_NEW}")
        return Plan(
            spec=JobSpec.from_json(json.dumps(job["spec"])),
            revision=job["revision"],
            dtype=job["dtype"],
            versions=job["versions"],
            carried=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(job["carried"]))),
            shards=[Shard(**json.loads(line)) for line in lines.splitlines()],
            skipped=job.get("skipped", {}),
        )
    except NotFound as error:
        raise JobError(f"{store.url} holds {JobPaths.JOB} without its plan ({error}); {_NEW}") from error
    except (ValueError, KeyError, TypeError, AttributeError, UsageError, pa.ArrowException) as error:
        raise JobError(f"{store.url}/{JobPaths.JOB} is damaged ({error!r}); {_NEW}") from error


def check_same_spec(plan: Plan, spec: JobSpec, where: str) -> None:
    """Raises `OutputConflict` where the plan, which was found at the spec's OUTPUT, asked for something else."""
    old, new = (_comparable(one) for one in (plan.spec, spec))
    _refuse({name: (old[name], new[name]) for name in old if old[name] != new[name]}, where)


def check_same_model(plan: Plan, info: ModelInfo, where: str) -> None:
    """Raises `OutputConflict` where another revision or precision would score the rest."""
    pairs = {"model revision": (plan.revision, info.revision), "dtype": (plan.dtype, info.dtype)}
    _refuse({name: pair for name, pair in pairs.items() if pair[0] != pair[1]}, where)


def check_same_input(plan: Plan, shards: Iterable[Shard], where: str) -> None:
    """Raises `OutputConflict`, naming the first shard that changed, came or went since the job was planned."""
    old, new = ({shard.name: shard for shard in some} for some in (plan.shards, shards))
    # in this order: one that came or went also changes the numbers of those behind it
    if gone := [name for name in old if name not in new]:
        raise OutputConflict(f"{where}: input shard {gone[0]} is gone since the job was planned; restore it, or {_NEW}")
    if came := [name for name in new if name not in old]:
        raise OutputConflict(f"{where}: input shard {came[0]} came after the job was planned; {_NEW}")
    for name in old:
        if old[name] != new[name]:
            raise OutputConflict(f"{where}: input shard {name} changed since the job was planned; {_NEW}")


_NEW = "submit to a new OUTPUT"


def _refuse(differences: dict[str, tuple[Any, Any]], where: str) -> None:
    if differences:
        told = "; ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in differences.items())
        raise OutputConflict(f"{where} belongs to a job that differs: {told}; repeat that job's options, or {_NEW}")


def _comparable(spec: JobSpec) -> dict[str, Any]:
    flat = _flat(json.loads(spec.to_json()))
    del flat["output"]  # it may be written in several ways, and is the same one: it holds the plan
    for limit in fields(ChunkLimits):
        del flat[f"limits.{limit.name}"]  # those of the plan stay in force
    return flat | {"input": spec.input.rstrip("/")}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
