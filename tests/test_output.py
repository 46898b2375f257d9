"""Scores stand beside the rows that they belong to, and a shard's files can be read by everyone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import daft
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import output
from pipeline.chunks import ERROR, STAGE, Chunk, ChunkLimits, chunks, failed_shard, from_ipc, rows_schema, to_ipc
from pipeline.errors import ShardError
from pipeline.inputs import Sample
from pipeline.output import SCORE_FIELDS, scored, scored_or_failed, shard_files, with_errors
from tests.test_chunks import CARRIED, ListReader, samples

LABELS = ("cat", "dog", "ünïcorn")
TOP_K = 2


def chunk_of(mask: Sequence[bool], error: Exception | None = None, carried: pa.Schema = CARRIED) -> Chunk:
    """One chunk with an image in each row where `mask` is true."""
    given = samples([3 if good else None for good in mask])
    if not carried.names:
        given = [Sample(row=one.row, key=one.key, data=one.data, error=one.error) for one in given]
    (chunk,) = chunks(ListReader(given, error, carried), "shard", ChunkLimits(images=1000))
    return chunk


def scores_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that tell their place: that of the n-th image is n + 0.5."""
    top_NK = np.stack([np.arange(count) % 3, (np.arange(count) + 1) % 3], axis=1).astype(np.int32)
    return top_NK, np.stack([np.arange(count) + 0.5, np.zeros(count)], axis=1).astype(np.float32)


def staged(mask: Sequence[bool], error: Exception | None = None, carried: pa.Schema = CARRIED) -> pa.Table:
    """A chunk as it is staged and read again."""
    chunk = chunk_of(mask, error, carried)
    return from_ipc(to_ipc(scored(from_ipc(to_ipc(chunk.rows)), LABELS, *scores_of(len(chunk.images)))))


def files(*stages: pa.Table) -> tuple[pa.Table, pa.Table | None]:
    scores, errors = shard_files(stages, "a.tar", {"model": "a model"})
    return pq.read_table(io.BytesIO(scores)), pq.read_table(io.BytesIO(errors)) if errors else None


_masks = st.lists(st.booleans(), max_size=40)


# Rows


@given(mask=_masks)
def test_scores_stand_beside_the_rows_without_an_error(mask: list[bool]) -> None:
    table = staged(mask)
    place = 0
    for good, row in zip(mask, table.to_pylist(), strict=True):
        expected: dict[str, Any] = dict.fromkeys(field.name for field in SCORE_FIELDS)
        if good:
            names = [LABELS[place % 3], LABELS[(place + 1) % 3]]
            expected = {"label": names[0], "score": place + 0.5, "labels": names, "scores": [place + 0.5, 0.0]}
            place += 1
        assert {name: row[name] for name in expected} == expected
    assert table.schema == pa.schema([*rows_schema(CARRIED), *SCORE_FIELDS])


@given(mask=_masks, failed=st.lists(st.booleans(), min_size=40, max_size=40))
def test_decode_errors_stand_beside_the_rows_that_had_none(mask: list[bool], failed: list[bool]) -> None:
    before = chunk_of(mask).rows
    good = [row for row, is_good in enumerate(mask) if is_good]
    errors = [f"no image {row}" if fails else None for row, fails in zip(good, failed, strict=False)]
    after = with_errors(from_ipc(to_ipc(before)), "decode", errors)
    assert after.schema == before.schema
    told = dict(zip(good, errors, strict=True))
    for row, (old, new) in enumerate(zip(before.to_pylist(), after.to_pylist(), strict=True)):
        error = told.get(row)
        assert new == ({**old, "stage": "decode", "error": error} if error else old)


