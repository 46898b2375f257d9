"""What a driver tells the command that follows it: lines of JSON among those of its log."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Any

from jobs.receipts import OnProgress, Progress
from pipeline import errors
from pipeline.errors import JobError

EVENT = "TANDEM_EVENT "


def tell(event: str, **content: Any) -> None:
    """For the driver: an event as a line of its standard output."""
    print(EVENT + json.dumps({"event": event, **content}), flush=True)


def events_in(lines: Iterable[str]) -> Generator[dict[str, Any], None, str]:
    """The events among the lines. Returns the last line that is none, or ""."""
    said = ""
    for line in lines:
        if line.startswith(EVENT):
            yield json.loads(line.removeprefix(EVENT))
        else:
            said = line.strip() or said
    return said


def follow(events: Generator[dict[str, Any], None, None], on_progress: OnProgress) -> dict[str, Any]:
    """The result that the events end with. Raises the error that they tell of."""
    with closing(events):  # Ray takes seconds more to end the job's process and its log
        for event in events:
            if event["event"] == "progress":
                on_progress(Progress(**event["progress"]))
            elif event["event"] == "error":
                raise getattr(errors, event["kind"])(event["message"])
            else:
                result: dict[str, Any] = event["result"]
                return result
    raise JobError("the job told nothing of its end")
