"""Traces are those of the published generator, and their statistics those of its table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rankwise.errors import OptionError, UnknownName
from rankwise.serve.simulate.trace import SETTINGS, TraceOptions, effective, generate, popularity, punica_lengths, setting


def test_draw_for_draw_the_published_generator() -> None:
    """Its calls written out on numpy's global generator."""
    o = TraceOptions(adapters=20, alpha=0.3, rate=3.0, cv=4.0, duration=50.0, ranks=SETTINGS["S2"].ranks)
    state = np.random.get_state()
    np.random.seed(42)
    count = int(3.0 * 50)
    ind = (np.random.power(0.3, count) * 20).astype(int)
    inputs = np.random.randint(8, 512, count)
    outputs = np.random.randint(8, 512, count)
    gaps = np.random.gamma(1 / 16, 16 / 3.0, count)
    np.random.set_state(state)
    got = generate(o)
    tic = 0.0
    for i, r in enumerate(got):
        tic += gaps[i]
        assert (r.adapter, r.prompt, r.output) == (ind[i], inputs[i], outputs[i])
        assert r.at == pytest.approx(tic, rel=1e-12) and r.rank == (64, 32, 16, 8)[ind[i] % 4]
    assert len(got) == count


@pytest.mark.parametrize(
    ("n", "alpha", "top", "number"),
    [(200, 0.1, 0.59, 2.9), (200, 0.3, 0.20, 20), (200, 0.6, 0.04, 131), (200, 1.0, 0.005, 200),
     (32, 0.1, 0.71, 2.0), (32, 0.3, 0.35, 6.9), (32, 0.6, 0.13, 23), (32, 1.0, 0.03, 32)],
)  # fmt: skip
def test_shares_are_those_of_the_table(n: int, alpha: float, top: float, number: float) -> None:
    """The top share and the effective number of adapters: of the formula to the table's digits, of a long trace to 5 %."""
    exact = np.diff((np.arange(n + 1) / n) ** alpha)
    assert exact.max() == pytest.approx(top, abs=0.006) and effective(exact) == pytest.approx(number, rel=0.02)
    trace = generate(TraceOptions(adapters=n, alpha=alpha, rate=1000, duration=20))
    drawn = np.array([Counter(r.adapter for r in trace)[i] for i in range(n)]) / len(trace)
    assert effective(drawn) == pytest.approx(effective(exact), rel=0.05)
    assert drawn[exact.argmax()] == pytest.approx(exact.max(), rel=0.15)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gaps_have_the_rate_and_the_variation(cv: float) -> None:
    at = np.array([r.at for r in generate(TraceOptions(rate=5, cv=cv, duration=6_000))])
    gaps = np.diff(at)
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("count", [0, 1, 2, 16, 17, 64])
def test_punicas_popularities(count: int) -> None:
    assert len(set(popularity("identical", count))) == min(count, 1)
    assert popularity("distinct", count) == list(range(count))
    uniform = Counter(popularity("uniform", count))
    assert len(uniform) == int(np.ceil(np.sqrt(count))) and (not uniform or max(uniform.values()) - min(uniform.values()) <= 1)
    groups = list(Counter(popularity("skewed", count)).values())
    assert sum(groups) == count and groups[:-1] == [1, 1, 2, 3, 5, 7, 11, 17, 25][: len(groups) - 1] if groups else count == 0


def test_punicas_lengths() -> None:
    pairs = punica_lengths(20_000)
    prompts, totals = np.array([p for p, _ in pairs]), np.array([p + n for p, n in pairs])
    assert prompts.min() >= 1 and prompts.max() <= 2046 and min(n for _, n in pairs) >= 2
    assert np.median(prompts) == pytest.approx(17, abs=1) and totals.mean() == pytest.approx(1024, rel=0.02)


def test_wrong_input_is_one_sentence() -> None:
    with pytest.raises(UnknownName, match="No setting is called 'S3'"):
        setting("S3")
    with pytest.raises(UnknownName, match="did you mean 'skewed'"):
        popularity("skew", 3)
    for options, says in [({"alpha": 0.0}, "alpha = 0"), ({"prompt": (8, 8)}, "prompt lengths"), ({"ranks": ()}, "ranks")]:
        with pytest.raises(OptionError, match=says):
            TraceOptions(**options)
