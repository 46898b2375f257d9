"""Work in a process of its own, for what has ended its process before.

A library that crashes on one image of a hundred million ends the worker that it runs in, and so does the next try. In a
child, it ends the child: what was done before the crash is kept, and the caller learns where it happened. This costs a
process and a pipe, so it is only for work that has failed that way already.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.decode import decode_each
from pipeline.errors import ImageError, ProcessEnded, ShardError
from pipeline.inputs import Columns, Sample, open_reader
from pipeline.shards import Shard
from pipeline.storage import Store
from pipeline.transform import ImageTransform

T = TypeVar("T")


def isolated(work: Callable[..., Iterable[T]], *arguments: Any) -> Generator[T, None, None]:
    """What `work(*arguments)` yields, from a child process; everything must pickle.

    Raises what `work` raises, and `ProcessEnded` where the child does not live to tell.
    """
    # the child finds modules where this process does, which a Ray worker was told by other means
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pipeline.isolation"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(pickle.dumps((work, arguments)))
            child.stdin.close()
            while (item := pickle.load(child.stdout)) is not _End:  # noqa: S301 -- our own child's
                if isinstance(item, _Raised):
                    raise item.error
                yield item
        except (EOFError, pickle.UnpicklingError, BrokenPipeError) as error:
            raise ProcessEnded(_fate(child.wait())) from error
        finally:
            child.kill()


def decode_isolated(images: Sequence[bytes], transform: ImageTransform) -> Iterator[np.ndarray | ImageError]:
    """For each image its pixels, uint8 [H, W, 3], or what is wrong with it: also that it ends the process."""
    done = 0
    while done < len(images):
        try:
            for result in isolated(decode_each, images[done:], transform):
                yield result
                done += 1
        except ProcessEnded as error:
            yield ImageError(f"decoding this image ends the process that does it ({error})")
            done += 1


class IsolatedReader:
    """A shard's reader (see `pipeline.inputs`) in a process of its own. What ends that process ends the shard there."""

    def __init__(self, store: Store, shard: Shard, columns: Columns) -> None:
        self._name = shard.name
        self._parts = self._guarded(isolated(_read_shard, store, shard, columns))
        self.carried: pa.Schema = next(self._parts)
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Sample]:
        for part in self._parts:
            if isinstance(part, Counter):
                self.skipped = part
            else:
                yield part

    def close(self) -> None:
        self._parts.close()

    def _guarded(self, parts: Iterator[Any]) -> Generator[Any, None, None]:
        try:
            yield from parts
        except ProcessEnded as error:
            raise ShardError(f"{self._name}: reading this shard ends the process that does it ({error})") from error


class _End:
    """Nothing more comes."""


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _read_shard(store: Store, shard: Shard, columns: Columns) -> Iterator[Any]:
    with closing(open_reader(store, shard, columns)) as reader:
        yield reader.carried
        yield from reader
        yield reader.skipped


def _fate(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def main() -> None:
    """The child: work comes by standard input, items leave by what was standard output."""
    from pipeline import isolation as module  # not __main__, or the classes would be others

    work, arguments = pickle.load(sys.stdin.buffer)  # noqa: S301 -- our own parent's
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what libraries print must not get between the items

        def send(item: Any) -> None:
            pickle.dump(item, out, pickle.HIGHEST_PROTOCOL)
            out.flush()

        try:
            for item in work(*arguments):
                send(item)
            send(module._End)
        except Exception as error:
            send(module._Raised(error))


if __name__ == "__main__":
    main()
