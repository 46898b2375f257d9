"""Counts add up to a shard's and a job's, whichever runs did the work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.commit import commit_shard, committed_counts
from jobs.plan import Plan
from jobs.receipts import Receipt, Tally
from jobs.spec import JobPaths, JobSpec
from jobs.totals import ranges, read_totals, write_tally
from pipeline.chunks import OWN_FIELDS, Chunk, ChunkLimits, chunks, from_ipc, to_ipc
from pipeline.counts import Counts
from pipeline.errors import JobError, ShardError
from pipeline.inputs import Sample
from pipeline.local import LocalStore
from pipeline.output import SCORE_FIELDS, scored, with_errors
from pipeline.shards import Fingerprint, Shard
from pipeline.storage import ObjectInfo

SHARDS = [
    Shard(number=number, name=f"{number}.tar", format="tar", output=f"{number}.parquet", size=1000, etag="e")
    for number in range(6)
]


class CutReader:
    """A shard that ends early, behind some images of 100 bytes."""

    carried = pa.schema([])

    def __init__(self, images: int, error: Exception | None = None) -> None:
        self._images, self._error, self.skipped = images, error, Counter[str]()

    def __iter__(self) -> Iterator[Sample]:
        for row in range(self._images):
            yield Sample(row=row, key=str(row), data=b"x" * 100)
        self.skipped["hidden"] += 2
        if self._error:
            raise self._error

    def close(self) -> None: ...


def counted(reader: CutReader, shard: Shard = SHARDS[0]) -> Counts:
    total = Counts()
    for chunk in chunks(reader, shard.name, ChunkLimits(images=4)):
        total += Counts.of_chunk(chunk, shard, total)
    return total


def rows_of(good: int, bad: int) -> pa.Table:
    count = good + bad
    own = [
        [str(row) for row in range(count)], list(range(count)), [None] * good + ["decode"] * bad,
        [None] * good + ["broken"] * bad,
    ]  # fmt: skip
    scores = [["cat"] * count, [1.0] * count, [["cat"]] * count, [[1.0]] * count]
    return pa.table([*own, *scores], schema=pa.schema([*OWN_FIELDS, *SCORE_FIELDS]))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    spec = JobSpec(input="/in", output=str(tmp_path / "out"), model="m")
    return Plan(spec=spec, revision="r", dtype="float32", versions={}, carried=pa.schema([]), shards=SHARDS)


@pytest.fixture
def store(plan: Plan) -> LocalStore:
    return LocalStore(Path(plan.spec.output))


def commit(store: LocalStore, plan: Plan, number: int, *, good: int = 3, bad: int = 2) -> Counts:
    """Commits a shard of two chunks, the last of which skipped something."""
    names = []
    for chunk, last in enumerate((False, True)):
        read = Counts(read=good, bytes=10 * good, whole_shards=int(last), skipped=Counter(x=1) if last else Counter())
        names.append(JobPaths.staged(number, chunk, last=last))
        store.write(names[-1], to_ipc(rows_of(good, bad).replace_schema_metadata(read.to_metadata())))
    return commit_shard(store, plan, plan.shards[number], names)


def test_a_shard_that_ends_early_has_lost_what_its_size_tells() -> None:
    cut = counted(CutReader(6, ShardError("cut off")))
    assert (cut.rows, cut.read, cut.bytes, cut.lost, cut.unread_bytes) == (7, 6, 600, 0, 400)
    assert (cut.whole_shards, cut.estimated) == (0, 4)
    assert cut.skipped == {"hidden": 2}


def test_a_reader_that_knows_what_is_lost_is_believed() -> None:
    cut = counted(CutReader(6, ShardError("cut off", lost=90)))
    assert (cut.rows, cut.lost, cut.unread_bytes) == (7, 89, 0)  # the error row stands for one of them


def test_a_slice_of_files_shows_how_many_were_lost() -> None:
    files = Fingerprint()
    for number in range(50):
        files.add(ObjectInfo(name=f"{number}.jpg", size=9, etag="e"))
    shard = Shard(number=0, name="images-0", format="images", output="o", size=450, etag=files.etag())
    assert (shard.images, SHARDS[0].images) == (50, None)
    assert counted(CutReader(0, ShardError("changed")), shard).lost == 49
    assert counted(CutReader(6, ShardError("changed")), shard).lost == 43


def test_a_whole_shard_has_lost_nothing() -> None:
    whole = counted(CutReader(6))
    assert (whole.rows, whole.lost, whole.estimated, whole.whole_shards) == (6, 0, 0, 1)


def test_the_last_chunk_alone_has_what_its_shard_skipped() -> None:
    made: list[Chunk] = list(chunks(CutReader(9), "s", ChunkLimits(images=4)))
    assert [dict(chunk.skipped) for chunk in made] == [{}, {}, {"hidden": 2}]


def test_what_was_counted_as_it_was_read_survives_decoding_and_scoring() -> None:
    import numpy as np

    (chunk,) = chunks(CutReader(3), "s", ChunkLimits())
    read = Counts.of_chunk(chunk, SHARDS[0], Counts())
    rows = from_ipc(to_ipc(chunk.rows.replace_schema_metadata(read.to_metadata())))
    rows = with_errors(rows, "decode", [None, "broken", None])
    rows = from_ipc(to_ipc(scored(rows, ("cat",), np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32))))
    counts = Counts.of_staged(rows)
    assert (counts.rows, counts.errors, counts.scored, counts.read, counts.bytes) == (3, 1, 2, 3, 300)
    assert (counts.skipped, counts.example) == ({"hidden": 2}, "broken")


def test_a_footer_holds_the_counts_of_its_shard(store: LocalStore, plan: Plan) -> None:
    counts = commit(store, plan, 0)
    assert (counts.rows, counts.errors, counts.whole_rows, counts.skipped) == (10, 4, 10, {"x": 1})
    assert committed_counts(store, SHARDS[0]) == counts

    store.write("1.parquet", b"not Parquet")
    with pytest.raises(JobError, match=r"1\.parquet is not an output file of this job"):
        committed_counts(store, SHARDS[1])


@pytest.mark.parametrize("tally", ["current", "older", "none", "damaged", "of a shard that is gone"])
def test_totals_are_the_same_with_whatever_tally_there_is(store: LocalStore, plan: Plan, tally: str) -> None:
    each = [commit(store, plan, number, good=number + 1) for number in range(4)]
    total = sum(each, Counts())
    if tally == "current":
        write_tally(store, range(4), total)
    elif tally == "older":
        write_tally(store, [0, 2], each[0] + each[2])
    elif tally == "damaged":
        store.write(JobPaths.TALLY, b'{"shards": [[0, 3]], "counts": {"rows": -1}}')
    elif tally == "of a shard that is gone":
        write_tally(store, range(6), total + Counts(rows=999))
    assert read_totals(store, SHARDS, range(4)) == total


def test_a_tally_that_covers_all_saves_reading_footers(store: LocalStore) -> None:
    write_tally(store, range(6), Counts(rows=7))
    assert read_totals(store, SHARDS, range(6)) == Counts(rows=7)  # there is no file at all
    assert ranges([5, 0, 1, 2, 7, 8]) == [(0, 2), (5, 5), (7, 8)]


def test_a_commit_replaces_what_receipts_reported() -> None:
    def receipt(shard: int) -> Receipt:
        return Receipt(
            shard=shard, chunk=0, last=False, rows=10, errors=1, bytes=1, read_s=0, decode_s=0, score_s=0, stage_s=0,
            replica="", example="broken", counts=json.dumps(Counts(rows=10, errors=1).to_dict()),
        )  # fmt: skip

    tally = Tally()
    for shard in (0, 0, 1):  # one chunk of shard 0 came twice
        tally.add(receipt(shard))
    assert (tally.images, tally.errors) == (30, 3)
    tally.commit(0, Counts(rows=25, errors=1))
    tally.commit(2, Counts(rows=5))  # staged by an earlier run
    assert (tally.images, tally.errors, tally.run_images) == (40, 2, 30)


def test_failures_weigh_by_images_and_the_message_states_what_is_estimated() -> None:
    tally = Tally(committed=Counts(rows=101, errors=1, read=100, bytes=1000, lost=49, unread_bytes=500, example="cut"))
    with pytest.raises(JobError) as caught:
        tally.check_errors(0.4, at_least=0)
    assert "100 of 200 images failed (49 lost with their shards, an estimated 50 in shards" in str(caught.value)
    tally.check_errors(0.5, at_least=0)


def test_a_job_that_scored_nothing_fails() -> None:
    with pytest.raises(JobError, match=r"no image was scored: 3 failed \(the first: broken\)"):
        Tally(committed=Counts(rows=3, errors=3, example="broken")).check_scored()
    with pytest.raises(JobError, match="no image was scored: INPUT holds none"):
        Tally().check_scored()
    Tally(committed=Counts(rows=3, errors=2)).check_scored()
