from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.errors import AttachError, ViewError
from tests.models import batch_for, llama, logits, move


def test_delta_is_the_difference_and_the_base_stays_reachable() -> None:
    model = llama()
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_for(model)
    base = logits(model, batch)
    adapter = rw.attach(model, {"form": "full", "targets": "all"})
    assert adapter.numel() == sum(p.numel() for p in llama().parameters())
    move(adapter)
    assert (logits(model, batch) - base).abs().max() > 1e-3
    with rw.view(model, {}):
        assert torch.equal(logits(model, batch), base)
    name = "model.layers.0.mlp.up_proj"
    assert torch.allclose(adapter.delta(name).dense(), model.model.layers[0].mlp.up_proj.weight - bits[f"{name}.weight"])
    adapter.detach()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())


def test_without_a_copy_views_and_detach_are_refused() -> None:
    model = llama()
    adapter = rw.attach(model, {"form": {"name": "full", "keep": "none"}, "targets": ["q"]})
    with pytest.raises(ViewError, match="kept no copy"), rw.view(model, {}):
        pass
    with pytest.raises(AttachError, match="without a copy"):
        adapter.detach()


def test_one_a_weight_and_no_strengths() -> None:
    model = llama()
    rw.attach(model, {"form": "full", "targets": ["q"]}, name="a")
    with pytest.raises(AttachError, match="already trained"):
        rw.attach(model, {"form": "full", "targets": ["q"]}, name="b")
    with pytest.raises(ViewError, match="strength is 1"), rw.view(model, {"a": 0.5}):
        pass


def test_an_adapter_that_stops_half_way_leaves_nothing() -> None:
    """The second adapter's first weight is free, its second is taken: neither is touched."""
    model = llama().requires_grad_(False)
    rw.attach(model, {"form": "full", "targets": ["down_proj"]}, name="first")
    with pytest.raises(AttachError, match="already trained or replaced by adapter 'first'"):
        rw.attach(model, {"form": "full", "targets": ["up_proj", "down_proj"]}, name="second")
    assert list(rw.adapters(model)) == ["first"]
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad, "the first one's is still trained"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear"
    rw.adapters(model)["first"].detach()
    assert not hasattr(model, "rankwise")
