"""The view: what acts in a call, for each row, at each strength, through checkpoints and threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import AttachError, UnknownName, ViewError
from tests.models import FAMILIES, batch_for, llama, logits, move


def two(form: str = "lora") -> tuple[Any, dict[str, torch.Tensor]]:
    model = llama()
    for n, seed in (("a", 1), ("b", 2)):
        move(rw.attach(model, {"form": form, "r": 2}, name=n), seed=seed)
    return model, batch_for(model, rows=4)


def under(model: Any, batch: Any, *view: Any, **options: Any) -> torch.Tensor:
    with rw.view(model, *view, **options):
        return logits(model, batch)


@pytest.mark.parametrize("form", ["lora", "dora", "paca", "svd"])
def test_rows_of_one_batch_under_different_adapters(form: str) -> None:
    model, batch = two(form)
    mixed = under(model, batch, {"a": 1, "b": 1}, rows=["a", "b", None, "a"])
    for row, view in enumerate(({"a": 1}, {"b": 1}, {}, {"a": 1})):
        assert torch.allclose(mixed[row], under(model, batch, view)[row], atol=1e-6)
    masks = under(model, batch, {"a": 0.5, "b": 2.0}, rows={"a": [1, 1, 0, 0], "b": [0, 1, 0, 0]})
    assert torch.allclose(masks[1], under(model, batch, {"a": 0.5, "b": 2.0})[1], atol=1e-6)


def test_gradients_of_a_mixed_batch_equal_separate_runs() -> None:
    model, batch = two()
    model.train()

    def grads(view: dict[str, float], rows: Any, part: slice) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with rw.view(model, view, rows=rows):
            out = model(input_ids=batch["input_ids"][part]).logits
        out.square().sum().backward()
        return {
            f"{n}{k}": p.grad.clone()
            for n, a in rw.adapters(model).items()
            for k, p in a.named_parameters().items()
            if p.grad is not None
        }

    mixed = grads({"a": 1, "b": 1}, ["a", "a", "b", "b"], slice(0, 4))
    alone = {**grads({"a": 1}, None, slice(0, 2)), **grads({"b": 1}, None, slice(2, 4))}
    assert mixed.keys() == alone.keys()
    for k in alone:
        assert torch.allclose(mixed[k], alone[k], atol=1e-4, rtol=1e-4), k


def test_an_adapter_in_the_view_runs_even_without_a_row() -> None:
    model, batch = two()
    model.train()
    with rw.view(model, {"a": 1, "b": 1}, rows=["a"] * 4):
        model(**batch).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in rw.adapters(model)["b"].trainable_parameters())


def test_token_masks() -> None:
    model, batch = two()
    whole = under(model, batch, {"a": 1}, tokens={"a": torch.ones(4, 10)})
    assert torch.allclose(whole, under(model, batch, {"a": 1}), atol=1e-6)
    mask = torch.zeros(4, 10)
    mask[:, 6:] = 1  # causal: what comes before the first masked-in token is the base's
    late = under(model, batch, {"a": 1}, tokens={"a": mask})
    assert torch.allclose(late[:, :6], under(model, batch, {})[:, :6], atol=1e-6)
    assert (late[:, 6:] - under(model, batch, {})[:, 6:]).abs().max() > 1e-3


def test_beams_follow_their_row() -> None:
    model, batch = two()
    options = dict(max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    with rw.view(model, {"a": 1, "b": 1}, rows=["a", "b"]):
        mixed = model.generate(batch["input_ids"][:2], **options)
    with rw.view(model, "b"):
        alone = model.generate(batch["input_ids"][1:2], **options)
    assert torch.equal(mixed[1], alone[0])


def test_refusals() -> None:
    model, batch = two()
    with pytest.raises(UnknownName, match="did you mean 'a'"), rw.view(model, {"aa": 1}):
        pass
    with pytest.raises(ViewError, match="3 rows"):
        under(model, batch, {"a": 1}, rows=["a", None, "a"])
    with pytest.raises(UnknownName):
        under(model, batch, {"a": 1}, rows=["a", "b", "a", "a"])
    with pytest.raises(ViewError, match="one length"):
        under(model, batch, {"a": 1, "b": 1}, rows={"a": [1, 0], "b": [1]})
    moe = FAMILIES["mixtral"][0]()
    rw.attach(moe, {"r": 2})
    with pytest.raises(ViewError, match="another forward reads"), rw.view(moe, {"default": 1}, rows=["default"] * 3):
        pass
    with pytest.raises(AttachError, match="No adapter"), rw.view(llama(), {}):
        pass


def test_view_is_this_threads_own() -> None:
    model, batch = two()
    base, seen = under(model, batch, {}), {}
    rw.activate(model, "a")
    with rw.view(model, {}):
        kept = rw.keep_view(lambda: seen.setdefault("kept", logits(model, batch)))
        for name, fn in (("plain", lambda: seen.setdefault("plain", logits(model, batch))), ("kept", kept)):
            worker = threading.Thread(target=fn, name=name)
            worker.start()
            worker.join()
    assert torch.equal(seen["kept"], base)
    assert torch.equal(seen["plain"], logits(model, batch)), "another thread has the default view"


def test_handles_switch_only_themselves() -> None:
    model, batch = two()
    a = rw.adapters(model)["a"]
    rw.activate(model, ["a", "b"])
    with a.disable():
        assert torch.equal(logits(model, batch), under(model, batch, {"b": 1}))
    with a.reference():
        assert torch.equal(model(**batch).logits, under(model, batch, {}))
    rw.activate(model, None)
    with a.enable(0.5):
        assert torch.equal(logits(model, batch), under(model, batch, {"a": 0.5}))


def test_new_strengths_do_not_recompile() -> None:
    model, batch = two()
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    outs = []
    with torch.no_grad():
        for c in (1.0, 0.5, 0.25, 2.0):
            with rw.view(model, {"a": c}):
                outs.append(
                    (
                        compiled(input_ids=batch["input_ids"], use_cache=False).logits,
                        model(input_ids=batch["input_ids"], use_cache=False).logits,
                    )
                )
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in outs)
    assert not torch.allclose(outs[0][0], outs[1][0], atol=1e-4)
    assert counter.frame_count == 1, f"{counter.frame_count} compilations for four strengths"


def test_the_batch_is_the_main_inputs_whatever_comes_first() -> None:
    model = llama()
    adapter = rw.attach(model, {"r": 2}, name="a")
    move(adapter)
    ids = batch_for(model, rows=4, tokens=9)["input_ids"]
    with torch.no_grad(), rw.view(model, {"a": 1.0}, rows=["a", None, "a", None]):
        want = model(input_ids=ids).logits
        got = model(position_ids=torch.arange(9)[None], input_ids=ids).logits
        embedded = model(position_ids=torch.arange(9)[None], inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.allclose(got, want, atol=1e-6) and torch.allclose(embedded, want, atol=1e-6)
