"""Arrow: prototypes are dominant directions, and PEFT's gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import OptionError, TargetError
from tests.models import batch_for, llama, logits, move


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


def test_neither_signs_nor_scales_nor_a_gauge_of_the_experts_change_the_route(library: list[str], tmp_path: Any) -> None:
    targets = ["q_proj", "up_proj"]
    model, batch = llama(), batch_for(llama())
    adapter = rw.attach(model, {"targets": targets, "router": {"name": "arrow", "adapters": library, "top_k": 2}})
    want = logits(model, batch)
    with torch.no_grad():
        for d in adapter.sites.values():
            d.router.V.mul_(torch.tensor([-1.0, 1.0, -1.0])[:, None])
    assert torch.equal(logits(model, batch), want), "the sign of a prototype is of no matter"
    turned = []
    for i, path in enumerate(library):
        expert = rw.load(llama(), path)
        with torch.no_grad():
            for d in expert.sites.values():  # (A, B) → (T·A, B·T⁻¹) is the same expert
                T = torch.linalg.qr(torch.randn(len(d.A), len(d.A)))[0] * -3.0
                d.B.copy_(d.B @ torch.linalg.inv(T))
                d.A.copy_(T @ d.A)
        expert.export(tmp_path / f"t{i}")
        turned.append(str(tmp_path / f"t{i}"))
    other = llama()
    rw.attach(other, {"targets": targets, "router": {"name": "arrow", "adapters": turned, "top_k": 2}})
    assert torch.allclose(logits(other, batch), want, atol=1e-4)
    louder = []
    for i, path in enumerate(library):
        expert = rw.load(llama(), path)
        with torch.no_grad():
            for d in expert.sites.values():
                d.B.mul_(5.0)  # as a five-fold alpha
        expert.export(tmp_path / f"l{i}")
        louder.append(str(tmp_path / f"l{i}"))
    loud = rw.attach(llama(), {"targets": targets, "router": {"name": "arrow", "adapters": louder, "top_k": 2}})
    x = torch.randn(9, 32)
    for name, d in adapter.sites.items():
        assert torch.allclose(d.router.route(x).dense(), loud.sites[name].router.route(x).dense(), atol=1e-4)


def test_more_to_choose_than_there_are_is_all_of_them(library: list[str]) -> None:
    adapter = rw.attach(llama(), {"targets": ["q_proj"], "router": {"name": "arrow", "adapters": library[:2], "top_k": 3}})
    gate = next(iter(adapter.sites.values())).router.route(torch.randn(5, 32)).dense()
    assert gate.shape == (5, 2) and torch.allclose(gate.sum(1), torch.ones(5), atol=1e-6) and (gate > 0).all()


def _uneven(folder: Any, seed: int, r: int = 2, alpha: float = 4, targets: str = "q_proj") -> str:
    """An exported adapter whose σ₁ stands clear of the others, so that a power iteration has converged."""
    adapter = rw.attach(llama(), {"r": r, "alpha": alpha, "targets": [targets]})
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for d in adapter.sites.values():
            d.A.copy_(torch.randn(r, 32, generator=g) * torch.tensor([3.0, *[0.1] * (r - 1)])[:, None])
            d.B.copy_(torch.randn(d.B.shape, generator=g))
    adapter.export(folder / f"{targets}{seed}")
    return str(folder / f"{targets}{seed}")


def test_general_knowledge_is_subtracted_as_peft_does(tmp_path: Any) -> None:
    """Scales differ, so that a mean of B as stored and one of s·B part ways."""
    peft = pytest.importorskip("peft")
    tasks = [_uneven(tmp_path, i) for i in range(3)]
    general = [_uneven(tmp_path, 7, alpha=6), _uneven(tmp_path, 8)]
    model, batch = llama(), batch_for(llama())
    router = {"name": "arrow", "adapters": tasks, "general": general, "top_k": 2}
    rw.attach(model, {"targets": ["q_proj"], "router": router})
    theirs = peft.create_arrow_model(
        base_model=llama(),
        task_specific_adapter_paths=tasks,
        general_adapter_paths=general,
        arrow_config=peft.ArrowConfig(top_k=2, use_gks=True, rng_seed=0),
    )
    ours = logits(model, batch)
    assert torch.allclose(logits(theirs, batch), ours, atol=1e-4)
    plain = llama()
    rw.attach(plain, {"targets": ["q_proj"], "router": {**router, "general": []}})
    assert (logits(plain, batch) - ours).abs().max() > 1e-2


def test_general_adapters_must_fit_every_task(tmp_path: Any) -> None:
    tasks = [_uneven(tmp_path, 0)]
    for general, words in (
        ([_uneven(tmp_path, 1, r=3)], r"ranks are \[2, 3\]"),
        ([_uneven(tmp_path, 2, targets="k_proj")], "where 0 have a change"),
    ):
        with pytest.raises(OptionError, match=words):
            rw.attach(llama(), {"targets": ["q_proj"], "router": {"name": "arrow", "adapters": tasks, "general": general}})
    with pytest.raises(OptionError, match="adapters as a list of folders"):
        rw.Recipe(router={"name": "arrow", "adapters": tasks[0]})


def test_experts_of_disjoint_subspaces_are_found_without_training(tmp_path: Any) -> None:
    """Disjoint subspaces: each adapter has learnt on inputs of a subspace of its own."""
    paths = []
    for t in range(4):
        model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        adapter = rw.attach(model, {"r": 2, "targets": ["0"]})
        x = torch.zeros(64, 16)
        x[:, 4 * t : 4 * t + 4] = torch.randn(64, 4, generator=torch.Generator().manual_seed(t))
        y = torch.randn(64, 8, generator=torch.Generator().manual_seed(9 + t))
        session = rw.Session(model, adapter, lr=1e-2, total_steps=60)
        for _ in range(60):
            session.step_begin()
            (model(x) - y).square().mean().backward()
            session.step()
        adapter.export(tmp_path / str(t))
        paths.append(str(tmp_path / str(t)))
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    adapter = rw.attach(model, {"targets": ["0"], "router": {"name": "arrow", "adapters": paths, "top_k": 1}})
    hits = 0
    for t in range(4):
        x = torch.zeros(100, 16)
        x[:, 4 * t : 4 * t + 4] = torch.randn(100, 4, generator=torch.Generator().manual_seed(50 + t))
        hits += int((adapter.sites["0"].router.route(x).index == t).sum())
    assert hits > 300, f"{hits} of 400 rows went to their own expert; 100 is chance"
