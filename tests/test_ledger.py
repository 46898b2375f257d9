"""What is known of a job's progress is the same, whichever way and in whatever order it was learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.ledger import Ledger
from jobs.spec import JobPaths
from pipeline.shards import Shard

_SHARDS = [
    Shard(number=number, name=f"{number}.tar", format="tar", output=f"{number}.parquet", size=1, etag="e")
    for number in range(4)
]
Receipt = tuple[int, int, bool]


@st.composite
def _jobs(draw: st.DrawFn) -> tuple[list[int], list[Receipt]]:
    """The number of chunks of each shard, and receipts for some of them, in any order, some repeated."""
    counts = draw(st.lists(st.integers(1, 5), min_size=len(_SHARDS), max_size=len(_SHARDS)))
    every = [(shard, chunk, chunk == count - 1) for shard, count in enumerate(counts) for chunk in range(count)]
    return counts, draw(st.lists(st.sampled_from(every), max_size=40))


def _state(ledger: Ledger) -> list[object]:
    shards = [(ledger.staged(n), ledger.names(n), ledger.committed(n)) for n in range(len(_SHARDS))]
    return [*shards, ledger.ready(), ledger.leftovers(), ledger.done]


@given(_jobs())
def test_names_and_receipts_tell_the_same(job: tuple[list[int], list[Receipt]]) -> None:
    _, receipts = job
    told = Ledger(_SHARDS, [])
    for receipt in receipts:
        told.stage(*receipt)
    names = {JobPaths.staged(shard, chunk, last=last) for shard, chunk, last in receipts}
    assert _state(Ledger(_SHARDS, names)) == _state(told)


@given(_jobs())
def test_a_shard_is_ready_once_and_only_when_all_of_it_is_staged(job: tuple[list[int], list[Receipt]]) -> None:
    counts, receipts = job
    ledger, seen = Ledger(_SHARDS, []), set[tuple[int, int]]()
    for shard, chunk, last in receipts:
        whole_before = {(shard, one) for one in range(counts[shard])} <= seen
        seen.add((shard, chunk))
        whole = {(shard, one) for one in range(counts[shard])} <= seen
        assert ledger.stage(shard, chunk, last) == (whole and not whole_before)
        assert ledger.ready() == [n for n, count in enumerate(counts) if {(n, one) for one in range(count)} <= seen]
        assert ledger.staged(shard) == {one for owner, one in seen if owner == shard}


@given(_jobs(), st.sets(st.integers(0, len(_SHARDS) - 1)))
def test_a_committed_shard_is_never_ready_again(job: tuple[list[int], list[Receipt]], committed: set[int]) -> None:
    _, receipts = job
    ledger = Ledger(_SHARDS, [_SHARDS[number].output for number in committed])
    for shard, chunk, last in receipts:
        assert not (ledger.stage(shard, chunk, last) and shard in committed)
    assert not committed & set(ledger.ready())
    assert ledger.done == len(committed)
    assert ledger.leftovers() == sorted(committed & {shard for shard, _, _ in receipts})


def test_a_commit_forgets_the_chunks() -> None:
    ledger = Ledger(_SHARDS, [])
    assert ledger.stage(1, 0, True)
    ledger.commit(1)
    assert (ledger.ready(), ledger.leftovers(), ledger.done) == ([], [], 1)
    assert not ledger.staged(1)


def test_a_late_receipt_of_a_committed_shard_is_something_left_over() -> None:
    ledger = Ledger(_SHARDS, [])
    ledger.stage(1, 0, True)
    ledger.commit(1)
    assert not ledger.stage(1, 0, True)
    assert ledger.leftovers() == [1]
    assert ledger.names(1) == [JobPaths.staged(1, 0, last=True)]


def test_the_names_of_a_shards_chunks_are_in_the_order_of_its_rows() -> None:
    ledger = Ledger(_SHARDS, [])
    for chunk in (10, 2, 0, 9, 1):
        ledger.stage(0, chunk, chunk == 10)
    assert ledger.names(0) == [JobPaths.staged(0, chunk, last=chunk == 10) for chunk in (0, 1, 2, 9, 10)]


def test_chunks_behind_the_last_do_not_make_up_for_missing_ones() -> None:
    ledger = Ledger(_SHARDS, [])
    for receipt in ((0, 0, False), (0, 1, False), (0, 7, False)):
        ledger.stage(*receipt)
    assert not ledger.stage(0, 3, True)


@pytest.mark.parametrize(
    "name",
    [
        "_SUCCESS",
        "_tandem/job.json",
        "_errors/0.parquet",
        "other.parquet",
        "_tandem/stage/",
        "_tandem/stage/.DS_Store",
        "_tandem/stage/00000000/notes.txt",
        "_tandem/stage/00000000/000000-last.arrow.bak",
        "_tandem/stage/00000000/000000.parquet",
        JobPaths.staged(99, 0, last=True),
    ],
)
def test_names_of_other_things_are_no_progress(name: str) -> None:
    assert _state(Ledger(_SHARDS, [name])) == _state(Ledger(_SHARDS, []))


@given(st.integers(0, 10**9), st.integers(0, 10**7), st.booleans())
def test_a_staged_name_tells_shard_chunk_and_last(shard: int, chunk: int, last: bool) -> None:
    assert JobPaths.parse_staged(JobPaths.staged(shard, chunk, last=last)) == (shard, chunk, last)
