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


def planted(groups: int = 3, sources: int = 4, noise: float = 0.05) -> tuple[list[AdapterState], list[torch.Tensor]]:
    """(sources with one unit near each of ``groups`` planted ones, in shuffled order and gauge; each group's units [a; b], balanced)."""
    g = torch.Generator().manual_seed(7)
    centre = torch.randn(groups, 18, generator=g)
    members: list[list[torch.Tensor]] = [[] for _ in range(groups)]
    made = []
    for _ in range(sources):
        a, b = (centre + noise * torch.randn(groups, 18, generator=g)).split([8, 10], dim=1)
        for i in range(groups):
            root = (a[i].norm() * b[i].norm()).sqrt()
            members[i].append(torch.cat([a[i] / a[i].norm() * root, b[i] / b[i].norm() * root]))
        order, gauge = torch.randperm(groups, generator=g), torch.randn(groups, 1, generator=g)
        made.append(AdapterState({"x": LowRank((a * gauge)[order], (b / gauge).T[:, order], 1.0)}))
    return made, [torch.stack(m) for m in members]


@pytest.mark.parametrize("nu", ["linf", "l2"])
@pytest.mark.parametrize("feature", ["halves", "raw"])
def test_after_parameter_reweighting_a_centroid_has_the_mean_size_of_its_members(nu: str, feature: str) -> None:
    states, members = planted()
    options = {"rank": 3, "nu": nu, "feature": feature, "reweigh_output": False}
    merged = merge_states(states, [1.0] * 4, "lego", **options).sites["x"]
    size = lambda u: u.abs().amax(-1) if nu == "linf" else u.norm(dim=-1)
    units = torch.cat([merged.A, merged.B.T], 1)
    assert units.shape == (3, 18) and merged.scale == 1.0
    for group in members:
        means = torch.nn.functional.normalize(group.mean(0), dim=0)
        cosines = torch.nn.functional.normalize(units, dim=1) @ means
        mine = cosines.abs().argmax()
        assert cosines[mine].abs() == pytest.approx(1.0, abs=1e-5), "the centroid is the mean of the planted group"
        assert size(units[mine]) == pytest.approx(size(group).mean().item(), rel=1e-6)
    without = merge_states(states, [1.0] * 4, "lego", **options, reweigh_parameters=False).sites["x"]
    shorter = torch.cat([without.A, without.B.T], 1)
    assert torch.allclose(torch.nn.functional.normalize(units, dim=1), torch.nn.functional.normalize(shorter, dim=1), atol=1e-6)
    if nu == "l2":  # the largest entries may stand at one place, where their mean is the mean's
        assert (shorter.norm(dim=1) < units.norm(dim=1)).all(), "a mean of unlike units is shorter than they are"


def test_order_of_units_and_calls_change_nothing_and_all_units_are_cat() -> None:
    states, _ = planted()
    options = {"rank": 3, "reweigh_output": False}
    want = dense(merge_states(states, None, "lego", **options))
    assert torch.equal(dense(merge_states(states, None, "lego", **options)), want), "the same call gives other bits"
    turned = [AdapterState({"x": LowRank(s.sites["x"].A.flip(0), s.sites["x"].B.flip(1), 1.0)}) for s in states]
    assert torch.allclose(dense(merge_states(turned, None, "lego", **options)), want, atol=1e-5)
    weights = [0.7, -0.3, 0.5, 1.0]
    every = merge_states(states, weights, "lego", rank=12, reweigh_output=False)
    assert every.sites["x"].exact_rank == 12 and every.sites["x"].numel() == 12 * 18
    assert torch.allclose(dense(every), dense(merge_states(states, weights, "cat")), atol=1e-5)
