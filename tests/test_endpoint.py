"""What the endpoint makes of the pool's answers, of replicas that die under a call, and of clients that leave."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Generator

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from deployments.endpoint import _answer
from pipeline.errors import PoolFailed
from tests.cluster import OPEN, Cluster, clean_environment


class Call:
    """A call to a replica: what awaiting it gives or raises. None hangs."""

    def __init__(self, result: object) -> None:
        self.result, self.cancelled = result, False

    def __await__(self) -> Generator[object, None, object]:
        if self.result is None:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def cancel(self) -> None:
        self.cancelled = True


def _ask(*results: object) -> tuple[object, int]:
    """What is answered where the calls end so one after another, and how many were made."""
    calls = iter(results)
    answer = asyncio.run(_answer(lambda: Call(next(calls))))
    return answer, len(results) - len(list(calls))


DIED = ActorDiedError()
UNAVAILABLE = ActorUnavailableError("gone for a while", None)


def test_one_call_is_enough_where_the_replica_lives() -> None:
    assert _ask("scores", "never asked for") == ("scores", 1)


@pytest.mark.parametrize("error", [DIED, UNAVAILABLE], ids=["died", "unavailable"])
def test_another_replica_is_asked_where_the_first_one_dies(error: Exception) -> None:
    assert _ask(error, "scores") == ("scores", 2)


def test_it_is_asked_once_again_and_not_for_ever() -> None:
    with pytest.raises(PoolFailed, match="the pool does not answer; try again later"):
        _ask(DIED, DIED, "never asked for")


def test_what_no_other_replica_would_do_better_is_not_tried_again() -> None:
    with pytest.raises(PoolFailed):
        _ask(GetTimeoutError(), "never asked for")


def test_a_caller_that_leaves_takes_its_call_along() -> None:
    async def test() -> None:
        call = Call(None)
        task = asyncio.create_task(_answer(lambda: call))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.cancelled

    asyncio.run(test())


def test_a_client_that_hangs_up_is_not_scored(shared_cluster: Cluster, endpoint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hangups", shared_cluster.gcs_address, endpoint],
        env=clean_environment(OPEN), capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["hung_up"] >= 5, "the lane was not full"
    assert told["scored"] <= told["hung_up"] // 2  # one may be in a step already as its client leaves
