"""Stragglers: the layer trained twenty times faster is found, and thinning its update mends the path."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rankwise.delta import AdapterState, LowRank
from rankwise.delta.lowrank import from_dense
from rankwise.errors import OptionError
from rankwise.merge.judge.evaluator import Evaluator
from rankwise.merge.methods.interpolation import path
from rankwise.merge.methods.straggler import Path, layers, profile, sharpness, sparsified, stragglers
from tests.merge.models import SITES, value
from tests.models import llama

HOT = "body.3"


class Deep(nn.Module):
    """Six residual layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        for m in self.body:
            x = x + torch.tanh(m(x))
        logits = self.head(x)
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


def data(seed: int, n: int = 256) -> dict[str, torch.Tensor]:
    """Four overlapping clusters; few of them are easily learnt by heart."""
    centres = 0.8 * torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=g)
    return {"x": centres[y] + 1.5 * torch.randn(n, 16, generator=g), "labels": y}


def train(net: nn.Module, batch: dict[str, torch.Tensor], steps: int, lr: float, hot: str | None = None) -> None:
    weights = [(n, p) for n, p in net.named_parameters() if n.endswith("weight")]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr * (20 if n == f"{hot}.weight" else 1)} for n, p in weights], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        net(**batch).loss.backward()
        optimizer.step()


@functools.cache
def tuned() -> tuple[Evaluator, AdapterState, Any]:
    """A base, its fine-tune on 32 rows with one layer at 20 times the rate, and an evaluator of held-out loss."""
    base = Deep()
    train(base, data(1), 100, 0.1)
    net = copy.deepcopy(base)
    train(net, data(2, 32), 40, 0.2, HOT)
    base.zero_grad()
    sites = {
        n: from_dense((m.weight - base.get_submodule(n).weight).detach())
        for n, m in net.named_modules()
        if isinstance(m, nn.Linear)
    }
    held = data(3)
    return Evaluator(base, lambda m: m(**held).loss.item(), batches=[held]), AdapterState(sites), net


def test_the_profile_flags_the_layer_that_was_trained_too_fast() -> None:
    evaluator, state, net = tuned()
    before = {n: p.detach().clone() for n, p in evaluator.model.named_parameters()}
    got = profile(evaluator, state, layers(evaluator.model, state, "site"))
    assert stragglers({n: p.barrier for n, p in got.items()}) == [HOT]
    assert got[HOT].barrier > 10 * max(p.barrier for n, p in got.items() if n != HOT)
    assert all(torch.equal(p, before[n]) for n, p in evaluator.model.named_parameters())
    held = data(3)
    for alpha, cost in zip(got[HOT].alphas, got[HOT].costs, strict=True):  # against weights written by hand
        other = copy.deepcopy(net)
        with torch.no_grad():
            start, end = before[f"{HOT}.weight"], net.get_submodule(HOT).weight
            other.get_submodule(HOT).weight.copy_(start + alpha * (end - start))
        for n, p in other.named_parameters():
            if n.endswith("bias"):
                p.data.copy_(before[n])
        assert cost == pytest.approx(other(**held).loss.item(), abs=1e-4)


def test_thinning_the_straggler_mends_the_path() -> None:
    evaluator, state, _ = tuned()
    thin = sparsified(state, [HOT], 0.1)
    plain, mended = ([p.scores["held out"] for p in path(evaluator, s)] for s in (state, thin))
    assert mended[0] == plain[0] and all(m < p for m, p in zip(mended[1:], plain[1:], strict=True))
    assert min(mended) < min(plain) and plain[-1] - mended[-1] > 0.1
    D, kept = state.sites[HOT].dense(), thin.sites[HOT].dense()
    want = D * (D.abs() >= D.abs().flatten().topk(25).values[-1])  # int(0.1·256) entries
    assert torch.allclose(kept, want, atol=1e-5) and max(thin.meta["truncation"].values()) < 1e-6
    assert all(thin.sites[n] is d for n, d in state.sites.items() if n != HOT)
    low = sparsified(state, [HOT], 0.1, rank=2)
    lost = (low.sites[HOT].dense() - want).norm() / want.norm()
    assert low.sites[HOT].exact_rank == 2 and low.meta["truncation"][HOT] == pytest.approx(float(lost), abs=1e-4) and lost > 0.1


