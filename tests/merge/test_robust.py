"""Robust fine-tuning interpolation: straight where nothing is thinned, stragglers named or found by the profile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankwise.delta import AdapterState
from rankwise.errors import OptionError
from rankwise.merge import merge_states
from rankwise.merge.checkpoints import merge_checkpoints
from rankwise.merge.methods.straggler import layers, profile, sparsified, stragglers
from tests.merge.test_checkpoints import folder, whole
from tests.merge.test_straggler import tuned
from tests.merge.tools import dense, source


def test_density_one_is_the_straight_line_with_exact_ends() -> None:
    a = source(0)
    for alpha in (0.0, 0.75, 1.0):
        got = merge_states([a], None, "robust_interpolation", alpha=alpha)
        assert torch.allclose(dense(got), alpha * dense(a), atol=1e-6) and got.sites["x"].exact_rank == 3
    assert torch.allclose(dense(merge_states([a], [0.5], "robust_interpolation")), 0.375 * dense(a), atol=1e-6)


def test_named_stragglers_keep_their_largest_entries() -> None:
    a = source(0)
    got = merge_states([a], None, "robust_interpolation", alpha=0.5, density=0.25, stragglers=["x"])
    keep = dense(a).abs().flatten().topk(20).indices
    want = torch.zeros(80, dtype=torch.float64)
    want[keep] = 0.5 * dense(a).flatten()[keep]
    assert torch.allclose(dense(got), want.view(10, 8), atol=1e-5)
    assert torch.allclose(dense(got, "y"), 0.5 * dense(a, "y"), atol=1e-6)
    cut = merge_states([a], None, "robust_interpolation", alpha=0.5, density=0.25, stragglers="x", rank=2)
    assert cut.sites["x"].exact_rank == 2 and cut.meta["truncation"]["x"] > 0 == cut.meta["truncation"]["y"]


def test_stragglers_are_found_by_the_profile_and_told() -> None:
    evaluator, state, _ = tuned()
    groups = layers(evaluator.model, state, "site")
    expected = stragglers({n: p.barrier for n, p in profile(evaluator, state, groups).items()})
    got = merge_states([state], None, "robust_interpolation", alpha=0.5, density=0.1, evaluator=evaluator)
    assert list(got.meta["found"]["stragglers"]) == sorted(expected) != []
    by_hand = sparsified(state, expected, 0.1).scaled(0.5)
    for n in state.sites:
        assert torch.allclose(got.sites[n].dense(), by_hand.sites[n].dense(), atol=1e-4), n
    calm = merge_states([state.scaled(1e-4)], None, "robust_interpolation", alpha=0.5, density=0.1, evaluator=evaluator)
    assert calm.meta["found"] == {"density": 1.0}, "no layer stands out, so nothing is thinned, and that is told"


def test_whole_models(tmp_path: Path) -> None:
    base, a = folder(tmp_path / "base", 0), folder(tmp_path / "a", 1)
    n = "model.layers.0.up.weight"
    merge_checkpoints([a], tmp_path / "out", "robust_interpolation", base=base, alpha=0.5, density=0.1, stragglers=[n])
    W, A, got = whole(base), whole(a), whole(tmp_path / "out")
    for k, t in got.items():
        move = A[k] - W[k]
        if k == n:
            keep = torch.zeros(move.numel(), dtype=torch.bool)
            keep[move.abs().flatten().topk(int(0.1 * move.numel())).indices] = True
            move = move * keep.view(move.shape)
        assert torch.allclose(t, W[k] + 0.5 * move, atol=1e-6), k
    with pytest.raises(OptionError, match="did you mean 'model.layers.0.up.weight'"):
        merge_checkpoints([a], tmp_path / "no", "robust_interpolation", base=base, density=0.5, stragglers=[n[:-1]])
    with pytest.raises(OptionError, match="on adapters alone"):
        merge_checkpoints([a], tmp_path / "no", "robust_interpolation", base=base, density=0.5)


def test_wrong_input_is_told() -> None:
    a = source(0)
    with pytest.raises(OptionError, match="between 1 sources; it got 2"):
        merge_states([a, a], None, "robust_interpolation")
    with pytest.raises(OptionError, match="density below 1; it got 1"):
        merge_states([a], None, "robust_interpolation", stragglers=["x"])
    with pytest.raises(OptionError, match="'z', where nothing is changed"):
        merge_states([a], None, "robust_interpolation", density=0.5, stragglers=["z"])
    with pytest.raises(OptionError, match="needs a score"):
        merge_states([a], None, "robust_interpolation", density=0.5)
    with pytest.raises(OptionError, match="density as a share"):
        merge_states([AdapterState(a.sites)], None, "robust_interpolation", density=0.0)
