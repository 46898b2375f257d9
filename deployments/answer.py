"""What a replica answers."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.dispatcher import Scores


@dataclass(frozen=True)
class Answer:
    """Scores, the id of the replica that computed them, and the `scores_as` of its model."""

    scores: Scores
    replica: str
    scores_as: str
