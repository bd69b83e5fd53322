"""An engine stepped by hand, without its thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rankwise.errors import RankwiseError
from rankwise.serve.types import Event, Finished, Token

if TYPE_CHECKING:
    from rankwise.serve.engine.engine import Engine


def run_until_idle(engine: Engine, most: int = 100_000) -> int:
    """Step an engine without a thread until nothing is left; the number of steps.

    Raises:
        RankwiseError: still busy after ``most`` steps.
    """
    for n in range(most):
        if engine.idle():
            return n
        engine.step()
    raise RankwiseError(f"The engine is still busy after {most} steps.")


def collect(events: Iterable[Event]) -> tuple[list[int], Finished | None]:
    """(token ids, the last event) of one request's events."""
    ids = [e.id for e in events if isinstance(e, Token)]
    done = [e for e in events if isinstance(e, Finished)]
    return ids, done[-1] if done else None
