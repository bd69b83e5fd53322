"""The figures of a simulated run, worked out by hand."""

from __future__ import annotations

import math

import pytest

from rankwise.serve.simulate.score import RequestRecord, report
from rankwise.serve.types import Outcome

RECORDS = [
    RequestRecord("a", "x", 0.0, 10, 2.0, 1.0, 4.0, Outcome.LENGTH, 3, [1.0, 2.0]),
    RequestRecord("b", "x", 1.0, 20, 2.0, 4.0, 5.0, Outcome.STOP, 1, []),
    RequestRecord("c", "y", 2.0, 30, 2.0, None, 3.0, Outcome.ABORTED),
    RequestRecord("d", "y", 2.0, 40, 2.0, None, 2.0, Outcome.REJECTED),
]


def test_the_figures_of_four_requests() -> None:
    r = report(RECORDS, wall=5.0, preemptions=3, steps=7)
    assert (r.requests, r.finished, r.aborted, r.rejected, r.preemptions, r.steps) == (4, 2, 1, 1, 3, 7)
    assert r.throughput == pytest.approx(2 / 5) and r.tokens == pytest.approx(4 / 5)
    assert r.ttft_mean == pytest.approx(2.0) and r.ttft_p50 == pytest.approx(2.0) and r.ttft_p90 == pytest.approx(2.8)
    assert r.itl_mean == pytest.approx(1.5) and r.itl_p50 == pytest.approx(1.5)
    assert r.attainment == pytest.approx(1 / 4), "only the first had its first token within two seconds"
    assert r.satisfaction == pytest.approx((1 - 0.25) / 4), "the second took three of two seconds: nothing, and no less"
    assert r.service == {"x": 10 + 6 + 20 + 2, "y": 0}, "prompts count once they were computed, tokens twice"


def test_the_ends_of_a_long_run_are_left_out() -> None:
    assert report(RECORDS, wall=20.0, rate=1.0, preemptions=0).stripped is None
    assert report(RECORDS * 50, wall=40.0, rate=2.0, preemptions=0).stripped == pytest.approx((100 - 40) / 20)
    assert report(RECORDS * 50, wall=40.0, preemptions=0).stripped is None


def test_a_run_without_requests_has_no_figures_to_give() -> None:
    r = report([], wall=0.0, preemptions=0)
    assert r.throughput == r.tokens == 0.0 and math.isnan(r.ttft_mean) and math.isnan(r.attainment) and r.service == {}
    assert RECORDS[2].ttft == math.inf