@given(mask=_masks, failed=st.lists(st.booleans(), min_size=40, max_size=40))
def test_scores_follow_what_decode_left(mask: list[bool], failed: list[bool]) -> None:
    rows = chunk_of(mask).rows
    errors = ["bad" if fails else None for fails in failed[: sum(mask)]]
    left = errors.count(None)
    table = scored(with_errors(rows, "decode", errors), LABELS, *scores_of(left))
    assert [score for score in table["score"].to_pylist() if score is not None] == [n + 0.5 for n in range(left)]
    assert [score is None for score in table["score"].to_pylist()] == [
        s is not None for s in table["stage"].to_pylist()
    ]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_results_that_do_not_match_the_rows_are_refused(count: int) -> None:
    rows = chunk_of([True, False, True, True]).rows
    with pytest.raises(ValueError, match=f"3 rows without an error, but {count}"):
        scored(rows, LABELS, *scores_of(count))
    with pytest.raises(ValueError, match=f"3 rows without an error, but {count}"):
        with_errors(rows, "decode", [None] * count)


def test_an_error_need_not_be_utf8() -> None:
    table = with_errors(chunk_of([True]).rows, "decode", ["caf\udce9"])
    assert table["error"].to_pylist() == ["caf\\xe9"]


# Files

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        ("row", pa.int64()),
        ("label", pa.string()),
        ("score", pa.float32()),
        ("labels", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("input_label", pa.int8()),
        ("tags", pa.list_(pa.string())),
        ("kind", pa.dictionary("int8", "string")),
    ]
)
ERROR_SCHEMA = pa.schema([*list(SCHEMA)[:3], ("stage", pa.string()), ("error", pa.string())])


@given(masks=st.lists(_masks, min_size=1, max_size=4))
def test_every_row_is_in_one_of_the_two_files(masks: list[list[bool]]) -> None:
    scores, errors = files(*map(staged, masks))
    good = [f"k{row}" for mask in masks for row, is_good in enumerate(mask) if is_good]
    bad = [f"k{row}" for mask in masks for row, is_good in enumerate(mask) if not is_good]
    assert scores["key"].to_pylist() == good
    assert scores.schema.equals(SCHEMA)
    assert scores["label"].null_count == scores["score"].null_count == 0
    if errors is None:
        assert bad == []
    else:
        assert errors["key"].to_pylist() == bad != []
        assert errors.schema.equals(ERROR_SCHEMA)


def test_what_was_carried_stays_beside_its_row() -> None:
    scores, _ = files(staged([True, False, True, True]))
    assert scores.select(["row", "input_label", "tags", "kind"]).to_pylist() == [
        {"row": 0, "input_label": 0, "tags": None, "kind": "kind 0"},
        {"row": 2, "input_label": 2, "tags": ["2"], "kind": "kind 0"},
        {"row": 3, "input_label": 3, "tags": None, "kind": "kind 1"},
    ]


def test_a_shard_of_errors_alone_has_a_file_without_rows() -> None:
    scores, errors = files(staged([False, False]))
    assert len(scores) == 0
    assert scores.schema.equals(SCHEMA)
    assert errors is not None
    assert len(errors) == 2


def test_a_shard_without_samples_has_a_file_without_rows() -> None:
    scores, errors = files(staged([]))
    assert (len(scores), errors) == (0, None)
    assert scores.schema.equals(SCHEMA)


def test_a_shard_that_breaks_off_keeps_its_rows_and_its_schema() -> None:
    scores, errors = files(staged([True] * 3), staged([True, False], ShardError("cut off")))
    assert len(scores) == 4
    assert scores.schema.equals(SCHEMA)
    assert errors is not None
    assert errors.select(["key", "shard", "row", "error"]).to_pylist() == [
        {"key": "k1", "shard": "a.tar", "row": 1, "error": "bad 1"},
        {"key": "shard", "shard": "a.tar", "row": None, "error": "cut off"},
    ]


def test_a_shard_that_cannot_be_opened_has_both_files() -> None:
    nothing = np.empty((0, TOP_K))
    rows = failed_shard("a.tar", ShardError("no archive"), pa.schema([])).rows
    scores, errors = files(scored(rows, LABELS, nothing.astype(np.int32), nothing.astype(np.float32)))
    assert len(scores) == 0
    assert scores.schema.names == SCHEMA.names[:7]
    assert errors is not None
    assert errors["error"].to_pylist() == ["no archive"]


