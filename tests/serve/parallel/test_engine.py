"""The engine on simulated devices: requests under different adapters answer as the model merged with each, alone."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest
import torch

from rankwise.delta import Dense, Scale
from rankwise.errors import OptionError
from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
from rankwise.serve.adapters.layout import Layout
from rankwise.serve.adapters.non_lora_changes import Constant, Offset, Weighted
from rankwise.serve.adapters.source import FolderSource
from rankwise.serve.batch import BASE, Role, Span, make_plan
from rankwise.serve.engine.options import EngineOptions
from rankwise.serve.parallel.experimental.comm import PeerLost
from rankwise.serve.parallel.experimental.device import DevicePages
from rankwise.serve.parallel.experimental.non_lora_changes import local
from rankwise.serve.parallel.experimental.shares import shares
from rankwise.serve.server import Sizes, build_server
from rankwise.serve.simulate.drive import run_until_idle
from rankwise.serve.simulate.ring import Alone, attention_traffic
from rankwise.serve.types import AdapterRefused, Outcome
from tests.serve import rig
from tests.serve.parallel.team import Threads

#: those of the rig's adapters that are served on several devices: pairs, and a gain beside a pair
SERVED = ("one", "three", "eight", "nine", "rs", "dora")


def made(team: Any, split: str, **more: Any) -> Any:
    return build_server(
        rig.base_model(), lambda adapter_loader: FolderSource(rig.folder(), adapter_loader), sizes=Sizes(kv_tokens=160, page=4, max_lora_blocks=8), policy="fcfs",
        base="rig", team=team, adapter_split=split, options=EngineOptions(max_num_seqs=6, max_num_batched_tokens=8, speculate=2), pack=False, **more,
    )  # fmt: skip


def ask(server: Any, seed: int, names: tuple[str, ...], n: int = 8) -> rig.Run:
    """Random prompts under random adapters, mixes among them, some arriving later; run to their end."""
    rnd = random.Random(seed)
    run, due = rig.Run(), []
    for k in range(n):
        chosen: tuple[tuple[str, float], ...] = () if rnd.random() < 0.2 else ((rnd.choice(names), 1.0),)
        if rnd.random() < 0.2:
            chosen = tuple((name, rnd.choice([0.5, -0.3])) for name in sorted(rnd.sample(names, 2)))
        prompt = rnd.choice(rig.STARTS) + tuple(rnd.randrange(rig.VOCAB) for _ in range(rnd.randrange(1, 9)))
        request = rig.Request(
            f"r{k}", prompt, rig.Sampling(max_tokens=rnd.randrange(2, 9), ignore_eos=True), rig.digest_of(server, chosen)
        )
        run.requests[request.id], run.adapters[request.id] = request, chosen
        due.append((rnd.randrange(6), request))
    rig.drive(server, run, due, random.Random(1))
    return run


@pytest.mark.parametrize("split", ["split", "replicate", "auto"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_answer_is_that_of_the_merged_model_alone(size: int, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rankwise.serve.parallel.experimental.device.SPLIT_FROM", 8
    )  # so that "auto" holds adapters both ways in one step
    team = Threads(rig.base_model, size)
    server = made(team, split)
    rig.check(ask(server, 3 * size, SERVED), server)
    team.close()


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_sends_what_the_formula_says(size: int) -> None:
    """One request under an adapter of rank 8 at q, k, v, o alone: 2(N−1)Th/N a reduction, 5(N−1)Tr/N an attention, on each device."""
    team = Threads(rig.base_model, size)
    server = made(team, "split")
    model, (layers, h) = rig.base_model(), (2, 32)
    everywhere = server.cache.fetch(server.cache.resolve("eight").digest).result()
    only = {name: those for name, those in everywhere.pairs.items() if "self_attn" in name}
    server.table.ensure("attention", dataclasses.replace(everywhere, pairs=only))
    before = team.sent("base")
    ids = tuple(range(3, 3 + 24))
    server.engine.runner.run(plan_of(ids, server.table.find("attention")), server.table.slots)
    attention = attention_traffic(len(ids), h, 8, size)
    assert [b - a for a, b in zip(before, team.sent("base"), strict=True)] == [2 * layers * attention[0]] * size
    assert team.sent("adapter") == [layers * attention[1]] * size
    assert model.config.num_hidden_layers == layers and model.config.hidden_size == h
    team.close()


def plan_of(ids: tuple[int, ...], slot: int) -> Any:
    return make_plan([Span("r", ids, 0, tuple(range(-(-len(ids) // 4))), slot, Role.PREFILL, 1)], 4)


def test_a_device_holds_its_part_of_pages_and_cache() -> None:
    """Of pages, an N-th where the sides divide; of keys and values its heads'; all of both with one device."""
    alone = build_server(
        rig.base_model(), lambda i: FolderSource(rig.folder(), i), sizes=Sizes(kv_tokens=160, page=4, max_lora_blocks=8), pack=False
    )
    team = Threads(rig.base_model, 2)
    server = made(team, "split")
    assert 2 * server.runner.store.block_bytes == alone.runner.store.block_bytes
    held, whole = server.table._pages.pages.stores[True], alone.runner.pages
    for name, g in whole.groups.items():
        own = held.groups[name]
        if server.table._pages.shares[0].row_parallel(name):
            assert (own.inp, own.outs, held.across[name]) == (g.inp // 2, (g.outs[0] // 2,), 8)
        else:
            assert (own.inp, own.outs, held.across[name]) == (g.inp, tuple(o // 2 for o in g.outs), 4)
    assert held.page_bytes < whole.page_bytes
    team.close()


def test_the_head_may_be_anything_but_what_needs_a_whole_weight_is_refused() -> None:
    team = Threads(rig.base_model, 2)
    server = made(team, "auto")
    rig.check(ask(server, 5, ("headed", "dora", "three"), 6), server)
    dense = server.cache.fetch(server.cache.resolve("dora").digest).result()
    module = "model.layers.0.self_attn.q_proj"
    site = server.layout.sites[module]
    for change in (Constant(site, Dense(torch.zeros(32, 32))), Constant(site, Scale(torch.ones(32), axis="in"))):
        odd = dataclasses.replace(dense, non_lora_changes={module: (Weighted(change, 0.5),)})
        with pytest.raises(AdapterRefused, match=rf"'dora' changes '{module}' .* serve it without --tensor-parallel"):
            server.cache.accept(odd)
    with pytest.raises(AdapterRefused, match="changes 'model.embed_tokens.weight'"):
        server.cache.accept(dataclasses.replace(dense, full_params={"model.embed_tokens.weight": torch.zeros(64, 32)}))
    team.close()


def test_a_loose_change_of_the_head_is_the_first_devices_alone() -> None:
    team = Threads(rig.base_model, 2)
    server = made(team, "auto")
    offset = torch.randn(rig.VOCAB, generator=torch.Generator().manual_seed(0))
    served = LoadedAdapter(AdapterMetadata("h", "h", "", "", 0, 0, 0), {}, {"lm_head": (Offset(offset),)})
    server.cache.accept(served)
    slot = server.table.ensure("h", served)
    base, changed = (server.runner.run(plan_of((3, 4, 5), at), server.table.slots) for at in (BASE, slot))
    assert torch.allclose(changed, base + offset, atol=1e-5)
    team.close()


def test_a_refusal_reaches_the_one_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.serve.parallel.experimental.non_lora_changes.is_affine", lambda change: False)
    team = Threads(rig.base_model, 2)
    server = made(team, "auto")
    run = rig.Run()
    request = rig.Request("d", (3, 4), rig.Sampling(max_tokens=2), server.cache.resolve("dora").digest)
    server.engine.submit(request, run.events["d"].append)
    deadline = time.monotonic() + 10
    while not server.engine.idle() and time.monotonic() < deadline:
        server.engine.step()
    assert run.outcome("d").outcome is Outcome.REJECTED
    team.close()


@pytest.mark.parametrize("size", [2, 3])
def test_biases_that_an_adapter_changes(size: int) -> None:
    """Offsets of outputs, in slices and, where sums are taken, once; alone and beside gains, weighed."""
    model = rig.base_model()
    layout = Layout(model)
    g = torch.Generator().manual_seed(0)
    non_lora_changes = {}
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        site = layout.sites[path]
        gain = Constant(site, Scale(1 + 0.3 * torch.randn(site.spec.out, generator=g)))
        non_lora_changes[path] = (Weighted(Offset(torch.randn(site.spec.out, generator=g)), 0.5), gain)
    served = LoadedAdapter(AdapterMetadata("x", "x", "", "", 0, 0, 0), {}, non_lora_changes)
    x = torch.randn(5, 32, generator=g)
    for path, changes in non_lora_changes.items():
        W = model.get_submodule(path).weight.detach()
        x = torch.randn(5, W.shape[1], generator=g)
        want = sum(c(x, x @ W.t()) for c in changes)
        total = torch.zeros_like(want)
        for share in shares(model, layout, size):
            cut, (change,) = share.cuts[path], local(served, share)[path]
            if cut.inp is not None:
                total += change(x, x[:, cut.inp] @ W[:, cut.inp].t())
            else:  # a head held twice is the same on both
                total[:, cut.out] = change(x, x @ W[cut.out].t())
        assert torch.allclose(total, want, atol=1e-5)


def test_a_fault_on_any_device_ends_the_step_and_the_team() -> None:
    team = Threads(rig.base_model, 2)
    server = made(team, "replicate")
    run = rig.Run()
    server.engine.submit(rig.Request("r", (3, 4, 5), rig.Sampling(max_tokens=20, ignore_eos=True)), run.events["r"].append)
    server.engine.step()
    team.tell(1, "not a step")  # the other device fails in what it is told next
    run_until_idle(server.engine)
    assert run.outcome("r").outcome is Outcome.ERROR
    assert isinstance(team.failures[0], AttributeError)


def test_a_fault_on_the_first_device_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Threads(rig.base_model, 2)
    server = made(team, "replicate")

    def fault(plan: Any) -> Any:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(server.runner, "_logits", fault)
    run = rig.Run()
    server.engine.submit(rig.Request("r", (3, 4, 5), rig.Sampling(max_tokens=20, ignore_eos=True)), run.events["r"].append)
    run_until_idle(server.engine)
    assert run.outcome("r").outcome is Outcome.ERROR
    team.threads[0].join(5)
    assert [type(f) for f in team.failures] == [PeerLost], "the other device still waits for the step's sums"


def test_wrong_ways_are_refused() -> None:
    share = shares(rig.base_model(), Layout(rig.base_model()), 1)[0]
    with pytest.raises(OptionError, match="'auto', 'split' or 'replicate'; 'both' came"):
        DevicePages(share, Alone(), 1, torch.float32, "both")
    with pytest.raises(OptionError, match="give --op auto"):
        DevicePages(share, Alone(), 1, torch.float32, "split", op="triton")
    pages = DevicePages(share, Alone(), 1, torch.float32, "auto")
    few, many = ({share.groups[0].name: ((torch.zeros(r, 32), torch.zeros(32, r)), None, None)} for r in (63, 64))
    assert not pages.splits(few) and pages.splits(many)
