"""The one check of a finished job's output."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.spec import JobPaths
from pipeline.storage import open_store

TOLERANCE = 1e-4

Best = tuple[list[str], list[float]]  # labels and scores, best first


@dataclass(frozen=True)
class Output:
    """What a finished job left: all rows of scores, all rows of errors."""

    scores: pa.Table
    errors: pa.Table

    def best(self) -> dict[str, Best]:
        """Labels and scores by key."""
        return {row["key"]: (row["labels"], row["scores"]) for row in self.scores.to_pylist()}


def check_output(url: str, keys: Collection[str], expected: Mapping[str, Best] | None = None) -> Output:
    """Reads the output, and asserts that it holds each key once, scored or with an error, and is whole.

    `expected` gives the scores of every key that must have been scored, within `TOLERANCE`.
    """
    output = read_output(url)
    scored, failed = (table.column("key").to_pylist() for table in (output.scores, output.errors))
    twice = [key for key, count in Counter([*scored, *failed]).items() if count > 1]
    assert not twice, f"keys that stand twice: {twice[:5]}"
    assert set(scored) | set(failed) == set(keys)
    if expected is not None:
        assert set(scored) == set(expected)
        for key, (labels, scores) in output.best().items():
            assert labels == expected[key][0], key
            assert scores == pytest.approx(expected[key][1], abs=TOLERANCE), key
    return output


def read_output(url: str) -> Output:
    """All of a finished job's output; asserts that every file is readable and that nothing is left over."""
    store = open_store(url)
    names = [info.name for info in store.list()]
    assert JobPaths.SUCCESS in names
    assert not [name for name in names if name.startswith(JobPaths.STAGE)]
    plan = json.loads(store.read(JobPaths.JOB))["plan"]
    shards = [json.loads(line)["output"] for line in store.read(plan).splitlines()]
    expected = {JobPaths.JOB, plan, JobPaths.PROGRESS, JobPaths.TALLY, JobPaths.SUCCESS, *shards}
    errors = [name for name in names if name.startswith(JobPaths.ERRORS)]
    leases = [name for name in names if JobPaths.parse_lease(name)]
    assert len(leases) == 1
    assert set(names) == expected | set(errors) | set(leases)
    return Output(*(_read([store.read(name) for name in some]) for some in (shards, errors)))


def _read(files: list[bytes]) -> pa.Table:
    tables = [pq.read_table(io.BytesIO(file)).replace_schema_metadata() for file in files]
    return pa.concat_tables(tables) if tables else pa.table({"key": pa.array([], pa.string())})
