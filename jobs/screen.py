"""The terminal: Tandem's own lines on it, everything that libraries print in a log file."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from jobs.receipts import Progress as JobProgress
from pipeline.errors import ModelError, OutputConflict, StorageError, UsageError

# What these say is the whole story.
_COMPLETE = (UsageError, StorageError, ModelError, OutputConflict)


class Screen:
    """Results go to standard output: text, or with `as_json` one JSON object. All else goes to standard error."""

    def __init__(self, out: IO[str], err: IO[str], *, as_json: bool) -> None:
        self.as_json = as_json
        self._out = out
        self.console = Console(file=out, soft_wrap=True, highlight=False, markup=False)
        self.notes = Console(file=err, soft_wrap=True, highlight=False, markup=False)

    def result(self, content: Any) -> None:
        """Prints the machine-readable result, where that is what was asked for."""
        if self.as_json:
            print(json.dumps(content), file=self._out, flush=True)

    def say(self, text: str = "") -> None:
        """Prints a line for a person, unless the result is for a machine."""
        if not self.as_json:
            self.console.print(text)

    def say_choices(self, chosen: dict[str, str]) -> None:
        """Prints how the pool runs, in a line."""
        self.say("pool: " + "; ".join(f"{name} {value}" for name, value in chosen.items()))

    def say_skipped(self, skipped: dict[str, int]) -> None:
        """Prints what INPUT holds and no row stands for, most frequent first, where there is such."""
        if skipped:
            counts = sorted(skipped.items(), key=lambda one: (-one[1], one[0]))
            self.say("skipped: " + ", ".join(f"{count:,} x {reason}" for reason, count in counts))

    def note(self, text: str) -> None:
        """Prints a line on standard error."""
        self.notes.print(text)

    @contextmanager
    def progress(self, title: str) -> Iterator[JobBar]:
        """A progress bar on standard error, for as long as the context lasts."""
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("shards  {task.fields[told]}"), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(
            *columns, console=self.notes, transient=True, disable=not self.notes.is_terminal,
            redirect_stdout=False, redirect_stderr=False,  # else what libraries print comes back to the screen
        ) as bar:  # fmt: skip
            yield JobBar(bar, bar.add_task(title, total=None, told=""))


class JobBar:
    """Shows a job's progress."""

    PHASES: ClassVar = {"pool": "starting the pool", "score": "scoring", "done": "done"}

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def say(self, title: str) -> None:
        """Tells what is being done."""
        self._bar.update(self._task, description=title)

    def show(self, progress: JobProgress) -> None:
        """Tells how far the job is."""
        told = f"{progress.images:,} images  {progress.images_per_s:,.0f}/s"
        if progress.errors:
            told += f"  {progress.errors:,} errors"
        if skipped := sum(progress.skipped.values()):
            told += f"  {skipped:,} skipped"
        if progress.bytes_done and progress.phase == "score":
            left_s = progress.elapsed_s * (progress.bytes_total / progress.bytes_done - 1)
            told += f"  about {left_s:,.0f} s left"
        self._bar.update(
            self._task,
            description=self.PHASES[progress.phase],
            total=progress.shards or None,
            completed=progress.shards_done,
            told=told if progress.images else "",
        )


@contextmanager
def own_screen(*, as_json: bool) -> Iterator[Screen]:
    """The terminal for Tandem alone.

    Ray's C++ core and other libraries write to the descriptors themselves, past Python's logging, so the descriptors
    are what is turned to a log file. It is kept, and named in a note on the error, where an error ends the context that
    does not say all by itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    handle, path = tempfile.mkstemp(prefix="tandem-", suffix=".log")
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    try:
        with os.fdopen(os.dup(saved[0]), "w") as out, os.fdopen(os.dup(saved[1]), "w") as err:
            yield Screen(out, err, as_json=as_json)
    except Exception as error:
        if os.path.getsize(path) and not isinstance(error, _COMPLETE):
            error.add_note(f"what libraries printed is in {path}")
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not getattr(sys.exception(), "__notes__", None):
            os.unlink(path)
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])
