"""Which replica of the pool a call goes to."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from heapq import nsmallest
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

TRIED = 3  # replicas, before the router pauses


class LaneRouter(FIFOMixin, RequestRouter):
    """Sends a call to the replica that works on the fewest calls of its own kind from this process.

    Of several, to the one that was sent none for the longest time. The processes of a large job do not know of each
    other: with turns, the sum of what they send is even as well, which it is not with random picks.

    Serve's router compares how many calls each replica holds, of whatever kind. One with many chunks of a job, which
    online requests overtake, would look full to them, and one that is busy with online requests would look free.

    Calls are taken in the order of their coming. By default Serve finds a call by an id that all calls of one HTTP
    request share, so that of two at once one would wait for ever.
    """

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve once the router is made."""
        self._under_way: defaultdict[str, Counter[ReplicaID]] = defaultdict(Counter)
        self._last_turn: defaultdict[str, Counter[ReplicaID]] = defaultdict(Counter)
        self._turns = 0
        self._kinds: defaultdict[tuple[ReplicaID, str], list[str]] = defaultdict(list)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try, best first; each stands alone, so that Serve does not compare them further."""
        kind = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            kind = pending_request.metadata.call_method
        counts, turns = self._under_way[kind], self._last_turn[kind]
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        best = nsmallest(TRIED, shuffled, key=lambda one: (counts[one.replica_id], turns[one.replica_id]))
        return [[one] for one in best]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called as a replica has taken a call."""
        kind = pending_request.metadata.call_method
        self._kinds[replica_id, pending_request.metadata.internal_request_id].append(kind)
        self._under_way[kind][replica_id] += 1
        self._turns += 1
        self._last_turn[kind][replica_id] = self._turns

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called as a call has ended, however it did."""
        if kinds := self._kinds.get((replica_id, internal_request_id)):
            counts = self._under_way[kinds.pop()]
            counts[replica_id] -= 1
            if not counts[replica_id]:
                del counts[replica_id]  # replicas come and go
            if not kinds:
                del self._kinds[replica_id, internal_request_id]
