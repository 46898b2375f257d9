"""What a driver tells, and the driver that is a process of the command's own."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.beside import drive
from jobs.events import EVENT, events_in, follow
from jobs.receipts import Progress
from pipeline.errors import JobError, ModelError

PROGRESS = Progress(phase="score", shards=3, images=32)


def test_events_are_found_among_other_lines_and_the_last_of_those_is_returned() -> None:
    last: list[str] = []

    def read() -> Any:
        lines = [f'{EVENT}{{"event": "a"}}\n', "a warning\n", "\n", f'{EVENT}{{"event": "b"}}\n']
        last.append((yield from events_in(lines)))

    assert list(read()) == [{"event": "a"}, {"event": "b"}]
    assert last == ["a warning"]


def test_what_is_followed_is_shown_until_its_result() -> None:
    shown: list[Progress] = []
    events = ({"event": "progress", "progress": PROGRESS.__dict__}, {"event": "result", "result": {"images": 32}})
    assert follow((event for event in events), shown.append) == {"images": 32}
    assert shown == [PROGRESS]


def test_an_error_is_raised_as_what_it_was() -> None:
    with pytest.raises(ModelError, match="no such model"):
        follow((event for event in [{"event": "error", "kind": "ModelError", "message": "no such model"}]), print)


def test_events_without_an_end_are_an_error() -> None:
    with pytest.raises(JobError, match="nothing of its end"):
        follow((event for event in list[Any]()), print)


def test_a_driver_that_fails_in_an_unforeseen_way_is_told_by_its_last_line() -> None:
    with pytest.raises(JobError, match=r"^the job's driver ended with 1: KeyError: 'config'$"):
        list(drive({"do": "submit", "join": {}}))
