"""The identities of each init's card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.calibration.base import calibrate
from rankwise.calibration.gradients import MeanGradient
from rankwise.calibration.pca import StreamingPCA
from rankwise.errors import AttachError, DataError, OptionError
from rankwise.sites import find_sites
from tests.contract.test_laws import calibration
from tests.forms.helpers import one
from tests.models import FAMILIES, batch_for, llama, logits


class Loss(nn.Module):
    """A linear whose loss has a known weight gradient."""

    def __init__(self, inp: int = 12, out: int = 10):
        super().__init__()
        self.lin = nn.Linear(inp, out)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        y = self.lin(x)
        return type("Out", (), {"loss": (y * labels).sum(), "logits": y})()


def batches(n: int = 3) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, 12, generator=g), "labels": torch.randn(6, 10, generator=g)} for _ in range(n)]


# --- PiSSA --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [3, 12])
def test_pissa_is_balanced_and_leaves_the_tail(alpha: int) -> None:
    model, adapter, d = one({"init": "pissa", "alpha": alpha})
    S = torch.linalg.svdvals(model[0].weight)
    top = torch.diag(S[:3]) / d.scale
    assert torch.allclose(d.A @ d.A.T, top, atol=1e-5) and torch.allclose(d.B.T @ d.B, top, atol=1e-5)
    residual = model[0].weight - d.delta().dense()
    assert torch.allclose(torch.linalg.svdvals(residual)[:7], S[3:], atol=1e-5)
    model(torch.randn(4, 12)).square().sum().backward()
    assert d.A.grad.any() and d.B.grad.any()
    assert adapter.delta("0").exact_rank == 6, "against the untouched W it is an exact LoRA of rank 2r"


def test_randomised_pissa_starts_exactly_too() -> None:
    model, _, d = one({"init": {"name": "pissa", "niter": 4}})
    x = torch.randn(5, 12)
    with rw.view(model, {}):
        base = model(x)
    assert torch.allclose(model(x), base, atol=1e-6)
    _, _, exact = one({"init": "pissa"})
    cosines = torch.linalg.svdvals(torch.linalg.qr(d.B)[0].T @ torch.linalg.qr(exact.B)[0])
    assert cosines.min() > 0.999


def test_two_residual_adapters_share_one_base() -> None:
    model = llama()
    batch = batch_for(model)
    base = logits(model, batch)
    rw.attach(model, {"init": "pissa", "r": 4}, name="a")
    rw.attach(model, {"init": "olora", "r": 2}, name="b")
    for view in ({"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"a": 0.3}):
        with rw.view(model, view):
            assert torch.allclose(logits(model, batch), base, atol=1e-5), view


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_pissa_on_transposed_and_stacked_weights(family: str) -> None:
    model = FAMILIES[family][0]()
    batch = batch_for(model)
    base = logits(model, batch)
    adapter = rw.attach(model, {"init": "pissa", "r": 2})
    assert torch.allclose(logits(model, batch), base, atol=1e-5)
    assert all(d.A.abs().sum() > 0 and d.B.abs().sum() > 0 for d in adapter.sites.values())


def test_olora_is_orthonormal() -> None:
    model, _, d = one({"init": "olora"})
    assert torch.allclose(d.B.T @ d.B, torch.eye(3), atol=1e-5)
    assert (model[0].weight - d.delta().dense())[:, :3].abs().max() < 1e-5


# --- EVA ----------------------------------------------------------------------------------------------------
def test_streaming_pca_equals_the_batch_one_when_nothing_is_cut() -> None:
    X = torch.randn(300, 8) @ torch.diag(torch.arange(1.0, 9)) + 5
    pca = StreamingPCA(8)
    for part in X.split(37):
        pca.update(part)
    centred = X[: pca.n] - X[: pca.n].mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(pca.sigma, S, rtol=1e-3)
    assert torch.allclose((pca.components * Vh).sum(1).abs(), torch.ones(8), atol=1e-3)
    assert pca.ratios().sum() == pytest.approx(1.0, abs=1e-4)


def test_pca_summaries_merge() -> None:
    X = torch.randn(200, 6) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5])) + 2
    whole, left, right = StreamingPCA(6), StreamingPCA(6), StreamingPCA(6)
    whole.update(X)
    left.update(X[:80])
    right.update(X[80:])
    left.merge(right)
    assert torch.allclose(left.sigma, whole.sigma, rtol=1e-3) and torch.allclose(left.mean, whole.mean, atol=1e-4)


def test_eva_rows_are_top_directions_and_ranks_sum_to_the_budget() -> None:
    model = llama()
    adapter = rw.attach(model, {"init": "eva", "r": 3}, calibration=calibration())
    ranks = {n: d.A.shape[0] for n, d in adapter.sites.items()}
    assert sum(ranks.values()) == 3 * 14 and len(set(ranks.values())) > 1
    for d in adapter.sites.values():
        assert torch.allclose(d.A @ d.A.T, torch.eye(len(d.A)), atol=1e-4) and not d.B.any()
        assert d.scale == 1.0
    q, k = (adapter.sites[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    n = min(len(q.A), len(k.A))
    assert torch.equal(q.A[:n], k.A[:n]), "sites fed by one tensor share their leading rows"


def test_eva_ignores_masked_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 24), generator=g)
    noisy = ids.clone()
    noisy[:, 16:] = torch.randint(3, 64, (4, 8), generator=g)
    labels = ids.clone()
    labels[:, 16:] = -100
    got = [
        next(
            iter(
                rw.attach(
                    llama(),
                    {"init": "eva", "r": 2, "targets": ["q"], "layers": [0]},
                    calibration=[{"input_ids": x, "labels": labels}],
                ).sites.values()
            )
        ).A
        for x in (ids, noisy)
    ]
    assert torch.allclose(*got, atol=1e-5)


def test_data_driven_inits_ask_for_data() -> None:
    with pytest.raises(AttachError, match="'eva' reads statistics"):
        rw.attach(llama(), {"init": "eva"})
    with pytest.raises(DataError, match="empty"):
        rw.attach(llama(), {"init": "eva"}, calibration=[])
    with pytest.raises(DataError, match="no labels"):
        rw.attach(llama(), {"init": "lora_ga", "r": 2}, calibration=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]

    def broken() -> Any:
        yield calibration()[0]
        raise RuntimeError("the data broke")

    sites = list(find_sites(model).values())
    with pytest.raises(RuntimeError, match="data broke"):
        calibrate(model, sites, {"model.layers.0.mlp.up_proj": MeanGradient()}, broken())
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads


# --- LoRA-GA ------------------------------------------------------------------------------------------------
def test_site_gradients_equal_autograds() -> None:
    for family in ("llama", "gpt2", "mixtral", "phi3", "vit"):
        model = FAMILIES[family][0]()
        batch = batch_for(model)
        sites = {
            n: s
            for n, s in find_sites(model).items()
            if s.spec.kind in ("linear", "experts", "conv") and s.spec.role not in ("router",)
        }
        sites = {n: s for n, s in sites.items() if not s.spec.tie_group}  # a tied gradient has both ends in it
        if family == "mixtral":
            sites = {n: s for n, s in sites.items() if s.spec.rows is None}
        stats = calibrate(model, list(sites.values()), {n: MeanGradient() for n in sites}, [batch])
        model.zero_grad()
        model(**batch).loss.backward()
        for n, s in sites.items():
            assert torch.allclose(stats[n], s.view(s.param.grad), atol=1e-5), f"{family} {n}"


def test_first_sgd_step_is_the_best_rank_2r_step() -> None:
    model = Loss()
    data = batches()
    for p in model.parameters():
        p.requires_grad_(False)
    adapter = rw.attach(model, {"targets": ["lin"], "init": {"name": "lora_ga", "niter": 30}, "r": 3, "alpha": 6}, calibration=data)
    d = adapter.sites["lin"]
    G = sum(b["labels"].T @ b["x"] for b in data) / len(data)
    zeta = 10**0.25 / 16**0.5
    eye = torch.eye(3)
    assert torch.allclose(d.A @ d.A.T, zeta**2 * eye, atol=1e-5) and torch.allclose(d.B.T @ d.B, zeta**2 * eye, atol=1e-5)
    before = d.delta().dense().detach().double()
    gA, gB = d.scale * d.B.T @ G, d.scale * G @ d.A.T
    lr = 1e-4
    with torch.no_grad():
        first_order = -lr * d.scale * (gB.double() @ d.A.double() + d.B.double() @ gA.double())
    U, S, Vh = torch.linalg.svd(G.double())
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    assert torch.allclose(first_order, -lr * d.scale**2 * zeta**2 * best, atol=1e-8)
    assert before.norm() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "A2rBr"},
        {"direction": "ArBr"},
        {"direction": "random"},
        {"size": "unit"},
        {"size": "gd"},
        {"size": "weight_svd"},
        {"variant": "peft"},
    ],
)
def test_lora_ga_variants_start_at_the_base(options: dict) -> None:
    model = Loss()
    x = batches()[0]
    base = model(**x).logits
    rw.attach(model, {"targets": ["lin"], "init": {"name": "lora_ga", **options}, "r": 2}, calibration=batches())
    assert torch.allclose(model(**x).logits, base, atol=1e-4)


def test_lora_ga_refuses_too_high_a_rank_by_site() -> None:
    with pytest.raises(OptionError, match="2r = 16.*k_proj"):
        rw.attach(llama(hidden=16), {"init": "lora_ga", "r": 8, "targets": ["k"]}, calibration=calibration())


def test_memory_limit_serves_sites_in_several_passes() -> None:
    model = llama()
    sites = [s for s in find_sites(model).values() if s.spec.role == "up"]
    data = calibration()
    one_pass = calibrate(model, sites, {s.name: MeanGradient() for s in sites}, data)
    two = calibrate(model, sites, {s.name: MeanGradient() for s in sites}, data, memory_limit=1)
    assert all(torch.allclose(one_pass[n], two[n]) for n in one_pass)


# --- LoftQ --------------------------------------------------------------------------------------------------
def test_loftq_is_closer_than_plain_quantisation_and_detaches_exactly() -> None:
    from rankwise.catalogue import make

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 1) * 3)
    W = model[0].weight.detach().clone()
    codec = make("codec", "nf4")
    plain = (W - codec.decode(codec.encode(W))).norm()
    errors = []
    for r in (2, 8, 16):
        adapter = rw.attach(model, {"targets": ["0"], "init": "loftq", "r": r, "alpha": 2 * r})
        Q = model[0].weight.detach().clone()
        d = adapter.sites["0"]
        errors.append((W - Q - d.delta().dense()).norm())
        gap = torch.linalg.svdvals(W - Q)[r:].norm()
        assert torch.allclose(errors[-1], gap, atol=1e-3)
        adapter.detach()
        assert torch.equal(model[0].weight, W)
    assert plain > errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("options", [{"niter": 0}])
def test_wrong_options_of_pissa(options: dict) -> None:
    with pytest.raises(OptionError, match="'pissa'"):
        one({"init": {"name": "pissa", **options}})


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("eva", {"rho": 0.5}),
        ("eva", {"tau": 2}),
        ("lora_ga", {"direction": "up"}),
        ("lora_ga", {"gamma": 0}),
        ("loftq", {"iterations": 0}),
    ],
)
def test_wrong_options(init: str, options: dict) -> None:
    with pytest.raises(OptionError, match=f"'{init}'"):
        rw.Recipe(init={"name": init, **options})
