"""Order of events, accumulation, guards: what the Session promises in anybody's loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import AttachError, OptionError, TrainingError
from rankwise.forms import packed
from rankwise.train.memory import account
from tests.models import batch_for, llama


def start(recipe: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    model = llama()
    adapter = rw.attach(model, recipe or {"r": 2})
    model.train()
    return model, adapter, rw.Session(model, adapter, **{"lr": 1e-2, "total_steps": 8, **options})


def one(model: Any, session: Any, batch: Any, scale: float = 1.0) -> bool:
    session.step_begin()
    out = model(**batch)
    ((out.loss + session.penalty(out, batch)) * scale).backward()
    return session.step()


def test_accumulated_micro_batches_equal_one_batch() -> None:
    big = batch_for(llama(), rows=4)
    halves = [{k: v[i : i + 2] for k, v in big.items()} for i in (0, 2)]
    model, whole, session = start()
    for _ in range(3):
        assert one(model, session, big)
    model, parts, session = start(accumulate=2)
    for _ in range(3):
        assert [one(model, session, h, 0.5) for h in halves] == [False, True]
    for k, t in whole.tensors().items():
        assert torch.allclose(t, parts.tensors()[k], atol=1e-5), k


def test_events_come_in_the_documented_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    model, adapter, session = start(
        {
            "form": "svd",
            "r": 4,
            "budget": {"name": "adalora", "target_r": 2, "every": 1, "warmup": 1, "final": 2},
            "losses": ["orthogonality"],
        },
        accumulate=2,
        max_grad_norm=1.0,
    )
    before = adapter.sites["model.layers.0.mlp.up_proj"].A.detach().clone()
    for name in ("step_begin", "observe", "after_update"):
        inner = getattr(session.budget, name)

        def told(run: Any, name: str = name, inner: Any = inner) -> None:
            moved = not torch.equal(adapter.sites["model.layers.0.mlp.up_proj"].A, before)
            seen.append(f"{name}, {'moved' if moved else 'as before'}")
            inner(run)

        monkeypatch.setattr(session.budget, name, told)
    clip = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *a, **k: (seen.append("clip"), clip(*a, **k))[1])
    batch = batch_for(model)
    for _ in range(2):
        one(model, session, batch)
        seen.append("micro")
    assert seen == ["step_begin, as before", "micro", "clip", "observe, as before", "after_update, moved", "micro"]
    assert all(p.grad is None for p in adapter.trainable_parameters())


@pytest.mark.parametrize("place", ["loss", "gradient", "activation", "data", "adapter"])
def test_a_nan_anywhere_changes_nothing_and_names_the_place(place: str) -> None:
    model, adapter, session = start()
    batch = batch_for(model)
    one(model, session, batch)
    before = {k: t.clone() for k, t in adapter.tensors().items()}
    state = session.optimizer.state_dict()
    moments = [t.clone() for t in _tensors(state)]
    hook = None
    if place == "activation":
        hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, y: y * float("nan"))
    if place == "adapter":
        with torch.no_grad():
            adapter.sites["model.layers.0.mlp.up_proj"].B[0, 0] = before["model.layers.0.mlp.up_proj::B"][0, 0] = float("inf")
    given = dict(batch)
    if place == "data":
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
        given["inputs_embeds"][0, 2, 5] = float("nan")
    session.step_begin()
    out = model(**given)
    loss = out.loss * float("nan") if place == "loss" else out.loss
    (loss + session.penalty(out, batch)).backward()
    if place == "gradient":
        adapter.trainable_parameters()[3].grad[0] = float("inf")
    says = {
        "activation": "overflowed first at 'model.layers.1.mlp.up_proj'",
        "adapter": "overflowed first at 'model.layers.0.mlp",
    }.get(place, "was not taken")
    with pytest.raises(TrainingError, match=says):
        session.step()
    if hook is not None:
        hook.remove()
    assert all(torch.equal(t, before[k]) for k, t in adapter.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(moments, _tensors(session.optimizer.state_dict()), strict=True))
    assert session.t == 1


def test_gradients_whose_norm_has_no_number_are_not_taken_for_zero_steps() -> None:
    """Each value is finite, but a clip to a norm of infinity would make every update 0 and say nothing."""
    model, adapter, session = start()
    batch = batch_for(model)
    one(model, session, batch)
    before = {k: t.clone() for k, t in adapter.tensors().items()}
    session.step_begin()
    model(**batch).loss.backward()
    for p in adapter.trainable_parameters():
        assert p.grad is not None
        p.grad.fill_(3e38)
    with pytest.raises(TrainingError, match="Step 2: the norm of all gradients together is not finite; the step was not taken"):
        session.step()
    assert all(torch.equal(t, before[k]) for k, t in adapter.tensors().items()) and session.t == 1


def test_what_a_loss_adds_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter, session = start({"form": "svd", "r": 4, "losses": ["orthogonality"]})
    batch = batch_for(model)
    one(model, session, batch)
    before = {k: t.clone() for k, t in adapter.tensors().items()}
    huge = {k: torch.full_like(p, 3e38) for k, p in adapter.named_parameters().items()}
    monkeypatch.setattr(type(session.losses[0]), "grad_extra", lambda self, adapter, step: huge)
    with pytest.raises(TrainingError, match="Step 2: the norm of all gradients together is not finite; the step was not taken"):
        one(model, session, batch)
    assert all(torch.equal(t, before[k]) for k, t in adapter.tensors().items()) and session.t == 1


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [t for v in values for t in _tensors(v)]


def test_a_starved_layer_stops_the_run() -> None:
    model, _, session = start()
    layer = model.model.layers[0]
    inner = layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x).detach()
    with pytest.raises(TrainingError, match=r"3 of 14 layers have no gradient.*layers\.0\.mlp"):
        one(model, session, batch_for(model))


def test_a_site_that_was_not_called_is_named() -> None:
    model, _, session = start()
    layer = model.model.layers[1]
    layer.mlp.forward = lambda x: x
    with pytest.raises(AttachError, match=r"3 of its layers took no part.*layers\.1\.mlp"):
        one(model, session, batch_for(model))


@pytest.mark.parametrize("options", [{"total_steps": 0}, {"accumulate": 0}, {"schedule": "stairs"}, {"warmup": 99}, {"lr": -1.0}])
def test_wrong_options(options: dict) -> None:
    with pytest.raises(OptionError):
        start(**options)


@pytest.mark.parametrize(
    ("schedule", "want"),
    [("linear", [0.5, 1.0, 0.75, 0.5, 0.25]), ("constant", [0.5, 1.0, 1, 1, 1]), ("cosine", [0.5, 1.0, 0.853553, 0.5, 0.146447])],
)
def test_schedules(schedule: str, want: list[float]) -> None:
    model, _, session = start(total_steps=5, schedule=schedule, warmup=1, lr=1.0)
    rates = []
    batch = batch_for(model)
    for _ in range(5):
        one(model, session, batch)
        rates.append(session.logs["lr"])
    assert rates == pytest.approx(want, abs=1e-4)


def test_memory_is_counted_by_category() -> None:
    model, adapter, session = start()
    batch = batch_for(model)
    one(model, session, batch)
    got = account(session, batch)
    assert got["adapter"] == got["gradients"] == 4 * adapter.numel() and got["optimiser"] == 8 * adapter.numel()
    assert got["base"] == sum(p.numel() * 4 for n, p in model.named_parameters() if not n.startswith("rankwise"))
    model2, _, session2 = start({"form": "paca", "r": 2})
    one(model2, session2, batch)
    assert account(session2, batch)["saved activations"] < got["saved activations"], "PaCA keeps only its columns"


def test_two_adapters_train_in_one_batch() -> None:
    model = llama()
    a, b = (rw.attach(model, {"r": 2}, name=n) for n in "ab")
    sessions = [rw.Session(model, x, lr=1e-2, total_steps=6, check=False) for x in (a, b)]
    batch = batch_for(model, rows=4)
    model.train()
    losses = []
    for _ in range(6):
        for s in sessions:
            s.step_begin()
        with rw.view(model, {"a": 1, "b": 1}, rows=["a", "a", "b", "b"]):
            out = model(**batch)
        out.loss.backward()
        losses.append(out.loss.item())
        for s in sessions:
            s.step()
    assert losses[-1] < losses[0]
    alone = llama()
    c = rw.attach(alone, {"r": 2}, name="a")
    session = rw.Session(alone, c, lr=1e-2, total_steps=6, check=False)
    alone.train()
    for _ in range(6):
        session.step_begin()
        out = alone(**{k: v[:2] for k, v in batch.items()})
        (out.loss / 2).backward()
        session.step()
    for k, t in c.tensors().items():
        assert torch.allclose(t, a.tensors()[k], atol=1e-4), "training together equals training alone"


@pytest.mark.parametrize("norm", [-1.0, 0.0, float("nan")])
def test_a_norm_to_clip_to_is_positive(norm: float) -> None:
    with pytest.raises(OptionError, match="max_grad_norm"):
        start(max_grad_norm=norm)


def test_the_first_backward_names_missing_and_zero_gradients() -> None:
    from rankwise.train.guard import check_first_backward

    _, adapter, _ = start()
    params = adapter.named_parameters()
    sites = list(dict.fromkeys(k.split("::")[0] for k in params))
    for k, p in params.items():
        at = sites.index(k.split("::")[0])
        p.grad = None if at < 6 else torch.zeros_like(p) if at < 8 else torch.ones_like(p)
    with pytest.raises(
        TrainingError, match="6 of 14 layers have no gradient: .* and 2 more; 2 of 14 layers have a zero gradient"
    ) as error:
        check_first_backward(adapter, params)
    assert sites[0] in str(error.value) and sites[6] in str(error.value)


def test_a_resumed_run_multiplies_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed and plain products differ in the last bit, and a probe beside other work may decide otherwise than before."""
    if not packed.packable(torch.zeros(1, 1)):
        pytest.skip("this torch has no packed oneDNN products")
    x = torch.randn(64, 512)

    def begin(ratio: float) -> tuple[Any, Any, Any]:
        monkeypatch.setattr(packed, "_choices", {})
        monkeypatch.setattr(packed, "_ratio", lambda *_: ratio)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 300), nn.Tanh(), nn.Linear(300, 512))
        adapter = rw.attach(model, {"targets": ["0", "2"], "r": 4})
        return model, adapter, rw.Session(model, adapter, lr=1e-2, total_steps=6)

    def steps(model: Any, session: Any, n: int) -> None:
        for _ in range(n):
            session.step_begin()
            (model(x).square().mean() + session.penalty(None, {})).backward()
            session.step()

    model, adapter, session = begin(0.5)
    steps(model, session, 3)
    tensors, state = {k: t.detach().clone() for k, t in adapter.tensors().items()}, copy.deepcopy(session.state_dict())
    steps(model, session, 3)
    want = {k: t.detach().clone() for k, t in adapter.tensors().items()}
    model, adapter, session = begin(2.0)
    model(x.requires_grad_())  # chosen anew, as plain, before the state comes
    for k, t in adapter.tensors().items():
        t.data.copy_(tensors[k])
    session.load_state_dict(state)
    steps(model, session, 3)
    kinds = {c.kind for m in (model[0], model[2]) for c in m._rankwise.fast.product.choices.values()}
    assert "packed" in kinds, "the probe decided anew"
    assert all(torch.equal(t, want[k]) for k, t in adapter.tensors().items())
