"""Decisions, plans and the identities of each router's card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.errors import OptionError, RecipeError, TargetError
from rankwise.routers.base import Record, recording
from rankwise.routers.decision import Decision, execute
from rankwise.routers.losses import switch, z_loss
from tests.forms.helpers import one
from tests.models import batch_for, llama, logits, move

D = torch.float64


def sparse(n: int = 9, units: int = 6, k: int = 2, sizes: list[int] | None = None) -> Decision:
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(units, generator=g)[:k] for _ in range(n)])
    return Decision(torch.rand(n, k, dtype=D, generator=g), units, index=index, sizes=sizes)


@pytest.mark.parametrize("sizes", [None, [2, 2, 2, 2, 2, 2], [1, 3, 2, 4, 1, 2]])
def test_all_plans_agree_forward_and_gradients(sizes: list[int] | None) -> None:
    R = sum(sizes) if sizes else 6
    outs = []
    for plan in ("dense", "bag", "segments"):
        torch.manual_seed(0)
        x, A, B = (torch.randn(*s, dtype=D, requires_grad=True) for s in ((9, 8), (R, 8), (5, R)))
        d = sparse(sizes=sizes)
        w = d.weight.clone().requires_grad_(True)
        y = execute(x, A, B, 0.7, Decision(w, 6, d.index, sizes), plan=plan)  # type: ignore[arg-type]
        outs.append([y, *torch.autograd.grad((y * torch.arange(y.numel(), dtype=D).view_as(y)).sum(), [x, A, B, w])])
    naive = 0.7 * torch.stack([B @ (sparse(sizes=sizes).gate()[n] * (A @ x[n])) for n in range(9)])
    assert torch.allclose(outs[0][0], naive, atol=1e-10)
    for other in outs[1:]:
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(outs[0], other, strict=True))


def test_constant_decisions_and_their_plan() -> None:
    x, A, B, g = torch.randn(4, 8, dtype=D), torch.randn(3, 8, dtype=D), torch.randn(5, 3, dtype=D), torch.rand(3, dtype=D)
    d = Decision(g, 3)
    assert d.constant and torch.allclose(execute(x, A, B, 2.0, d), 2.0 * x @ (B @ torch.diag(g) @ A).T)
    with pytest.raises(OptionError, match="same for all rows"):
        execute(x, A, B, 1.0, sparse(4, 3), plan="constant")


# --- SMoRA --------------------------------------------------------------------------------------------------
def smora(r: int = 8, k: int = 4, **options: Any) -> tuple[Any, Any, Any]:
    model, adapter, d = one({"r": r, "alpha": 16, "router": {"name": "smora", "k": k, **options}})
    with torch.no_grad():
        d.inner.B.normal_()
    return model, adapter, d


def test_gates_sum_to_k_and_count() -> None:
    _, adapter, d = smora()
    decision = d.router.route(torch.randn(50, 12))
    assert torch.allclose(decision.dense().sum(-1), torch.full((50,), 4.0), atol=1e-5)
    assert (decision.dense() > 0).sum(-1).eq(4).all()
    assert adapter.numel() == 8 * 22 + 8 * 12


def test_all_on_with_a_flat_router_is_lora_at_alpha_over_k() -> None:
    model, _, d = smora(k=8)
    with torch.no_grad():
        d.router.weight.zero_()
    x = torch.randn(5, 12)
    want = torch.nn.functional.linear(x, model[0].weight, model[0].bias) + 16 / 8 * x @ d.inner.A.T @ d.inner.B.T
    assert torch.allclose(model(x), want, atol=1e-5)


def test_blocks_share_a_score() -> None:
    _, _, d = smora(r=8, k=4, p=4)
    gate = d.router.route(torch.randn(20, 12)).dense()
    assert d.router.weight.shape == (2, 12) and torch.allclose(gate[:, :4], gate[:, :1].expand(-1, 4))


def test_bias_moves_by_u_once_a_step_and_only_in_training() -> None:
    model, adapter, d = smora(u=0.01)
    session = rw.Session(model, adapter, lr=1e-3, total_steps=3, accumulate=2, check=False)
    x = torch.randn(40, 12)
    counts = torch.zeros(8)
    for _ in range(2):
        session.step_begin()
        model.train()
        y = model(x)
        counts += d.router.route(x).counts()
        (y.square().mean() + session.penalty(y, {})).backward()
        before = d.router.bias.clone()
        session.step()
    assert torch.equal(d.router.bias - before, 0.01 * torch.sign(counts.mean() - counts))
    now = d.router.bias.clone()
    model.eval()
    with recording(adapter.module):
        model(x)
    model(x)
    assert torch.equal(d.router.bias, now) and not d.router.records


@pytest.mark.parametrize("options", [{"k": 9}, {"k": 0}, {"p": 3}, {"u": -1}])
def test_smora_refuses(options: dict) -> None:
    with pytest.raises(OptionError, match="'smora'"):
        smora(**options)


# --- MixLoRA ------------------------------------------------------------------------------------------------
def mixlora(**options: Any) -> tuple[Any, Any]:
    model = llama()
    adapter = rw.attach(model, {"r": 2, "router": {"name": "mixlora", "experts": 4, **options}})
    move(adapter, std=0.3)
    return model, adapter


def naive_block(model: Any, adapter: Any, layer: int, h: Tensor) -> Tensor:
    """Σ_e w_e·F_e(h), one expert after the other, from the plain weights."""
    path = f"model.layers.{layer}.mlp"
    mlp, block = model.model.layers[layer].mlp, adapter.sites[path]
    decision = block.router.route(h)
    y = torch.zeros_like(h)

    def weight(name: str, e: int) -> Tensor:
        d = adapter.sites[f"{path}.{name}_proj"]
        A, B = d.inner.A[2 * e : 2 * e + 2], d.inner.B[:, 2 * e : 2 * e + 2]
        return getattr(mlp, f"{name}_proj").weight + d.scale * B @ A

    for e in range(4):
        f = torch.nn.functional.silu(h @ weight("gate", e).T) * (h @ weight("up", e).T) @ weight("down", e).T
        y = y + decision.dense()[:, e : e + 1] * f
    return y


def test_the_block_is_the_naive_sum_over_experts() -> None:
    model, adapter = mixlora()
    h = torch.randn(2, 7, 32)
    got = model.model.layers[1].mlp(h)
    assert torch.allclose(got.reshape(-1, 32), naive_block(model, adapter, 1, h.reshape(-1, 32)), atol=1e-5)


def test_equal_experts_make_the_router_irrelevant() -> None:
    model, adapter = mixlora()
    with torch.no_grad():
        for name, d in adapter.sites.items():
            if hasattr(d, "experts"):
                d.inner.A.copy_(d.inner.A[:2].repeat(4, 1))
                d.inner.B.copy_(d.inner.B[:, :2].repeat(1, 4))
    batch = batch_for(model)
    before = logits(model, batch)
    with torch.no_grad():
        for name, d in adapter.sites.items():
            if name.endswith(".mlp"):
                d.router.weight.normal_()
    assert torch.allclose(logits(model, batch), before, atol=1e-5)


def test_attention_keeps_an_ordinary_pair() -> None:
    _, adapter = mixlora()
    assert adapter.sites["model.layers.0.self_attn.q_proj"].A.shape[0] == 2
    assert adapter.sites["model.layers.0.mlp.up_proj"].inner.A.shape[0] == 8


def test_rows_and_strengths_reach_inside_blocks() -> None:
    model, _ = mixlora()
    batch = batch_for(model)
    with rw.view(model, {"default": 1}, rows=["default", None, "default"]):
        mixed = logits(model, batch)
    with rw.view(model, {}):
        assert torch.allclose(mixed[1], logits(model, batch)[1], atol=1e-5)
    assert torch.allclose(mixed[0], logits(model, batch)[0], atol=1e-5)


def test_switch_loss_is_k_at_uniform_and_trains_the_router() -> None:
    n = 4000
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(n)])
    d = Decision(torch.full((n, 2), 0.5), 4, index=index, probs=torch.full((n, 4), 0.25), logits=torch.zeros(n, 4))
    assert switch([Record(d)], per="row").item() == pytest.approx(2.0, abs=1e-3)
    assert switch([Record(d)]).item() == pytest.approx(1.0, abs=1e-3)
    assert z_loss([Record(d)]).item() == pytest.approx(torch.log(torch.tensor(4.0)).item() ** 2, rel=1e-5)


def test_padding_changes_neither_losses_nor_other_rows() -> None:
    g = torch.Generator().manual_seed(0)
    probs = torch.rand(10, 4, generator=g).softmax(-1)
    index = probs.topk(2).indices
    mask = torch.tensor([True] * 6 + [False] * 4)
    whole = Decision(torch.ones(10, 2), 4, index=index, probs=probs, logits=probs.log())
    part = Decision(torch.ones(6, 2), 4, index=index[:6], probs=probs[:6], logits=probs[:6].log())
    assert torch.allclose(switch([Record(whole, mask)]), switch([Record(part)]))
    assert torch.allclose(z_loss([Record(whole, mask)]), z_loss([Record(part)]))


def test_mixlora_refuses() -> None:
    with pytest.raises(OptionError, match="'mixlora'"):
        rw.Recipe(router={"name": "mixlora", "k": 9})
    with pytest.raises(TargetError, match="no MLP"):
        rw.attach(llama(), {"r": 2, "targets": ["q"], "router": "mixlora"})
    with pytest.raises(RecipeError, match="gives 'gate'"):
        rw.Recipe(form="paca", router="mixlora")
    with pytest.raises(RecipeError, match="would gate"):
        rw.attach(llama(), {"r": 8, "init": "pissa", "router": {"name": "smora", "k": 2}})


# --- Arrow --------------------------------------------------------------------------------------------------
@pytest.fixture
def library(tmp_path: Any) -> list[str]:
    out = []
    for i, r in enumerate((2, 4, 3)):
        adapter = rw.attach(llama(), {"r": r, "alpha": 2 * r, "targets": ["q_proj", "up_proj"]})
        move(adapter, std=0.3, seed=i)
        adapter.export(tmp_path / f"a{i}")
        out.append(str(tmp_path / f"a{i}"))
    return out


def test_arrow_follows_the_dominant_directions(library: list[str]) -> None:
    model = llama()
    adapter = rw.attach(model, {"targets": ["q_proj", "up_proj"], "router": {"name": "arrow", "adapters": library, "top_k": 2}})
    assert not adapter.named_parameters(), "nothing trains"
    name = "model.layers.0.self_attn.q_proj"
    d = adapter.sites[name]
    experts = [rw.load(llama(), p).delta(name).dense() for p in library]
    for v, W in zip(d.router.V, experts, strict=True):
        assert abs(torch.linalg.svd(W)[2][0] @ v) == pytest.approx(1.0, abs=1e-4)
    x = torch.randn(6, 32)
    score = torch.stack([(x @ v).abs() for v in d.router.V], 1)
    top = score.topk(2).indices
    weight = torch.zeros_like(score).scatter(1, top, score.gather(1, top).softmax(-1))
    want = sum(weight[:, e : e + 1] * (x @ experts[e].T) for e in range(3))
    assert torch.allclose(d(x, torch.zeros(6, 32)), want, atol=1e-5)


def test_one_adapter_is_itself_and_files_keep_the_library(library: list[str], tmp_path: Any) -> None:
    batch = batch_for(llama())
    model = llama()
    adapter = rw.attach(model, {"targets": ["q_proj", "up_proj"], "router": {"name": "arrow", "adapters": library[:1]}})
    assert torch.allclose(logits(model, batch), logits(rw.load(llama(), library[0]).model, batch), atol=1e-5)
    many = rw.attach(llama(), {"targets": ["q_proj", "up_proj"], "router": {"name": "arrow", "adapters": library}})
    many.save(tmp_path / "n")
    assert torch.equal(logits(rw.load(llama(), tmp_path / "n").model, batch), logits(many.model, batch))
    assert adapter.numel() == 0


def test_arrow_equals_peft(library: list[str], tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    same = []
    for i in range(3):
        adapter = rw.attach(llama(), {"r": 2, "targets": ["q_proj"]})
        with torch.no_grad():
            for d in adapter.sites.values():  # a clear σ₁, so that their power iteration has converged
                g = torch.Generator().manual_seed(i)
                d.A.copy_(torch.randn(2, 32, generator=g) * torch.tensor([[3.0], [0.1]]))
                d.B.copy_(torch.randn(32, 2, generator=g))
        adapter.export(tmp_path / f"s{i}")
        same.append(str(tmp_path / f"s{i}"))
    model = llama()
    rw.attach(model, {"targets": ["q_proj"], "router": {"name": "arrow", "adapters": same, "top_k": 2}})
    theirs = peft.create_arrow_model(
        base_model=llama(), task_specific_adapter_paths=same, arrow_config=peft.ArrowConfig(top_k=2, rng_seed=0)
    )
    batch = batch_for(model)
    assert torch.allclose(logits(theirs, batch), logits(model, batch), atol=1e-4)


def test_arrow_needs_adapters_that_reach_its_targets(library: list[str]) -> None:
    with pytest.raises(OptionError, match="adapters="):
        rw.Recipe(router="arrow")
    with pytest.raises(TargetError, match="no adapter has a change"):
        rw.attach(llama(), {"targets": ["k_proj"], "router": {"name": "arrow", "adapters": library}})
