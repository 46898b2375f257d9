"""What a job is asked to do, and where it keeps what."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, get_args

from pipeline.chunks import ChunkLimits
from pipeline.errors import UsageError
from pipeline.inputs import Columns
from pipeline.shards import Format, Shard
from pipeline.storage import absolute, open_store

MAX_TOP_K = 1000


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
        if twice := {name for name in self.columns.carry if self.columns.carry.count(name) > 1}:
            raise UsageError(f"--carry {twice.pop()} is given twice")
        source, target = (open_store(url).url.rstrip("/") + "/" for url in (self.input, self.output))
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
        return cls(**content, columns=Columns(**columns), limits=ChunkLimits(**limits))


def portable(model: str) -> str:
    """MODEL as it means the same in another process on this machine: a relative folder is made absolute."""
    from pathlib import Path

    return absolute(model) if Path(model).expanduser().is_dir() else model


class JobPaths:
    """The names of everything that a job writes, relative to OUTPUT."""

    JOB = "_tandem/job.json"  # written last when a job is planned: where it stands, the plan is whole
    PLAN = "_tandem/plan.jsonl"
    PROGRESS = "_tandem/progress.json"
    STAGE = "_tandem/stage/"
    SUCCESS = "_SUCCESS"
    ERRORS = "_errors/"

    @classmethod
    def staged(cls, shard: int, chunk: int, *, last: bool) -> str:
        """A staged chunk. The name alone tells which one it is, and whether it ends its shard."""
        return f"{cls.STAGE}{shard:08d}/{chunk:06d}{'-last' if last else ''}.arrow"

    @classmethod
    def parse_staged(cls, name: str) -> tuple[int, int, bool]:
        """The reverse of `staged`: shard, chunk, and whether it is the last."""
        shard, _, chunk = name.removeprefix(cls.STAGE).removesuffix(".arrow").partition("/")
        return int(shard), int(chunk.removesuffix("-last")), chunk.endswith("-last")

    @classmethod
    def errors(cls, shard: Shard) -> str:
        """The shard's file in the error table."""
        return cls.ERRORS + shard.output
