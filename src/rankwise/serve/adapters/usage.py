"""When something kept was last of use, what it costs to bring back, and who holds it; what a tier counts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar


@dataclasses.dataclass(slots=True)
class Use:
    """``last``: when it was last asked for, in seconds; ``cost``: of bringing it back, in any one unit; ``pins``: who holds it now."""

    last: float
    cost: float
    pins: int = 0

    def staleness(self, now: float) -> float:
        """Seconds out of use for each unit of cost: the largest goes first, so of two left alone as long the cheaper one."""
        return (now - self.last) / max(self.cost, 1e-9)


class HasUse(Protocol):
    use: Use


T = TypeVar("T", bound=HasUse)


def stalest(entries: Mapping[str, T], now: float, may_go: Callable[[str, T], bool]) -> str | None:
    """The unpinned entry that goes first; None where every one is held."""
    free = [(e.use.staleness(now), -e.use.last, k) for k, e in entries.items() if not e.use.pins and may_go(k, e)]
    return max(free)[2] if free else None


@dataclasses.dataclass(slots=True)
class Tally:
    """Counters for the metrics: loads by (format, outcome), evictions by tier."""

    loads: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    evictions: Counter[str] = dataclasses.field(default_factory=Counter)
