"""Adapters on simulated devices: both ways of splitting them equal the merged model; what is sent is what the formula says."""

from __future__ import annotations

import time

import pytest
import torch

from rankwise.serve.adapters.layout import Layout
from rankwise.serve.parallel.experimental.comm import PeerLost
from rankwise.serve.parallel.experimental.shares import shares
from rankwise.serve.simulate.ring import Ring, attention_traffic, ring_all_gather, ring_all_reduce
from tests.models import _LLAMA, _text, llama
from tests.serve.parallel.rig import forward, merge, pairs_for, wide

IDS = torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("split", [True, False], ids=["split", "replicate"])
@pytest.mark.parametrize("rank", [1, 3, 8, 16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_neox"])
def test_an_adapter_on_devices_is_the_merged_model(family: str, rank: int, split: bool) -> None:
    model, merged = wide(family), wide(family)
    pairs = pairs_for(model, rank)
    merge(merged, pairs)
    with torch.no_grad():
        want, base = merged(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert (want - base).abs().max() > 0.1 * want.abs().max(), "the adapter does not show"
    for size in (1, 2, 3, 4):
        got = forward(model, IDS, size, pairs, split)
        assert (got - want).abs().max() < 1e-4 * want.abs().max(), size


def _attention(model: object, rank: int) -> dict[str, object]:
    return {name: those for name, those in pairs_for(model, rank).items() if "self_attn" in name}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_ring_sends_what_the_formula_says(size: int) -> None:
    """One layer of attention with a rank that every N divides: 2(N−1)Th/N of the base, 5(N−1)Tr/N of the adapter, on each device."""
    T, h, r = 24, 48, 24
    model = _text("LlamaForCausalLM", "LlamaConfig", **_LLAMA | dict(hidden_size=h, num_hidden_layers=1, num_attention_heads=8))()
    ring = Ring(size)
    forward(model, IDS, size, _attention(model, r), True, ring)  # type: ignore[arg-type]
    base, adapter = attention_traffic(T, h, r, size)
    assert (base, adapter) == (2 * (size - 1) * T * h // size, 5 * (size - 1) * T * r // size)
    assert size == 1 or adapter / base == 5 * r / (2 * h)
    assert ring.sent("adapter") == [adapter] * size
    assert ring.sent("base") == [2 * base] * size, "attention and the MLP reduce T×h each"
    assert [d.nbytes["base"] for d in ring.devices] == [8 * base] * size


def test_replicated_adapters_send_nothing_and_padding_is_counted() -> None:
    model = llama(layers=1)
    for split, sent in ((False, 0), (True, attention_traffic(24, 32, 7, 3)[1] * 3)):
        ring = Ring(3)
        forward(model, IDS, 3, _attention(model, 7), split, ring)  # type: ignore[arg-type]
        assert sum(ring.sent("adapter")) == sent
    assert attention_traffic(24, 32, 7, 3)[1] == 3 * ring_all_gather(24 * 9, 3) + ring_all_reduce(24 * 7, 3)


def test_collectives_are_equal_on_all_devices_whatever_their_size() -> None:
    for size in (1, 2, 3, 5):
        ring = Ring(size)
        given = [torch.randn(7, 3, generator=torch.Generator().manual_seed(n)) for n in range(size)]
        sums = ring.run([lambda d, x=x: d.all_reduce(x.clone()) for x in given])
        assert all(torch.equal(s, sums[0]) for s in sums)
        assert torch.allclose(sums[0], sum(given), atol=1e-6)  # type: ignore[arg-type]
        for got in ring.run([lambda d, x=x: d.all_gather(x) for x in given]):
            assert torch.equal(got, torch.stack(given))


def test_a_device_that_fails_is_told_to_the_others_at_once() -> None:
    def fail(_: object) -> torch.Tensor:
        raise ZeroDivisionError("here")

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        Ring(2, timeout=60).run([lambda d: d.all_reduce(torch.ones(4)), fail])
    assert time.monotonic() - start < 30, "the other waited in vain"
    late = Ring(2, timeout=0.2)
    with pytest.raises(PeerLost, match="got nothing from the one before it"):
        late.run([lambda d: d.all_reduce(torch.ones(4)), lambda d: torch.ones(4)])


def test_slices_of_an_adapter_add_up_to_it() -> None:
    """Each device of ``split`` holds an N-th of A at q, k, v and of B at o, and all slices together are the adapter."""
    from rankwise.serve.parallel.experimental.cutting import cut_pairs

    model = llama(layers=1)
    pairs, made = pairs_for(model, 8), shares(model, Layout(model), 4)
    qkv, o = (next(n for n in pairs if key in n) for key in ("self_attn#", "o_proj"))
    cut = [cut_pairs(pairs[qkv], qkv, s, True, 8) for s in made]
    assert torch.equal(torch.cat([c[0][0] for c in cut]), pairs[qkv][0][0])  # type: ignore[index]
    assert torch.equal(torch.cat([c[0][1] for c in cut]), pairs[qkv][0][1])  # type: ignore[index]
    cut = [cut_pairs(pairs[o], o, s, True, 8) for s in made]
    assert torch.equal(torch.cat([c[0][0] for c in cut], 1), pairs[o][0][0])  # type: ignore[index]
    assert torch.equal(torch.cat([c[0][1] for c in cut]), pairs[o][0][1])  # type: ignore[index]
