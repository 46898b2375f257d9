"""What a finished job reports: on the screen, to a machine, and in `_SUCCESS`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.plan import Plan
from jobs.spec import JobPaths
from pipeline.storage import Store


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished job.

    `images`, of which `scored` and `errors`, and `skipped` (counts by reason) are the whole job's, over all runs. The
    rest is of the run that finished it: `resumed` shards were committed before, and `run_images` staged, at
    `images_per_s`. `pool` is how the pool ran, by the names of its configuration, each with why.
    """

    output: str
    model: str
    revision: str
    shards: int
    resumed: int
    images: int
    scored: int
    errors: int
    skipped: dict[str, int]
    run_images: int
    seconds: float
    startup_s: float
    images_per_s: float
    replicas: dict[str, int]
    stage_seconds: dict[str, float]
    pool: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def read_report(plan: Plan, store: Store) -> Report:
    """The report of a finished job, for a call that had nothing left to do."""
    done: dict[str, Any] = json.loads(store.read(JobPaths.SUCCESS))
    return replace(Report(**done), resumed=len(plan.shards), run_images=0, seconds=0.0, images_per_s=0.0)