def test_density_one_is_the_ordinary_path_and_ends_are_exact() -> None:
    evaluator, state, _ = tuned()
    assert sparsified(state, [HOT], 1.0) is state
    points = path(evaluator, state, (0.0, 1.0))
    assert points[0].scores["held out"] == pytest.approx(evaluator.score(AdapterState({})), abs=1e-6)
    assert points[1].scores["held out"] == pytest.approx(evaluator.score(state), abs=1e-6)


def test_a_layer_that_did_not_move_has_no_barrier() -> None:
    evaluator, state, _ = tuned()
    still = AdapterState({**state.sites, "body.0": LowRank(torch.zeros(1, 16), torch.zeros(16, 1))})
    groups = layers(evaluator.model, still, "site")
    asked = evaluator.evaluations
    got = profile(evaluator, still, {n: groups[n] for n in ("body.0", "body.1")})
    assert got["body.0"].barrier == 0.0 and len(set(got["body.0"].costs)) == 1 and evaluator.evaluations == asked + 5


def test_barrier_and_outliers_by_hand() -> None:
    assert Path((0.0, 0.25, 0.5, 1.0), (2.0, 2.5, 1.9, 1.0)).barrier == pytest.approx(0.75)  # 2.5 − 1.75
    assert Path((0.0, 0.5, 1.0), (2.0, 1.0, 1.0)).barrier == 0.0
    flat = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0}  # without x: quartiles 2, 3, 4, so the bound is 6
    assert stragglers({**flat, "x": 6.1}) == ["x"] and stragglers({**flat, "x": 5.9}) == []
    assert stragglers({**dict.fromkeys("abcde", 1.0), "x": 9.0, "y": 8.0}) == ["x", "y"]
    assert stragglers({**dict.fromkeys("abcde", 0.0), "x": 5e-5}) == []  # rounding is no barrier
    assert stragglers({**dict.fromkeys("abcde", 0.0), "x": 5e-5}, floor=0.0) == ["x"]


def test_sharpness_is_one_normalised_step_up() -> None:
    evaluator, state, net = tuned()
    groups = layers(evaluator.model, state, "site")
    got = sharpness(evaluator, state, groups, radius=0.02)
    assert all(v > 0 for v in got.values())
    held, name = data(3), "body.1"
    moved = copy.deepcopy(net).requires_grad_(True)
    moved.load_state_dict({**net.state_dict(), **{n: p for n, p in evaluator.model.named_parameters() if n.endswith("bias")}})
    loss = moved(**held).loss
    moved.zero_grad()
    loss.backward()
    w = moved.get_submodule(name).weight
    with torch.no_grad():
        w.add_(0.02 * w.norm() * w.grad / w.grad.norm())
    assert got[name] == pytest.approx(moved(**held).loss.item() - loss.item(), rel=1e-2)
    pair = sharpness(evaluator, state, {"two": ["body.1", "body.2"]}, radius=0.02)
    assert pair["two"] > max(got["body.1"], got["body.2"])
    assert "rankwise" not in evaluator.model._modules


def test_layers_are_the_models_blocks() -> None:
    state = value(0)
    got = layers(llama(), state)
    assert got == {f"layer {i}": sorted(n for n in SITES if f"layers.{i}." in n) for i in (0, 1)}
    assert layers(llama(), state, "site") == {n: [n] for n in sorted(SITES)}
    assert list(layers(tuned()[0].model, AdapterState({"head": tuned()[1].sites["head"]}))) == ["head"]


def test_wrong_input_is_told() -> None:
    evaluator, state, _ = tuned()
    with pytest.raises(OptionError, match="from 0 to 1"):
        profile(evaluator, state, {"a": [HOT]}, grid=(0.0, 1.0))
    with pytest.raises(OptionError, match="nothing called 'odd'"):
        profile(evaluator, state, {"a": ["odd"]})
    with pytest.raises(OptionError, match="three other layers"):
        stragglers({"a": 1.0, "b": 0.0})
    with pytest.raises(OptionError, match="density as a share"):
        sparsified(state, [HOT], 0.0)
    with pytest.raises(OptionError, match="batches"):
        sharpness(Evaluator(evaluator.model), state, {"a": [HOT]})
    with pytest.raises(OptionError, match="radius"):
        sharpness(evaluator, state, {"a": [HOT]}, radius=0.0)
