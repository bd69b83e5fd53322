"""Law 9: adapters are good citizens of torch: functional_call, compile, autocast, DDP and FSDP2."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
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
    model = llama(layers=1)  # a second layer would be traced like the first
    adapter = rw.attach(model, example(info))
    move(adapter)
    batch = {k: v for k, v in batch_for(model).items() if k != "labels"}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch, use_cache=False).logits
    assert torch.allclose(compiled, logits(model, batch), atol=1e-5)


#: what trains under data parallelism: all there is, and the variants that choose and perturb otherwise
PARALLEL = methods("form", "init", "router", "budget", "optimizer", "loss")
PARALLEL += [
    dataclasses.replace(
        m,
        name=f"{m.name} {v}",
        cls=type(v, (m.cls,), {"example": {**example(m), "router": {**example(m)["router"], "variant": v}}}),
    )
    for m in PARALLEL
    if m.name == "mixlora"
    for v in ("dynamic", "switch")
]
#: terms over a batch that weigh its halves otherwise than the whole: the ranks end alike, but not as one process does
OF_A_BATCH = {"router mixlora", "router mixlora dynamic", "router mixlora switch", "loss ba_lora"}
#: these read whole matrices, and say so where parameters are sharded
WHOLE = {"budget adalora", "optimizer allora", "optimizer galore", "optimizer lora_pro", "budget lt_sft"}


def _four_steps(net: Any, session: Any, batch: dict[str, torch.Tensor]) -> None:
    net.train()
    for _ in range(4):
        session.step_begin()
        out = net(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()


def _sharded_or_not(how: str, info: Any, rank: int) -> dict[str, torch.Tensor] | str:
    """The adapter's tensors after four steps on this rank's half of the batch, or why it was refused."""
    model, adapter = attached(example(info))
    if how == "ddp":
        net: Any = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        net = fully_shard(model)
    try:
        session = rw.Session(model, adapter, lr=1e-2, total_steps=4, ddp=True, check=how == "ddp")
        _four_steps(net, session, {k: v[rank * 2 : rank * 2 + 2] for k, v in batch_for(model, rows=4).items()})
    except rw.RankwiseError as refused:
        return str(refused)
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in adapter.tensors().items()}


HOWS = ("ddp", "fsdp2")


def _worker(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for how in HOWS:
        got = {f"{m.kind} {m.name}": _sharded_or_not(how, m, rank) for m in PARALLEL}
        kept = {n: v if isinstance(v, str) else {k: t.detach() for k, t in v.items()} for n, v in got.items()}
        torch.save(kept, f"{folder}/{how} {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes came to, either way: started once, for most of the time goes into their imports."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_two_processes_equal_one(how: str, of_two_processes: Path) -> None:
    """Every method, over halves of a batch; both ranks end alike, and as one process does."""
    zero, one = (torch.load(of_two_processes / f"{how} {r}.pt", weights_only=True) for r in (0, 1))
    refused = {n for n, got in zero.items() if isinstance(got, str)}
    assert refused == (WHOLE if how == "fsdp2" else set()), {n: zero[n] for n in refused}
    assert all("sharded (DTensor)" in zero[n] for n in refused)
    for info in PARALLEL:
        name = f"{info.kind} {info.name}"
        if name in refused:
            continue
        model, adapter = attached(example(info))
        _four_steps(model, rw.Session(model, adapter, lr=1e-2, total_steps=4), batch_for(model, rows=4))
        for k, t in adapter.tensors().items():
            assert torch.equal(zero[name][k], one[name][k]), f"{name} {k}: the ranks drifted apart"
            assert torch.allclose(zero[name][k], t, atol=1e-4) or name in OF_A_BATCH, f"{name} {k}"


def test_attaching_to_a_wrapped_model_is_refused() -> None:
    model = llama()
    wrapped = type("FSDPModule", (torch.nn.Module,), {})()
    wrapped.inner = model
    with pytest.raises(rw.RankwiseError, match="attach first, then wrap"):
        rw.attach(wrapped, {"r": 2})
