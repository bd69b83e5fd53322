"""Which of several replicas a request should join, by what it adds to their step times (CaraServe); Ray chooses in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A server as a router sees it: the ranks of its running requests, and the step-time limit each has (seconds)."""

    ranks: tuple[int, ...]
    slos: tuple[float, ...]
    room: bool = True


def routing_cost(
    replica: ReplicaLoad, rank: int, slo: float, alpha: float, beta: float, *, padded: bool = False
) -> tuple[int, float]:
    """(limits broken, seconds a step added over all requests) if a request of ``rank`` and ``slo`` joined ``replica``.

    CaraServe's step time: β + α·Σr, or β + α·b·max r where kernels pad to the largest rank.  A limit that is broken
    already is not counted again.

    Args:
        replica: what runs there.
        rank, slo: of the request; seconds of a step.
        alpha, beta: seconds a unit of rank, seconds a step.
        padded: whether kernels pad to the largest rank.
    """

    def step(ranks: tuple[int, ...]) -> float:
        return beta + alpha * (len(ranks) * max(ranks, default=0) if padded else sum(ranks))

    before, after = step(replica.ranks), step((*replica.ranks, rank))
    broken = sum(before <= s < after for s in replica.slos) + (after > slo)
    return broken, (after - before) * len(replica.ranks) + after


def route(replicas: Sequence[ReplicaLoad], rank: int, slo: float, alpha: float, beta: float, *, padded: bool = False) -> int | None:
    """Index of the replica that breaks fewest limits, then adds least time; None where none has room.

    Args:
        replicas: to choose from.
        rank, slo: of the request.
        alpha, beta: of a step's time.
        padded: see :func:`routing_cost`.
    """
    able = [i for i, r in enumerate(replicas) if r.room]
    return min(able, key=lambda i: (*routing_cost(replicas[i], rank, slo, alpha, beta, padded=padded), i), default=None)
