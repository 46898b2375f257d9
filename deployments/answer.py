"""What a replica answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pipeline.dispatcher import Scores
from pipeline.errors import Busy, DeviceLost, Expired


@dataclass(frozen=True)
class Answer:
    """Scores, the id of the replica that computed them, and the `scores_as` of its model."""

    scores: Scores
    replica: str
    scores_as: str


# Returned, not raised: Serve would log a stack trace for each.
Refusal: TypeAlias = Busy | Expired | DeviceLost
