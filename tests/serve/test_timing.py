"""The step-time model finds what made its data; budgets are the largest that fit; the router breaks fewest limits."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import OptionError
from rankwise.serve.engine.step_time import (
    Coefficients,
    StepBudget,
    StepLoad,
    StepTime,
    nonnegative,
)
from rankwise.serve.simulate.routing import ReplicaLoad, route, routing_cost

TRUE = Coefficients(4e-3, 2e-5, 3e-4, 1e-6, 5e-6, 8e-4, knee=32)


def steps(n: int, seed: int = 0, ranked: bool = True) -> list[StepLoad]:
    rng = random.Random(seed)
    return [StepLoad(rng.randint(1, 300), rng.randint(0, 8000), rng.choice([0, 8, 64, 200]) if ranked else 0) for _ in range(n)]


def fitted(noise: float = 0.0, n: int = 256, **options: int) -> StepTime:
    rng, model = random.Random(1), StepTime(**options)
    for load in steps(n):
        model.observe(load, TRUE.seconds(load) * (1 + rng.gauss(0, noise)))
    return model


def test_known_coefficients_are_recovered() -> None:
    got = fitted().coefficients
    for field in ("step", "token", "token_above", "context", "rank", "adapters", "knee"):
        assert getattr(got, field) == pytest.approx(getattr(TRUE, field), rel=1e-6), field


def test_noise_and_pauses_leave_predictions_right() -> None:
    rng, model = random.Random(2), StepTime()
    for load in steps(256):
        pause = 10 if rng.random() < 0.03 else 1
        model.observe(load, TRUE.seconds(load) * (1 + rng.gauss(0, 0.05)) * pause)
    errors = [model.predict(load) / TRUE.seconds(load) - 1 for load in steps(50, seed=9)]
    assert np.median(np.abs(errors)) < 0.06 and model.error_ratio() < 0.12


def test_only_the_window_counts() -> None:
    model = fitted(window=64)
    for load in steps(64, seed=5):
        model.observe(load, 2 * TRUE.seconds(load))
    for load in steps(20, seed=6):
        assert model.predict(load) == pytest.approx(2 * TRUE.seconds(load), rel=1e-6)


def test_without_adapters_their_columns_are_zero_and_one_sample_is_enough() -> None:
    model = StepTime()
    load = StepLoad(10, 100)
    assert model.predict(load) == 0 and model.observe(load, 0.01) == 0
    assert model.predict(load) == pytest.approx(0.01) and model.error_ratio() == 0
    for load in steps(40, ranked=False):
        model.observe(load, TRUE.seconds(load))
    assert model.coefficients.rank == model.coefficients.adapters == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 30))
def test_nonnegative_least_squares_agree_with_scipy(seed: int, k: int, n: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, k)) * 10.0 ** rng.integers(-3, 4, k), rng.normal(size=n)
    a, value = nonnegative(X, y)
    assert (a >= 0).all()
    assert np.sqrt(max(value, 0)) == pytest.approx(optimize.nnls(X, y)[1], rel=1e-6, abs=1e-6)
    assert np.linalg.norm(X @ a - y) ** 2 == pytest.approx(value, rel=1e-6, abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.integers(0, 300), st.integers(0, 300), st.floats(1e-3, 0.1))
def test_a_split_is_the_largest_that_fits(rows: int, prefill: int, train: int, slo: float) -> None:
    budget = StepBudget(TRUE.seconds, max_num_batched_tokens=200, least_prefill=8)
    decode = StepLoad(rows, rows * 50, 8)

    def most(load: StepLoad, limit: int) -> int:
        return max((n for n in range(limit + 1) if TRUE.seconds(load.joined(n)) <= slo), default=0)

    p, s = budget.split(decode, prefill, train, slo)
    assert p == max(most(decode, min(prefill, 200 - rows)), min(prefill, 8))
    assert s == most(decode.joined(p), min(train, 200 - rows - p))
    assert budget.split(decode, prefill, train, None) == (
        min(prefill, 200 - rows),
        min(train, 200 - rows - min(prefill, 200 - rows)),
    )


def test_prompts_go_on_however_tight_the_limit_and_training_yields() -> None:
    budget = StepBudget(TRUE.seconds, max_num_batched_tokens=64, least_prefill=16)
    assert budget.split(StepLoad(10, 500), 100, 100, 1e-9) == (16, 0)
    assert budget.split(StepLoad(64, 500), 100, 100, 1.0) == (0, 0)
    assert budget.split(StepLoad(0), 0, 100, 1.0) == (0, 64)


def test_routing_counts_limits_and_added_time() -> None:
    crowd = ReplicaLoad((8,) * 10, (0.2,) * 10)
    few = ReplicaLoad((64, 64), (0.2, 0.14))
    assert routing_cost(crowd, 8, 1.0, 1e-3, 0.0) == (0, pytest.approx(0.08 + 0.088))
    assert routing_cost(few, 64, 1.0, 1e-3, 0.0)[0] == 1  # 0.128 → 0.192 breaks 0.14 only
    assert routing_cost(few, 8, 0.1, 1e-3, 0.0)[0] == 1  # its own
    assert routing_cost(ReplicaLoad((64, 64), (0.1,)), 8, 1.0, 1e-3, 0.0)[0] == 0  # broken before
    assert routing_cost(crowd, 64, 1.0, 1e-3, 0.0, padded=True)[0] == 10  # 11·64: everybody pays for the largest rank
    assert route([few, crowd], 64, 1.0, 1e-3, 0.0) == 1 and route([few, crowd], 64, 1.0, 1e-3, 0.0, padded=True) == 0
    assert route([ReplicaLoad((), (), room=False)], 8, 1.0, 1e-3, 0.0) is None


def test_wrong_input_is_one_sentence() -> None:
    with pytest.raises(OptionError, match="takes more than 0"):
        StepTime().observe(StepLoad(1), 0.0)
    with pytest.raises(OptionError, match="each is at least 1"):
        StepTime(window=0)
