"""A call goes where the fewest of its kind are under way, whatever else a replica does."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.routing import TRIED, LaneRouter

ids = count()


@dataclass
class Call:
    """What Serve tells a router of a call."""

    kind: str
    id: str = field(default_factory=lambda: str(next(ids)))
    routing_context: Any = field(default_factory=lambda: SimpleNamespace(should_backoff=False))

    @property
    def metadata(self) -> Any:
        return SimpleNamespace(call_method=self.kind, internal_request_id=self.id)


@pytest.fixture
def router() -> LaneRouter:
    router = LaneRouter.__new__(LaneRouter)  # Serve's own part wants a cluster
    router.initialize_state()
    return router


def _replicas(*names: str) -> list[Any]:
    return [SimpleNamespace(replica_id=name) for name in names]


def _choose(router: LaneRouter, call: Call | None, replicas: list[Any]) -> list[str]:
    ranks = asyncio.run(router.choose_replicas(replicas, call))  # type: ignore[arg-type]
    assert all(len(rank) == 1 for rank in ranks)
    return [str(rank[0].replica_id) for rank in ranks]


def _route(router: LaneRouter, kind: str, replica: str) -> Call:
    call = Call(kind)
    router.on_request_routed(call, replica, None)  # type: ignore[arg-type]
    return call


def test_batch_does_not_push_online_away(router: LaneRouter) -> None:
    for _ in range(8):
        _route(router, "score_batch", "a")
    _route(router, "score_online", "b")

    assert _choose(router, Call("score_online"), _replicas("a", "b")) == ["a", "b"]
    assert _choose(router, Call("score_batch"), _replicas("a", "b")) == ["b", "a"]


def test_calls_are_spread_evenly(router: LaneRouter) -> None:
    replicas, found = _replicas("a", "b", "c", "d"), Counter[str]()
    for _ in range(40):
        best = _choose(router, Call("score_batch"), replicas)[0]
        _route(router, "score_batch", best)
        found[best] += 1
    assert set(found.values()) == {10}


def test_a_call_that_ends_counts_no_more(router: LaneRouter) -> None:
    first, second = _route(router, "score_online", "a"), _route(router, "score_online", "b")
    router.on_request_completed("a", first.id)  # type: ignore[arg-type]
    assert _choose(router, Call("score_online"), _replicas("a", "b"))[0] == "a"
    router.on_request_completed("b", second.id)  # type: ignore[arg-type]
    router.on_request_completed("b", second.id)  # type: ignore[arg-type]
    assert _choose(router, Call("score_online"), _replicas("a", "b")) == ["a", "b"]  # in turn


def test_calls_of_one_request_share_its_id_and_are_counted_each(router: LaneRouter) -> None:
    for _ in range(2):
        for replica in ("a", "a", "b"):
            router.on_request_routed(Call("score_online", id="request"), replica, None)  # type: ignore[arg-type]
        router.on_request_completed("a", "request")  # type: ignore[arg-type]
        assert router._under_way["score_online"] == {"a": 1, "b": 1}
        for replica in ("a", "b"):
            router.on_request_completed(replica, "request")  # type: ignore[arg-type]
        assert (router._under_way["score_online"], router._kinds) == ({}, {})


def test_those_that_are_equally_free_take_turns(router: LaneRouter) -> None:
    names, found = ("a", "b", "c"), []
    for _ in range(9):
        best = _choose(router, Call("score_online"), _replicas(*names))[0]
        router.on_request_completed(best, _route(router, "score_online", best).id)  # type: ignore[arg-type]
        found.append(best)
    assert set(found[:3]) == set(names)
    assert found == found[:3] * 3


def test_processes_do_not_begin_with_the_same_replica() -> None:
    first = set()
    for _ in range(50):
        router = LaneRouter.__new__(LaneRouter)
        router.initialize_state()
        first.add(_choose(router, Call("score_batch"), _replicas("a", "b"))[0])
    assert first == {"a", "b"}


def test_one_that_never_came_to_a_replica_may_end(router: LaneRouter) -> None:
    router.on_request_completed("a", "unheard of")  # type: ignore[arg-type]
    assert _choose(router, Call("score_online"), _replicas("a")) == ["a"]


def test_where_none_answers_the_router_pauses_after_some(router: LaneRouter) -> None:
    call = Call("score_online")
    assert len(_choose(router, call, _replicas(*"abcdefgh"))) == TRIED
    assert call.routing_context.should_backoff
    assert _choose(router, call, []) == []
    assert _choose(router, None, _replicas("a")) == ["a"]
