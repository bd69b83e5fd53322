"""The largest entries as signs times one magnitude: which are kept, with what magnitude, and when that cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from rankwise.codecs.signs import bf16_bits, bf16_value, prune, to_bf16
from rankwise.errors import ArtefactError, OptionError


def test_the_largest_are_kept_and_ties_go_to_the_first() -> None:
    kept = prune(np.array([1.0, -3.0, 2.0, 2.0, -2.0, 0.5]), 0.5, 1.0, ["float32"], "x")
    assert kept.positions.tolist() == [1, 2, 3] and kept.negative.tolist() == [True, False, False]
    assert kept.gamma == to_bf16(float(np.std([1.0, -3.0, 2.0, 2.0, -2.0, 0.5])))
    assert kept.dense().tolist() == [0.0, -kept.gamma, kept.gamma, kept.gamma, 0.0, 0.0]


def test_every_entry_kept_is_at_least_as_large_as_any_dropped() -> None:
    rng = np.random.default_rng(0)
    for density in (0.01, 0.2, 0.9, 1.0):
        tau = rng.standard_normal(500).round(1)  # with ties
        kept = prune(tau, density, 1.0, ["float32"], "x")
        size, dropped = np.abs(tau), np.setdiff1d(np.arange(500), kept.positions)
        assert kept.positions.size == min(int(density * 500), np.count_nonzero(tau)) and (np.diff(kept.positions) > 0).all()
        assert not dropped.size or size[kept.positions].min() >= size[dropped].max()


def test_what_is_already_such_a_value_keeps_its_magnitude() -> None:
    tau = np.array([0.0, 0.25, -0.25, 0.0])
    again = prune(tau, 0.5, 7.0, ["float32"], "x")
    assert again.gamma == 0.25 and np.array_equal(again.dense(), tau)
    assert prune(np.zeros(4), 0.5, 1.0, ["float32"], "x").positions.size == 0


def test_what_keeps_nothing_or_cannot_be_held_is_refused() -> None:
    with pytest.raises(OptionError, match="density=0.1 keeps none of the 4 entries of x"):
        prune(np.ones(4), 0.1, 1.0, ["float32"], "x")
    with pytest.raises(OptionError, match="which float16 cannot hold"):
        prune(np.array([1e6, -2e6, 3e6, -4e6]), 0.5, 1.0, ["float16", "float16"], "x")


def test_a_magnitude_is_its_16_bits() -> None:
    assert all(bf16_value(bf16_bits(v)) == v == to_bf16(v) for v in (0.0, 0.5, 3.0, 2.0**-100))
    for bits in (bf16_bits(float("inf")), bf16_bits(float("nan")), bf16_bits(-1.0)):
        with pytest.raises(ArtefactError, match="damaged"):
            bf16_value(bits)
