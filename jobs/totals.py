"""The counts of all committed shards when a job resumes: from the driver's tally, and from footers that it lacks.

The tally (`_tandem/tally.json`) saves reading 100,000 footers, and nothing else depends on it: one that is missing,
damaged, or covers a shard that is not committed is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from jobs.commit import committed_counts
from jobs.spec import JobPaths
from pipeline.counts import Counts
from pipeline.errors import NotFound
from pipeline.shards import Shard
from pipeline.storage import Store

FOOTERS_AT_ONCE = 16


def read_totals(store: Store, shards: Sequence[Shard], committed: Iterable[int]) -> Counts:
    """The sum over the `committed` numbers of `shards`. Raises `JobError` for an output file without counts."""
    numbers = frozenset(committed)
    covered, total = _read_tally(store) if numbers else (frozenset[int](), Counts())
    if not covered <= numbers:
        covered, total = frozenset(), Counts()
    missing = sorted(numbers - covered)
    with ThreadPoolExecutor(FOOTERS_AT_ONCE, thread_name_prefix="tandem-footers") as threads:
        for counts in threads.map(lambda number: committed_counts(store, shards[number]), missing):
            total += counts
    return total


def write_tally(store: Store, committed: Iterable[int], counts: Counts) -> None:
    """Writes the tally: which shards `counts` is the sum of, in ranges [first, last], and the sum."""
    content = {"shards": ranges(committed), "counts": counts.to_dict()}
    store.write(JobPaths.TALLY, json.dumps(content).encode())


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The numbers as ranges [first, last], in order."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = ([number for _, number in run] for _, run in runs)
    return [(run[0], run[-1]) for run in ends]


def _read_tally(store: Store) -> tuple[frozenset[int], Counts]:
    try:
        content = json.loads(store.read(JobPaths.TALLY))
        numbers = (number for first, last in content["shards"] for number in range(first, last + 1))
        return frozenset(numbers), Counts.from_dict(content["counts"])
    except (NotFound, ValueError, KeyError, TypeError):
        return frozenset(), Counts()
