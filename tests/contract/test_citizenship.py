"""Law 9: adapters are good citizens of torch: functional_call, compile, autocast, DDP and FSDP2."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import rankwise as rw
from tests.contract.cases import example, ids, methods
from tests.contract.test_laws import attached
from tests.models import batch_for, llama, logits, move

FORMS = methods("form")


@pytest.mark.parametrize("info", FORMS, ids=ids(FORMS))
def test_functional_call_takes_other_tensors(info: Any) -> None:
    model, adapter = attached(example(info))
    move(adapter)
    batch = batch_for(model)
    want = logits(model, batch)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    params = dict(model.named_parameters())
    moved = {n: params[n].detach() * 1.5 for n in names}
    with torch.no_grad():
        other = torch.func.functional_call(model, moved, kwargs=batch).logits
    assert torch.equal(logits(model, batch), want)
    assert (other - want).abs().max() > 1e-4


@pytest.mark.parametrize("info", FORMS, ids=ids(FORMS))
def test_autocast_runs_and_stays_close(info: Any) -> None:
    model, adapter = attached(example(info))
    move(adapter)
    batch = batch_for(model)
    want = logits(model, batch)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    assert (out.logits.float() - want).abs().max() < 0.1
    assert all(p.grad.dtype == torch.float32 for p in adapter.trainable_parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.parametrize("info", [m for m in FORMS if m.name in ("lora", "dora", "paca", "svd", "lora_xs")], ids=lambda m: m.name)
def test_compiles_without_a_break(info: Any) -> None:
    model, adapter = attached(example(info))
    move(adapter)
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch, use_cache=False).logits
    assert torch.allclose(compiled, logits(model, batch), atol=1e-5)


def _worker(rank: int, how: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = llama()
    adapter = rw.attach(model, {"form": "lora", "r": 2})
    if how == "ddp":
        net: Any = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        net = fully_shard(model)
    session = rw.Session(model, adapter, lr=1e-2, total_steps=4, ddp=True, check=False)
    batch = {k: v[rank * 2 : rank * 2 + 2] for k, v in batch_for(model, rows=4).items()}
    net.train()
    for _ in range(4):
        session.step_begin()
        out = net(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
    got = {k: t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach() for k, t in adapter.tensors().items()}
    if rank == 0:
        torch.save(got, f"{folder}/got.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_equal_one(how: str, tmp_path: Any) -> None:
    mp.spawn(_worker, (how, str(tmp_path)), nprocs=2)
    model = llama()
    adapter = rw.attach(model, {"form": "lora", "r": 2})
    session = rw.Session(model, adapter, lr=1e-2, total_steps=4)
    batch = batch_for(model, rows=4)
    model.train()
    for _ in range(4):
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
    got = torch.load(tmp_path / "got.pt", weights_only=True)
    for k, t in adapter.tensors().items():
        assert torch.allclose(got[k], t, atol=1e-5), k


def test_attaching_to_a_wrapped_model_is_refused() -> None:
    model = llama()
    wrapped = type("FSDPModule", (torch.nn.Module,), {})()
    wrapped.inner = model
    with pytest.raises(rw.RankwiseError, match="attach first, then wrap"):
        rw.attach(wrapped, {"r": 2})