def test_both_files_tell_where_they_come_from() -> None:
    made = shard_files([staged([True, False])], "caf\udce9.tar", {"model": "m", "shard": "caf\udce9.tar"})
    for data in made:
        metadata = pq.read_schema(io.BytesIO(data or b"")).metadata
        assert metadata[b"tandem.model"] == b"m"
        assert metadata[b"tandem.shard"] == b"caf\\xe9.tar"
        assert pq.read_table(io.BytesIO(data or b""))["shard"].to_pylist() == ["caf\\xe9.tar"]


def test_large_shards_are_written_in_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "ROW_GROUP_ROWS", 25)
    data, errors = shard_files([staged([True] * 10) for _ in range(10)], "a.tar", {})
    assert errors is None
    file = pq.ParquetFile(io.BytesIO(data))
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sum(sizes) == 100
    assert max(sizes) <= 25
    assert len(sizes) <= 8
    assert file.read()["key"].to_pylist() == [f"k{row}" for row in range(10)] * 10


# Readers


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The output of three shards, the second of errors alone, and their error files."""
    (tmp_path / "_errors").mkdir()
    for name, mask in {"a": [True, False, True], "b": [False, False], "c": [True]}.items():
        scores, errors = shard_files([staged(mask)], f"{name}.tar", {"model": "m"})
        (tmp_path / f"{name}.parquet").write_bytes(scores)
        if errors:
            (tmp_path / "_errors" / f"{name}.parquet").write_bytes(errors)
    return tmp_path


EXPECTED = [
    ("k0", "a.tar", "cat", 0.5, ["cat", "dog"]),
    ("k2", "a.tar", "dog", 1.5, ["dog", "ünïcorn"]),
    ("k0", "c.tar", "cat", 0.5, ["cat", "dog"]),
]
COLUMNS = ["key", "shard", "label", "score", "labels"]


def test_pyarrow_reads_the_folder_and_leaves_the_errors_out(written: Path) -> None:
    table = pyarrow.dataset.dataset(written).to_table(columns=COLUMNS)
    assert [tuple(row.values()) for row in table.to_pylist()] == EXPECTED
    assert pyarrow.dataset.dataset(written / "_errors").to_table()["error"].to_pylist() == ["bad 1", "bad 0", "bad 1"]


def test_pandas_reads_the_folder(written: Path) -> None:
    frame = pd.read_parquet(written).sort_values(["shard", "row"])
    assert [(*row[:4], list(row[4])) for row in frame[COLUMNS].itertuples(index=False)] == EXPECTED


def test_duckdb_reads_the_folder(written: Path) -> None:
    with duckdb.connect() as connection:
        found = connection.execute(f"select {', '.join(COLUMNS)} from '{written}/*.parquet' order by shard, row")
        assert found.fetchall() == EXPECTED


def test_daft_reads_the_folder(written: Path) -> None:
    table = daft.read_parquet(f"{written}/*.parquet").sort(["shard", "row"]).select(*COLUMNS).to_pydict()
    assert list(zip(*(table[name] for name in COLUMNS), strict=True)) == EXPECTED


def test_scores_that_are_no_numbers_make_error_rows() -> None:
    rows = chunk_of([True, False, True, True]).rows
    top_NK, scores_NK = scores_of(3)
    scores_NK[1] = np.nan

    found = scored_or_failed(rows, LABELS, top_NK, scores_NK)

    assert found[STAGE].to_pylist() == [None, "read", "score", None]
    assert "not finite" in found[ERROR][2].as_py()
    assert [score is None for score in found["score"].to_pylist()] == [False, True, True, False]
    assert found["scores"].to_pylist()[3] == scores_NK[2].tolist()
