"""A ranged file reads as the object does, fetches what it needs, and fetches a window that failed again."""

from __future__ import annotations

import io
import os
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import patience
from pipeline.errors import NotFound, Unavailable
from pipeline.ranged import open_ranged

WINDOW = 100
CONTENT = random.Random(1).randbytes(1_050)


class FlakyObject:
    """An object that answers ranges, and fails some of them: `failures` of the first calls, in their order."""

    def __init__(self, content: bytes = CONTENT, failures: tuple[bool, ...] = ()) -> None:
        self.content, self.failures = content, failures
        self.fetched: list[int] = []
        self.failed: list[int] = []
        self.down = False

    def fetch(self, start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(self.content)
        assert stop - start <= WINDOW
        calls = len(self.fetched) + len(self.failed)
        if self.down or (calls < len(self.failures) and self.failures[calls]):
            self.failed.append(start)
            raise Unavailable("try again")
        self.fetched.append(start)
        return self.content[start:stop]

    def open(self) -> io.BufferedReader:
        file = open_ranged(self.fetch, len(self.content), window_bytes=WINDOW)
        assert isinstance(file, io.BufferedReader)
        return file


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (0.0,) * 4)


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tandem-read-ahead")]


_seeks = st.one_of(
    st.tuples(st.integers(0, 1_200), st.just(os.SEEK_SET)),
    st.tuples(st.integers(-1_050, 100), st.just(os.SEEK_END)),
)


@given(
    moves=st.lists(st.tuples(st.none() | _seeks, st.integers(-1, 350))),
    failures=st.lists(st.booleans(), max_size=30).map(tuple),
)
def test_it_reads_as_the_object_itself_whatever_fails_on_the_way(
    moves: list[tuple[tuple[int, int] | None, int]], failures: tuple[bool, ...]
) -> None:
    in_a_row = max((len(run) for run in "".join("x" if failed else " " for failed in failures).split()), default=0)
    if in_a_row > len(patience.PAUSES_S):
        failures = failures[:: in_a_row + 1]
    with FlakyObject(failures=failures).open() as file, io.BytesIO(CONTENT) as same:
        for seek, size in moves:
            if seek is not None:
                assert file.seek(*seek) == same.seek(*seek)
            assert file.read(size) == same.read(size)
            assert file.tell() == same.tell()


def test_a_sequential_reader_finds_the_next_window_fetched() -> None:
    source = FlakyObject()
    file = io.BufferedReader(source.open().detach(), buffer_size=10)
    with file:
        file.read(1)
        deadline = time.monotonic() + 5
        while source.fetched != [0, 100] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert source.fetched == [0, 100]
        file.read()
    assert source.fetched == list(range(0, 1_050, WINDOW))


def test_a_reader_that_jumps_fetches_nothing_ahead() -> None:
    source = FlakyObject()
    before = read_ahead_threads()
    with io.BufferedReader(source.open().detach(), buffer_size=10) as file:
        for position in (900, 300, 600):
            file.seek(position)
            file.read(1)
        assert source.fetched == [900, 300, 600]
        assert set(read_ahead_threads()) <= set(before)


def test_what_was_read_is_not_fetched_again() -> None:
    source = FlakyObject()
    with io.BufferedReader(source.open().detach(), buffer_size=10) as file:
        for position in (510, 590, 520):
            file.seek(position)
            file.read(5)
    assert source.fetched == [510]


def test_a_window_that_fails_is_fetched_again_and_no_other() -> None:
    source = FlakyObject(failures=(False, True, True, True))
    with source.open() as file:
        assert file.read() == CONTENT
    assert source.failed == [100, 100, 100]
    assert source.fetched == list(range(0, 1_050, WINDOW))


def test_it_gives_up_in_the_end_and_can_still_be_tried_again() -> None:
    source = FlakyObject()
    with source.open() as file:
        assert file.read(WINDOW) == CONTENT[:WINDOW]
        source.down = True
        file.seek(3 * WINDOW)
        with pytest.raises(Unavailable):
            file.read(1)
        assert len(source.failed) >= len(patience.PAUSES_S) + 1
        source.down = False
        assert file.read(1) == CONTENT[3 * WINDOW : 3 * WINDOW + 1]


def test_a_window_that_failed_ahead_is_fetched_again_when_it_is_wanted_again() -> None:
    source = FlakyObject(failures=(False, *(True,) * 5))
    with io.BufferedReader(source.open().detach(), buffer_size=10) as file:
        assert file.read(WINDOW) == CONTENT[:WINDOW]
        with pytest.raises(Unavailable):
            file.read(1)
        assert file.read() == CONTENT[WINDOW:]


def test_an_error_that_will_not_pass_is_not_tried_again() -> None:
    calls = []

    def fetch(start: int, stop: int) -> bytes:
        calls.append(start)
        raise NotFound("gone")

    with open_ranged(fetch, 1_000, window_bytes=WINDOW) as file, pytest.raises(NotFound):
        file.read()
    assert calls == [0]


def test_an_empty_object_is_read_without_a_fetch() -> None:
    source = FlakyObject(b"")
    with source.open() as file:
        assert file.read() == b""
        assert file.seek(0, os.SEEK_END) == 0
    assert source.fetched == []


def test_reading_past_the_end_gives_nothing() -> None:
    with FlakyObject().open() as file:
        assert file.seek(5_000) == 5_000
        assert file.read(10) == b""


def test_seeking_before_the_start_is_refused() -> None:
    with FlakyObject().open() as file:
        file.read(20)
        with pytest.raises(ValueError, match="-1"):
            file.seek(-1)
        assert file.tell() == 20


def test_closing_ends_the_thread_even_while_it_waits_for_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (60.0,))
    source = FlakyObject(failures=(False, True))
    before = read_ahead_threads()  # of files that other tests closed just now
    with source.open() as file:
        file.read(1)
        (thread,) = set(read_ahead_threads()) - set(before)
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
