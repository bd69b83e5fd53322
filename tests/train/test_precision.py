"""Mixed precision through transformers.Trainer: bf16 by its own argument; fp16's loss scaling by torch's scaler on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from tests.models import llama
from tests.train.tools import trainer

ADALORA = {
    "form": "svd",
    "r": 4,
    "budget": {"name": "adalora", "target_r": 2, "every": 1, "warmup": 1, "final": 1},
    "losses": ["orthogonality"],
}


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(t, b.tensors()[k]) for k, t in a.tensors().items())


def resumed(make: Any, folder: Path) -> Any:
    """A run of four steps that stops after the second and goes on in another object."""
    first = make(folder)
    first.train()
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-3")
    torch.manual_seed(99)
    again = make(folder)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    return again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [{"r": 2, "dropout": 0.1}, ADALORA], ids=["lora", "adalora"])
def test_bf16_keeps_fp32_masters_and_resumes_exactly(recipe: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()

    def make(folder: Path) -> Any:
        run = trainer(folder, recipe, llama().to(dtype), bf16=True, gradient_accumulation_steps=2)
        run.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, y: seen.add(y.dtype))
        return run

    whole = make(tmp_path / "a")
    base = {n: p.clone() for n, p in whole.model.named_parameters() if not p.requires_grad}
    before = {k: t.clone() for k, t in whole.adapter.tensors().items()}
    whole.train()
    assert seen == {torch.bfloat16}, "the products ran in bf16"
    for k, t in whole.adapter.named_parameters().items():
        assert t.dtype == torch.float32 and not torch.equal(t, before[k]), k
    moments = [t for t in _tensors(whole.session.optimizer.state_dict()["state"]["tree"]) if t.is_floating_point()]
    assert moments and all(t.dtype == torch.float32 for t in moments)
    assert all(torch.equal(p, base[n]) for n, p in whole.model.named_parameters() if n in base)
    again = resumed(make, tmp_path / "b")
    assert same(again.adapter, whole.adapter)
    if whole.session.budget is not None:
        scores = [_tensors(r.session.budget.state_dict()) for r in (again, whole)]
        assert scores[0] and all(torch.equal(a, b) for a, b in zip(*scores, strict=True))
    plain = trainer(tmp_path / "c", recipe, llama(), gradient_accumulation_steps=2, save_strategy="no")
    plain.train()
    losses = [[e["loss"] for e in r.state.log_history if "loss" in e] for r in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05) and losses[0] != losses[1]


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [t for v in values for t in _tensors(v)]


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs in fp16 autocast with a real scaler: accelerate makes one for CUDA alone, so it gets torch's for the CPU."""
    from accelerate.state import AcceleratorState

    def make(folder: Path, recipe: Any = None, overflow: tuple[int, ...] = (), **options: Any) -> Any:
        run = trainer(folder, recipe, **{"max_steps": 4, "save_strategy": "no", "lr_scheduler_type": "linear", **options})
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        run.accelerator.native_amp = True
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        count = {"n": 0}

        def spoil(grad: torch.Tensor) -> torch.Tensor:
            count["n"] += 1
            return grad * float("inf") if count["n"] in overflow else grad

        run.adapter.trainable_parameters()[0].register_hook(spoil)
        return run

    return make


def test_fp16_autocasts_scales_and_unscales(fp16: Any, tmp_path: Path) -> None:
    plain = trainer(tmp_path / "b", {"r": 2}, save_strategy="no", max_grad_norm=0.5)
    plain.train()  # the whole of it first: arguments made later reset accelerate's state
    run = fp16(tmp_path / "a", {"r": 2}, max_grad_norm=0.5)
    dtypes: set[torch.dtype] = set()
    run.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, y: dtypes.add(y.dtype))
    run.train()
    norms = [[e["grad_norm"] for e in r.state.log_history if "grad_norm" in e] for r in (run, plain)]
    assert dtypes == {torch.float16} and run.accelerator.scaler.get_scale() == 1024, "grown twice in four steps"
    assert norms[0] == pytest.approx(norms[1], rel=0.05), "norms are of unscaled gradients"
    assert run.session.t == plain.session.t == 4
    for k, t in plain.adapter.tensors().items():
        assert torch.allclose(run.adapter.tensors()[k], t, atol=0.02), k


def test_a_step_that_scaling_skips_skips_all_of_it(fp16: Any, tmp_path: Path) -> None:
    """Inf in the gradient of step 2 of 4: nothing moves, no event of the optimiser's step comes, t counts steps taken."""
    from transformers import TrainerCallback

    events: list[str] = []
    after: list[dict[str, torch.Tensor]] = []
    run = fp16(tmp_path, ADALORA, overflow=(2,))

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            for name in ("observe", "after_update"):
                inner = getattr(run.session.budget, name)
                setattr(run.session.budget, name, lambda r, name=name, inner=inner: (events.append(f"{name} {r.step}"), inner(r)))

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            tree = run.session.optimizer.state_dict()["state"]["tree"]
            after.append(
                {k: t.clone() for k, t in run.adapter.tensors().items()} | dict(enumerate(t.clone() for t in _tensors(tree)))
            )
            events.append(f"end, t = {run.session.t}")

    run.add_callback(Watch())
    run.train()
    assert events == [
        "observe 1", "after_update 1", "end, t = 1",
        "end, t = 1",
        "observe 2", "after_update 2", "end, t = 2",
        "observe 3", "after_update 3", "end, t = 3",
    ]  # fmt: skip
    assert len(after[0]) == len(after[1]) and all(torch.equal(t, after[1][k]) for k, t in after[0].items())
    assert any(not torch.equal(t, after[2][k]) for k, t in after[1].items())
    assert run.state.global_step == 4 and all(torch.isfinite(t).all() for t in run.adapter.tensors().values())


def test_fp16_resumes_exactly_with_its_scale(fp16: Any, tmp_path: Path) -> None:
    def make(folder: Path) -> Any:
        return fp16(folder, {"r": 2, "dropout": 0.1}, save_strategy="steps", save_steps=1)

    whole = make(tmp_path / "a")
    whole.train()
    again = resumed(make, tmp_path / "b")
    assert again.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale() == 1024
    assert same(again.adapter, whole.adapter)


def test_fp16_says_what_a_forward_overflow_is(fp16: Any, tmp_path: Path) -> None:
    run = fp16(tmp_path, {"r": 2})
    run.model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, y: y * 1e4 * 1e4)  # fp16 ends at 65,504
    with pytest.raises(rw.RankwiseError, match=r"overflowed first at 'model\.layers\.1\.mlp\.down_proj'"):
        run.train()
