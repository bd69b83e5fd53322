"""The test of admission: tight where all run to their bounds, never too low, and bolder once it has learned."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import OptionError
from rankwise.serve.policies.base import RequestInfo
from rankwise.serve.simulate.admission import PeakTest, peak_blocks


def by_hand(held: list[int], left: list[int], page: int) -> int:
    """Step by step: each makes a token a step and is gone after its last."""
    return max(
        (sum(-(-(c + t) // page) for c, m in zip(held, left, strict=True) if t <= m) for t in range(max(left, default=0) + 1)),
        default=0,
    )


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12), st.sampled_from([1, 3, 16]))
def test_the_peak_is_that_of_the_run(pairs: list[tuple[int, int]], page: int) -> None:
    held, left = [c for c, _ in pairs], [m for _, m in pairs]
    assert peak_blocks(held, left, page) == by_hand(held, left, page)


def test_the_bound_is_tight() -> None:
    test = PeakTest(page=1)
    running = [RequestInfo("a", 0.0, 10, 20, generated=5)]
    job = RequestInfo("b", 1.0, 8, 4)
    # b makes its 4 tokens within 4 + 1 steps, a holds 15 + 5 by then: 8 + 5 + 20
    assert test.fits(running, job, 33) and not test.fits(running, job, 32)


def test_pending_prompts_come_late_and_are_counted_so() -> None:
    test = PeakTest(page=1)
    running = [RequestInfo("a", 0.0, 10, 100, generated=1)]
    job = RequestInfo("b", 1.0, 50, 50)
    assert test.fits(running, job, 163, chunk=0) and not test.fits(running, job, 163, chunk=10)


def test_what_requests_use_of_their_bounds_is_learned_and_caution_wears_off() -> None:
    test = PeakTest(page=1, learn=0.9)
    running = [RequestInfo("a", 0.0, 10, 100)]
    job = RequestInfo("b", 1.0, 10, 100)
    assert not test.fits(running, job, 100)
    for _ in range(16):
        test.finished(RequestInfo("x", 0.0, 1, 100, generated=30))
    assert test.multiplier() == pytest.approx(0.3) and test.fits(running, job, 100)
    test.preempted()
    assert test.multiplier() == pytest.approx(0.4)
    for _ in range(10):
        test.finished(RequestInfo("x", 0.0, 1, 100, generated=30))
    assert test.multiplier() == pytest.approx(0.3)
    for _ in range(30):
        test.preempted()
    assert test.multiplier() == 1.0


@pytest.mark.parametrize("options", [{"page": 0}, {"learn": 0.0}, {"learn": 1.5}, {"window": 3}])
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match="peak test got"):
        PeakTest(**{"page": 16} | options)
