"""Work that ends its process, as a bug in a C library would. Imports little, as children import it too."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import ShardError
from pipeline.inputs import Columns, open_reader
from pipeline.shards import Shard
from pipeline.storage import Store

POISON = b"\x89PNG poison"

_SITE = f"""
import os, signal
from PIL import Image

open_image = Image.open

def open_or_die(file, *arguments, **options):
    if file.getvalue() == {POISON!r}:
        os.kill(os.getpid(), signal.SIGSEGV)
    return open_image(file, *arguments, **options)

Image.open = open_or_die
"""


def poisoned_environment(folder: Path) -> dict[str, str]:
    """The environment of Python processes that die of `POISON`: it has them run a module of `folder` as they start."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE)
    return {"PYTHONPATH": str(folder)}


def count(stop: int, end: str) -> Iterator[int]:
    """Counts, and ends as it is told."""
    yield from range(stop)
    if end == "exit":
        os._exit(7)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if end == "raise":
        raise ShardError("the end")
    print("a library's remark")


def read_ten_and_die(store: Store, shard: Shard, columns: Columns) -> Iterator[object]:
    """Reads a shard as `pipeline.isolation` does, but only ten samples of it."""
    reader = open_reader(store, shard, columns)
    yield reader.carried
    for _, sample in zip(range(10), reader, strict=False):
        yield sample
    os.kill(os.getpid(), signal.SIGSEGV)
