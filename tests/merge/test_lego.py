"""LoRA-LEGO: twins meet, signs and gauges of one unit do not cancel, k by rank or by energy, both reweightings."""

from __future__ import annotations

import pytest
import torch

from rankwise.delta import AdapterState, LowRank
from rankwise.errors import OptionError
from rankwise.merge import merge_states
from tests.merge.tools import dense, source


def test_shared_units_meet_and_k_is_chosen() -> None:
    a = source(0)
    doubled = merge_states([a, a], [1.0, 1.0], "lego", rank=3, reweigh_output=False)
    assert doubled.sites["x"].exact_rank == 3
    assert torch.allclose(dense(doubled), dense(a), atol=1e-4), "twin units in one cluster return themselves"
    flipped = AdapterState({n: LowRank(-2 * d.A, -d.B / 2, d.scale) for n, d in a.sites.items()})
    assert torch.allclose(
        dense(merge_states([a, flipped], [1.0, 1.0], "lego", rank=3, reweigh_output=False)), dense(a), atol=1e-4
    ), "(−2a, −b/2) is the same unit"
    many = merge_states([a, source(1)], None, "lego", energy=0.9)
    assert 1 <= many.sites["x"].exact_rank <= 6
    full = merge_states([a, source(1)], [0.5, 0.5], "lego", rank=6, reweigh_output=False)
    assert torch.allclose(dense(full), 0.5 * dense(a) + 0.5 * dense(source(1)), atol=1e-5), "singleton clusters are the sum"


def test_reweightings() -> None:
    a = source(0, r=4)
    plain = merge_states([a], [1.0], "lego", rank=2, reweigh_output=False)
    scaled = merge_states([a], [1.0], "lego", rank=2)
    assert torch.allclose(dense(scaled), 2**0.5 * dense(plain), atol=1e-5)
    small = merge_states([a], [1.0], "lego", rank=2, reweigh_output=False, reweigh_parameters=False)
    assert dense(small).norm() < dense(plain).norm(), "a mean of different units is shorter than they are"
    with pytest.raises(OptionError, match="not both"):
        merge_states([a], [1.0], "lego", rank=2, energy=0.9)
