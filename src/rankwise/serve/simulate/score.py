"""What became of the requests of a run, and the figures made of it: throughput, first tokens, limits met, shares of tenants."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from rankwise.serve.types import Outcome


@dataclasses.dataclass(slots=True)
class RequestRecord:
    """What became of one request.

    Attributes:
        id, tenant, prompt: of the request; tokens of its prompt.
        at, first, end: when it came, its first token, its end (seconds; None: never).
        slo: seconds to the first token.
        outcome, tokens: how it ended, tokens made.
        gaps: seconds between its tokens.
    """

    id: str
    tenant: str
    at: float
    prompt: int
    slo: float
    first: float | None = None
    end: float | None = None
    outcome: Outcome | None = None
    tokens: int = 0
    gaps: list[float] = dataclasses.field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token; infinity where there was none."""
        return math.inf if self.first is None else self.first - self.at


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Figures of a run.

    Attributes:
        throughput: finished requests a second; ``tokens``: generated a second.
        stripped: throughput without the first and last ten seconds, (finished − 2·rate·10)/(wall − 20); None for runs that short.
        ttft_…, itl_…: seconds, percentiles of the raw samples of requests that had a first token (aborted ones have none).
        attainment: share of all requests with their first token within their limit; ``satisfaction``: mean of
            max(0, 1 − (ttft/limit)²); both count aborted and rejected requests as 0.
        service: prompt + 2·generated tokens of each tenant.
    """

    requests: int
    finished: int
    aborted: int
    rejected: int
    preemptions: int
    wall: float
    throughput: float
    tokens: float
    stripped: float | None
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    itl_mean: float
    itl_p50: float
    itl_p99: float
    attainment: float
    satisfaction: float
    service: dict[str, int]
    steps: int = 0
    loads: int = 0
    evictions: int = 0
    trained: int = 0
    running_mean: float = 0.0
    model_error: float = 0.0


def report(records: Sequence[RequestRecord], wall: float, rate: float | None = None, **counts: float) -> Report:
    """The figures of a run.

    Args:
        records: of all requests.
        wall: seconds.
        rate: requests a second offered, for the stripped throughput.
        counts: further fields of :class:`Report`.
    """
    outcomes = Counter(r.outcome for r in records)
    finished = outcomes[Outcome.LENGTH] + outcomes[Outcome.STOP]
    first = [r.ttft for r in records if r.first is not None]
    gaps = [g for r in records for g in r.gaps]
    service: dict[str, int] = defaultdict(int)
    for r in records:
        service[r.tenant] += (r.prompt if r.tokens else 0) + 2 * r.tokens
    return Report(
        requests=len(records),
        finished=finished,
        aborted=outcomes[Outcome.ABORTED],
        rejected=outcomes[Outcome.REJECTED],
        wall=wall,
        throughput=finished / wall if wall else 0.0,
        tokens=sum(r.tokens for r in records) / wall if wall else 0.0,
        stripped=(finished - 20 * rate) / (wall - 20) if rate is not None and wall > 20 else None,
        ttft_mean=_mean(first),
        ttft_p50=_quantile(first, 0.5),
        ttft_p90=_quantile(first, 0.9),
        ttft_p99=_quantile(first, 0.99),
        itl_mean=_mean(gaps),
        itl_p50=_quantile(gaps, 0.5),
        itl_p99=_quantile(gaps, 0.99),
        attainment=_mean([float(r.ttft <= r.slo) for r in records]),
        satisfaction=_mean([max(0.0, 1 - (r.ttft / r.slo) ** 2) if r.ttft < math.inf else 0.0 for r in records]),
        service=dict(sorted(service.items())),
        **counts,  # type: ignore[arg-type]
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(values, q)) if values else math.nan
