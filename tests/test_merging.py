"""Folding adapters into W: whole or not at all, against the untouched W, verified, and never with a lie in a view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import AttachError, MergeError, ViewError
from rankwise.sites import Site
from tests.models import FAMILIES, batch_for, llama, logits, move


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model: Any, kept: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, kept[k]) for k, v in model.state_dict().items() if k in kept)


@pytest.mark.parametrize("error", [RuntimeError("disk"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 9])
def test_a_merge_that_stops_half_way_changes_nothing(error: BaseException, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    kept, batch = bits(model), batch_for(model)
    adapter = rw.attach(model, {"r": 2})
    move(adapter)
    want, write, count = logits(model, batch), Site.write, [0]

    def failing(site: Site, W: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        if count[0] == call:
            raise error
        return write(site, W)

    monkeypatch.setattr(Site, "write", failing)
    with pytest.raises(type(error)):
        adapter.merge()
    monkeypatch.undo()
    assert same(model, kept) and torch.equal(logits(model, batch), want), "the adapter acts beside W as before"
    adapter.merge()
    adapter.detach()
    assert same(model, kept) and not hasattr(model, "rankwise")


def test_an_interrupt_while_the_outputs_are_checked_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    kept = bits(model)
    adapter = rw.attach(model, {"r": 2})
    move(adapter)
    forward, count = type(model).forward, [0]

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3:  # the base, before, after
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    probe = {"input_ids": batch_for(model)["input_ids"]}
    monkeypatch.setattr(type(model), "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        adapter.merge(probe=probe)
    monkeypatch.undo()
    adapter.detach()
    assert same(model, kept)


def test_tied_weights_adapted_apart_are_not_merged() -> None:
    for targets in (["embed_tokens", "lm_head"], ["lm_head"]):
        model = llama(tie=True)
        kept = bits(model)
        adapter = rw.attach(model, {"r": 2, "targets": targets, "separate_tied": True})
        move(adapter)
        with pytest.raises(MergeError, match="shares its weight with another module"):
            adapter.merge()
        assert same(model, kept)


def test_a_merged_adapter_acts_whole_in_every_view() -> None:
    model = llama()
    adapter = rw.attach(model, {"r": 2}, name="a")
    move(adapter)
    adapter.merge()
    for strengths in ({"a": 0.5}, {"a": 0.0}, {}):
        with pytest.raises(ViewError, match="merged into the weights"), rw.view(model, strengths):
            pass
    with pytest.raises(ViewError, match="acts on every row"), rw.view(model, {"a": 1.0}, rows=["a", None, None]):
        pass
    with rw.view(model, {"a": 1.0}, rows=["a", "a", "a"]):
        logits(model, batch_for(model))


def test_a_form_that_reads_the_weight_always_reads_the_untouched_one() -> None:
    model = llama()
    kept, batch = bits(model), batch_for(model)
    a = rw.attach(model, {"r": 2}, name="a")
    b = rw.attach(model, {"form": "dora", "r": 2}, name="b")
    move(a, seed=1)
    move(b, seed=2)
    rw.activate(model, ["a", "b"])
    want = logits(model, batch)
    with pytest.raises(MergeError, match="merge 'b' first"):
        a.merge()
    b.merge()
    low = b.lower(rank=4)
    a.merge()
    assert torch.allclose(logits(model, batch), want, atol=1e-4), "merged one after the other is both acting"
    again = b.lower(rank=4)
    assert all(torch.allclose(low.sites[n].dense(), again.sites[n].dense(), atol=1e-5) for n in low.sites)
    with pytest.raises(AttachError, match="works on the base weight itself"):
        rw.attach(model, {"form": "dora", "r": 2}, name="c")
    with pytest.raises(AttachError, match="works on the base weight itself"):
        rw.attach(model, {"form": "full", "targets": ["q_proj"]}, name="f")
    b.unmerge()
    a.unmerge()
    assert torch.allclose(logits(model, batch), want, atol=1e-5)
    b.detach()
    a.detach()
    assert same(model, kept)


def test_a_weight_that_another_moves_is_not_merged_into() -> None:
    model = llama()
    kept = bits(model)
    rw.attach(model, {"form": "full", "targets": ["q_proj"]}, name="f")
    a = rw.attach(model, {"r": 2, "targets": ["q_proj"]}, name="a")
    move(a)
    with pytest.raises(MergeError, match="moved by adapter 'f'"):
        a.merge()
    a.detach()
    rw.adapters(model)["f"].detach()
    assert same(model, kept)


@pytest.mark.parametrize("family", ["llama", "t5", "vit", "clip", "whisper", "bert", "mamba", "gpt2"])
def test_every_family_is_probed_and_a_nan_is_never_merged(family: str) -> None:
    make, targets = FAMILIES[family]
    model = make()
    kept = bits(model)
    adapter = rw.attach(model, {"r": 2, "targets": targets})
    move(adapter)
    report = adapter.merge()
    assert report.logit_gap is not None and report.logit_gap < 1e-3
    adapter.unmerge()
    assert same(model, kept)
    with torch.no_grad():
        adapter.trainable_parameters()[-1].view(-1)[0] = float("nan")
    with pytest.raises(MergeError, match="NaN or infinity"):
        adapter.merge()
    assert same(model, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_weight_written_wrongly_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of fourteen weights is left as it was, and the write says it was done."""
    model = llama().to(dtype)
    kept = bits(model)
    adapter = rw.attach(model, {"r": 2})
    move(adapter, std=0.3)
    write = Site.write
    name = list(adapter.sites)[5]
    monkeypatch.setattr(Site, "write", lambda s, W: W if s.name == name else write(s, W))
    with pytest.raises(MergeError, match="does not hold what was written"):
        adapter.merge()
    assert same(model, kept)
    monkeypatch.setattr(Site, "write", lambda s, W: write(s, W - 0.5 * W.std() if s.name == name else W))
    monkeypatch.setattr("rankwise.runtime.fold._merge_site", _blind)
    with pytest.raises(MergeError, match="logits moved"):
        adapter.merge()
    assert same(model, kept)


