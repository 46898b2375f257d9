"""What a cluster's job API refuses."""

from __future__ import annotations

from typing import NoReturn

import pytest

from jobs.remote import Cluster
from pipeline.errors import JobError


class NotYetUp:
    """Ray's client, to a cluster of which no node can start a job yet."""

    def __init__(self, address: str) -> None:
        pass

    def submit_job(self, **_: object) -> NoReturn:
        raise RuntimeError("status code 500: No available agent to submit job\nTraceback of the server")


def test_a_cluster_that_takes_no_job_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", NotYetUp)
    told = r"^the cluster at http://head:8265 takes no job, try again later: .* 500: No available agent to submit job$"
    with pytest.raises(JobError, match=told):
        Cluster("http://head:8265").start({})
