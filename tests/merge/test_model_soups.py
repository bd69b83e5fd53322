"""Soups of whole models: greedy by its definition with few copies, learned by gradient, written from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import MergeError, OptionError
from rankwise.merge import Evaluator
from rankwise.merge.checkpoints import merge_checkpoints
from rankwise.merge.judge.model_soups import Models
from tests.merge.test_checkpoints import whole
from tests.models import batch_for, llama


def loader(folder: str) -> Any:
    import transformers as T

    return T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four moves from one start: three down the gradient of the selection loss with noise, one up."""
    root, made = tmp_path_factory.mktemp("soup"), []
    start = llama().requires_grad_(True)
    start(**batch_for(start, seed=5)).loss.backward()
    for seed, step in ((0, 0.5), (1, 0.4), (2, 0.3), (3, -0.6)):
        net, g = llama(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p, q in zip(net.parameters(), start.parameters(), strict=True):
                p.add_(-step * q.grad + 0.01 * torch.randn(p.shape, generator=g))
        net.save_pretrained(root / str(seed))
        made.append(str(root / str(seed)))
    return made


def judged(folders: list[str], **more: Any) -> Models:
    model = loader(folders[0])
    held = batch_for(model, seed=5)
    return Models(Evaluator(model, lambda m: float(m(**held).loss), batches=[held], **more), folders, loader)


def cost(tensors: dict[str, torch.Tensor]) -> float:
    net = llama()
    net.load_state_dict(tensors, strict=False)
    net.requires_grad_(False)
    return float(net(**batch_for(net, seed=5)).loss)


def mean(folders: list[str]) -> dict[str, torch.Tensor]:
    every = [whole(Path(f)) for f in folders]
    return {n: torch.stack([t[n] for t in every]).mean(0) for n in every[0]}


@pytest.mark.parametrize("strict", [False, True])
def test_greedy_is_its_definition(folders: list[str], tmp_path: Path, strict: bool) -> None:
    models = judged(folders)
    loads: list[str] = []
    load = models._load
    models._load = lambda f: loads.append(f) or load(f)  # type: ignore[func-returns-value]
    report = merge_checkpoints(folders, tmp_path / "soup", "greedy_soup", models=models, strict=strict)
    alone = [cost(whole(Path(f))) for f in folders]
    order = sorted(range(4), key=alone.__getitem__)
    kept, best = order[:1], alone[order[0]]
    for t in order[1:]:
        found = cost(mean([folders[u] for u in [*kept, t]]))
        if found < best:
            kept, best = [*kept, t], found
    assert report.weights == [1 / len(kept) if t in kept else 0.0 for t in range(4)]
    assert 1 < len(kept) < 4, "the soup is a real one, and leaves some out"
    wanted = mean([folders[t] for t in kept])
    for n, t in whole(tmp_path / "soup").items():
        assert torch.allclose(t, wanted[n], atol=1e-6)
    assert report.score["merged"] == pytest.approx(best, abs=1e-5) and report.score["merged"] < min(alone)
    assert list(report.score["sources"].values()) == pytest.approx(alone, abs=1e-5)
    assert len(loads) <= 4 + 3 + 1 + 1, "each alone, each next, the first of the mean, what was written"


def test_the_running_mean_is_the_mean(folders: list[str]) -> None:
    """Whether the last candidate was taken, turned down, or none was judged before."""
    models = judged(folders)
    for members in ([0, 1], [0, 1, 2], [0, 1, 3], [2, 0], [2, 0, 1, 3]):
        assert models.cost_of_mean(members) == pytest.approx(cost(mean([folders[t] for t in members])), abs=1e-5), members


def test_uniform_and_greedy_of_twins(folders: list[str], tmp_path: Path) -> None:
    merge_checkpoints(folders[:3], tmp_path / "u", "uniform_soup")
    merge_checkpoints([folders[1], folders[2], folders[0]], tmp_path / "v", "uniform_soup")
    wanted = mean(folders[:3])
    for n, t in whole(tmp_path / "u").items():
        assert torch.allclose(t, wanted[n], atol=1e-6) and torch.allclose(t, whole(tmp_path / "v")[n], atol=1e-6)
    twins = [folders[0], folders[0]]
    merge_checkpoints(twins, tmp_path / "t", "greedy_soup", models=judged(twins))
    assert all(torch.allclose(t, whole(Path(folders[0]))[n], atol=1e-7) for n, t in whole(tmp_path / "t").items())


@pytest.mark.parametrize("per", ["model", "site"])
def test_learned_starts_uniform_and_leaves_the_bad_one(folders: list[str], tmp_path: Path, per: str) -> None:
    models = judged(folders)
    merge_checkpoints(folders, tmp_path / "none", "learned_soup", models=models, per=per, epochs=0)
    wanted = mean(folders)
    assert all(torch.allclose(t, wanted[n], atol=1e-6) for n, t in whole(tmp_path / "none").items())
    report = merge_checkpoints(folders, tmp_path / "soup", "learned_soup", models=judged(folders), per=per, epochs=30)
    assert report.score["merged"] < cost(wanted)
    weights = torch.tensor(report.weights if per == "model" else list(report.weights.values()))
    assert torch.allclose(weights.sum(-1), torch.ones(())) and (per == "site" or float(weights[3]) < 0.1)
    assert (per == "site") == bool(weights.dim() == 2 and weights.std(0, correction=0).max() > 1e-3)
    every = [whole(Path(f)) for f in folders]
    for n, t in whole(tmp_path / "soup").items():
        w = report.weights[n] if per == "site" else report.weights
        assert torch.allclose(t, sum(c * s[n] for c, s in zip(w, every, strict=True)), atol=1e-6)


def test_the_gradient_of_a_weight_is_the_inner_product_with_its_model(folders: list[str]) -> None:
    """∂loss/∂α_t = ⟨∇_θ loss, θ_t⟩, and a central difference."""
    models = judged(folders[:2])
    alpha = torch.tensor([[0.6, 0.4]], requires_grad=True)
    batch = models.evaluator.batches[0]
    loss = models.mixture([])
    (got,) = torch.autograd.grad(loss(alpha, batch, None), alpha)
    every = [whole(Path(f)) for f in folders[:2]]
    net = llama().requires_grad_(True)
    net.load_state_dict({n: 0.6 * every[0][n] + 0.4 * every[1][n] for n in every[0]}, strict=False)
    net(**batch).loss.backward()
    for t in range(2):
        inner = sum((p.grad * every[t][n]).sum() for n, p in net.named_parameters())
        step = 1e-2 * torch.eye(2)[t]
        difference = (float(loss(alpha.detach() + step, batch, None)) - float(loss(alpha.detach() - step, batch, None))) / 2e-2
        assert float(got[0, t]) == pytest.approx(float(inner), rel=1e-4) == pytest.approx(difference, rel=2e-2)


def test_independent_starts_do_not_mix(folders: list[str], tmp_path: Path) -> None:
    """The negative control: the mean of two trained models of different starts is worse than both; greedy keeps one."""
    made = []
    for seed in (0, 7):
        net = llama(seed=seed).requires_grad_(True)
        held = batch_for(net, seed=5)
        steps = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(25):
            steps.zero_grad()
            net(**held).loss.backward()
            steps.step()
        net.save_pretrained(tmp_path / str(seed))
        made.append(str(tmp_path / str(seed)))
    alone = [cost(whole(Path(f))) for f in made]
    assert cost(mean(made)) > max(alone) + 0.5
    report = merge_checkpoints(made, tmp_path / "g", "greedy_soup", models=judged(made))
    assert sorted(report.weights) == [0.0, 1.0]


def test_wrong_input_is_told(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="judged by held-out data"):
        merge_checkpoints(folders, tmp_path / "no", "greedy_soup")
    with pytest.raises(OptionError, match="finds its weights itself"):
        merge_checkpoints(folders[:2], tmp_path / "no", "greedy_soup", [0.5, 0.5], models=judged(folders[:2]))
    with pytest.raises(OptionError, match="uses no weights"):
        merge_checkpoints(folders[:2], tmp_path / "no", "uniform_soup", [0.5, 0.5])
    with pytest.raises(OptionError, match="takes gradients on batches"):
        models = judged(folders[:2])
        models.evaluator.batches = []
        merge_checkpoints(folders[:2], tmp_path / "no", "learned_soup", models=models)
    llama(layers=1).save_pretrained(tmp_path / "short")
    both = [folders[0], str(tmp_path / "short")]
    with pytest.raises(MergeError, match=r"has no 'model\.layers\.1"):
        merge_checkpoints(both, tmp_path / "no", "greedy_soup", models=judged(both))
    with pytest.raises(MergeError, match="fine-tunes of one model"):
        judged(both).key(1)
    assert not (tmp_path / "no").exists()