def _blind(registry: Any, site: Any, delta: Any) -> Any:
    """A merge of one site that reports no error, whatever was stored."""
    from rankwise.runtime.fold import SiteMerge, _key, _mark

    registry.weight_backups.setdefault(_key(site), site.snapshot())
    W = site.read()
    stored = site.write(W + delta.total_delta().dense(W).to(W.dtype))
    return SiteMerge(site.name, 0.1, 0.0), _mark(stored)


class Repeated(nn.Module):
    """Three layers of two weights: the first and the last share theirs, and the middle one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for m in (self.layers[0], self.layers[1], self.layers[1], self.layers[2]):
            x = torch.tanh(m(x))
        return x


def test_repeated_layers_are_merged_once_or_refused() -> None:
    """Layers that share a weight share a change, so the merged weight is right at each; changed apart, they cannot share it."""
    model, x = Repeated(), torch.randn(5, 8)
    adapter = rw.attach(model, {"r": 2, "targets": "all-linear"})
    assert len(adapter.sites) == 2, "one change for the shared weight, one for the layer that is called twice"
    move(adapter, std=0.5)
    base, moved = model.layers[0].weight.detach().clone(), model(x)
    adapter.merge(probe={"x": x})
    assert torch.allclose(model(x), moved, atol=1e-5) and not torch.equal(model.layers[0].weight, base)
    assert model.layers[2].weight is model.layers[0].weight
    adapter.detach()
    assert torch.equal(model.layers[0].weight, base)
    apart = rw.attach(model, {"r": 2, "targets": "all-linear", "separate_tied": True})
    assert len(apart.sites) == 3
    move(apart, std=0.5)
    with pytest.raises(MergeError, match="tied|share"):
        apart.merge(probe={"x": x})
    assert torch.equal(model.layers[0].weight, base)
