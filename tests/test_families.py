"""Every family of models: attach, train two steps, save, load, PEFT both ways, merge, detach."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise as rw
from tests.models import FAMILIES, batch_for, logits, move


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_whole_life(family: str, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    make, targets = FAMILIES[family]
    model = make()
    for p in model.parameters():  # a frozen base: some architectures pick another kernel for trainable weights
        p.requires_grad_(False)
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_for(model)
    base = logits(model, batch)
    adapter = rw.attach(model, {"form": "lora", "r": 2, "targets": targets})
    assert torch.allclose(logits(model, batch), base, atol=1e-6)
    session = rw.Session(model, adapter, lr=1e-2, total_steps=2)
    model.train()
    for _ in range(2):
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
    move(adapter)
    want = logits(model, batch)
    assert (want - base).abs().max() > 1e-3
    adapter.save(tmp_path / "native")
    assert torch.equal(logits(rw.load(make().requires_grad_(False), tmp_path / "native").model, batch), want)
    with rw.view(model, {}):
        assert torch.equal(logits(model, batch), base)
    if family == "mamba":  # PEFT refuses out_proj, and its LoRA on x_proj does not act where Mamba's kernels run
        adapter.detach()
        adapter = rw.attach(model, {"form": "lora", "r": 2, "targets": ["in_proj"]})
        move(adapter)
        want = logits(model, batch)
    adapter.export(tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "peft").eval()
    assert torch.allclose(logits(theirs, batch), want, atol=1e-5)
    theirs.save_pretrained(tmp_path / "saved by peft")
    ours = rw.load(make(), tmp_path / "saved by peft")
    assert torch.allclose(logits(ours.model, batch), want, atol=1e-5)
    adapter.merge()
    assert torch.allclose(logits(model, batch), want, atol=1e-4)
    adapter.detach()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items()) and list(model.state_dict()) == list(bits)


def quantise(kind: str) -> Any:
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    for i in (0, 2):
        plain = model[i]
        q = bnb.nn.Linear4bit(plain.in_features, plain.out_features, quant_type="nf4", compute_dtype=torch.float32)
        q.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
        q.bias = plain.bias
        model[i] = q.to("cpu")
    model(torch.randn(1, 64))
    return model


@pytest.mark.parametrize("kind", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("recipe", [{"form": "lora"}, {"form": "lora", "init": "pissa"}, {"form": "dora"}, {"form": "paca"}])
def test_quantised_bases_train_merge_and_come_back(kind: str, recipe: dict, tmp_path: Any) -> None:
    model = quantise(kind)
    x = torch.randn(8, 64)
    with torch.no_grad():
        base = model(x)
    before = [s.read().clone() for s in rw.attach(model, {"r": 2}, name="probe")._record.site_of().values()]
    rw.adapters(model)["probe"].detach()
    adapter = rw.attach(model, {"r": 4, "targets": ["0", "2"], **recipe})
    with torch.no_grad():
        assert torch.allclose(model(x), base, atol=1e-4), "the first output is the quantised base's"
    session = rw.Session(model, adapter, lr=1e-2, total_steps=10)
    losses = []
    for _ in range(10):
        session.step_begin()
        out = model(x)
        loss = out.square().mean()
        losses.append(loss.item())
        (loss + session.penalty(out, {"x": x})).backward()
        session.step()
    assert losses[-1] < losses[0]
    move(adapter, std=0.2)
    with torch.no_grad():
        want = model(x)
    report = adapter.merge(force=True)
    assert max(s.error for s in report.sites) > 1e-4, "requantising loses something, and the report says how much"
    with torch.no_grad():
        assert (model(x) - want).norm() < 0.5 * (base - want).norm()
    adapter.detach()
    with torch.no_grad():
        assert torch.equal(model(x), base)
    after = [s.read() for s in rw.attach(model, {"r": 2})._record.site_of().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
