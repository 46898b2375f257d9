"""What a job is asked to do, and where it keeps what."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any, get_args

from pipeline.chunks import ChunkLimits, carried_name
from pipeline.errors import UsageError
from pipeline.inputs import Columns
from pipeline.shards import Format, Shard
from pipeline.storage import absolute, open_store

MAX_TOP_K = 1000
_LEASE = re.compile(r"([0-9]{8,})\.json")
_STAGED = re.compile(r"([0-9]{8,})/([0-9]{6,})(-last)?\.arrow")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A batch job: everything that decides its output. `format` None means: told by the names under INPUT."""

    input: str
    output: str
    model: str
    format: Format | None = None
    top_k: int = 5
    columns: Columns = field(default_factory=Columns)
    limits: ChunkLimits = field(default_factory=ChunkLimits)

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MAX_TOP_K:
            raise UsageError(f"--top-k is {self.top_k}; it can be 1 to {MAX_TOP_K}")
        if self.format is not None and self.format not in get_args(Format):
            raise UsageError(f"--format is {self.format!r}; it can be auto, {', '.join(get_args(Format))}")
        _check_carried(self.columns.carry)
        source, target = _root(self.input), _root(self.output)
        if source.startswith(target) or target.startswith(source):
            raise UsageError(
                f"INPUT {self.input} and OUTPUT {self.output} lie within each other; choose another OUTPUT"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        """The reverse of `to_json`."""
        content: dict[str, Any] = json.loads(text)
        columns, limits = content.pop("columns"), content.pop("limits")
        columns["carry"] = tuple(columns["carry"])
        limits.setdefault("first", limits["images"])  # in a plan of before there was such a limit, it did not hold
        return cls(**content, columns=Columns(**columns), limits=ChunkLimits(**limits))


def _check_carried(names: tuple[str, ...]) -> None:
    sources: dict[str, str] = {}
    for name in names:
        column = carried_name(name)
        if sources.get(column) == name:
            raise UsageError(f"--carry {name} is given twice")
        if column in sources:
            raise UsageError(f"--carry {sources[column]} and --carry {name} would both be column {column} of OUTPUT")
        sources[column] = name


def _root(url: str) -> str:
    """The store's URL, ending in a slash, so that one starts with another only where it lies within."""
    return open_store(url).url.rstrip("/") + "/"


def portable(model: str) -> str:
    """MODEL as it means the same in another process on this machine: a relative folder is made absolute."""
    return absolute(model) if model and os.path.isdir(os.path.expanduser(model)) else model


class JobPaths:
    """The names of everything that a job writes, relative to OUTPUT."""

    FOLDER = "_tandem/"
    JOB = "_tandem/job.json"  # written last when a job is planned: where it stands, the plan is whole
    PLAN = "_tandem/plan-"  # and a digest of the content: of the plans there, `job.json` names the one that counts
    PROGRESS = "_tandem/progress.json"
    TALLY = "_tandem/tally.json"
    STAGE = "_tandem/stage/"
    PROBE = "_tandem/stage/probe-"  # under the stage, so that none outlives a job
    LEASE = "_tandem/lease/"
    SUCCESS = "_SUCCESS"
    ERRORS = "_errors/"

    @classmethod
    def plan(cls, sha256: str) -> str:
        """The shards of a plan, by the SHA-256 of their lines, in hexadecimal."""
        return f"{cls.PLAN}{sha256[:16]}.jsonl"

    @classmethod
    def staged(cls, shard: int, chunk: int, *, last: bool) -> str:
        """A staged chunk. The name alone tells which one it is, and whether it ends its shard."""
        return f"{cls.STAGE}{shard:08d}/{chunk:06d}{'-last' if last else ''}.arrow"

    @classmethod
    def parse_staged(cls, name: str) -> tuple[int, int, bool] | None:
        """The reverse of `staged`: shard, chunk, and whether it is the last; None for a name of another kind."""
        match = _STAGED.fullmatch(name.removeprefix(cls.STAGE)) if name.startswith(cls.STAGE) else None
        return (int(match[1]), int(match[2]), match[3] is not None) if match else None

    @classmethod
    def lease(cls, number: int) -> str:
        """The `number`-th lease of OUTPUT, from 1."""
        return f"{cls.LEASE}{number:08d}.json"

    @classmethod
    def parse_lease(cls, name: str) -> int | None:
        """The reverse of `lease`; None for a name of another kind."""
        match = _LEASE.fullmatch(name.removeprefix(cls.LEASE)) if name.startswith(cls.LEASE) else None
        return int(match[1]) if match else None

    @classmethod
    def errors(cls, shard: Shard) -> str:
        """The shard's file in the error table."""
        return cls.ERRORS + shard.output
