from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.delta import (
    AdapterState,
    BlockAffine,
    Columns,
    Delta,
    Dense,
    Entries,
    Hadamard,
    Kron,
    LowRank,
    Replace,
    Rows,
    Scale,
    Sum,
)  # fmt: skip
from rankwise.errors import ArtefactError, MergeError, OptionError, RankwiseError
from rankwise.merge import attach_state
from tests.models import FAMILIES, batch_for, llama, logits

Q, DOWN, NORM = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm.weight"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


#: every kind for a 32×32 weight
KINDS: dict[str, Delta] = {
    "dense": Dense(draw(32, 32)),
    "entries": Entries(torch.tensor([3, 77, 500, 1023]), draw(4) + 1, (32, 32)),
    "rows": Rows(torch.tensor([1, 30]), draw(2, 32), 32),
    "columns": Columns(torch.tensor([0, 9, 31]), draw(32, 3), 32),
    "kron": Kron(draw(4, 4), draw(8, 8, seed=1)),
    "hadamard": Hadamard(LowRank(draw(2, 32), draw(32, 2, seed=1)), LowRank(1 + draw(2, 32, seed=2), draw(32, 2, seed=3))),
    "scale": Scale(1 + 5 * draw(32)),
    "block_affine": BlockAffine(draw(8, 4, 4), 32),
    "replace": Replace(draw(32, 32)),
    "sum": Sum((LowRank(draw(2, 32), draw(32, 2, seed=1)), Entries(torch.tensor([5]), torch.ones(1), (32, 32)))),
}  # fmt: skip


def mixed() -> AdapterState:
    """Three sorts of place: a lora, a sparse patch, a norm."""
    return AdapterState({
        DOWN: LowRank(draw(2, 48), draw(32, 2, seed=1)),
        Q: KINDS["entries"],
        NORM: Dense(draw(32, 1)),
    })  # fmt: skip


def written(state: AdapterState, strength: float = 1.0) -> Any:
    """A fresh model with W + strength·ΔW in its weights: the naive reference."""
    net = llama()
    with torch.no_grad():
        for n, d in state.sites.items():
            p = net.get_parameter(n if n == NORM else f"{n}.weight")
            p.add_(strength * d.dense(p if d.needs_weight else None).reshape(p.shape))
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_acts_as_its_weight_saves_merges_and_leaves_the_bits(kind: str, tmp_path: Any) -> None:
    state = AdapterState({Q: KINDS[kind]})
    model, batch = llama(), batch_for(llama())
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    base = logits(model, batch)
    adapter = attach_state(model, state)
    assert adapter.recipe.form == "patch" and not adapter.trainable_parameters()
    moved = logits(model, batch)
    assert (moved - base).abs().max() > 1e-3
    assert torch.allclose(moved, logits(written(state), batch), atol=2e-5)
    with rw.view(model, {"merged": 0.25}):
        assert torch.allclose(logits(model, batch), logits(written(state, 0.25), batch), atol=2e-5)
    with rw.view(model, {}):
        assert torch.equal(logits(model, batch), base)
    W = adapter.sites[Q].site.read()
    assert torch.allclose(adapter.delta(Q).dense(W), KINDS[kind].dense(W))

    adapter.save(tmp_path / "a")
    again = rw.load(llama(), tmp_path / "a")
    assert again.delta(Q).kind == KINDS[kind].kind
    assert torch.equal(logits(again.model, batch), moved)
    again.save(tmp_path / "b")
    assert (tmp_path / "a/rankwise.safetensors").read_bytes() == (tmp_path / "b/rankwise.safetensors").read_bytes()

    report = adapter.merge()
    assert report.logit_gap is not None and report.logit_gap < 1e-4
    adapter.detach()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items()) and not hasattr(model, "rankwise")


def test_low_rank_changes_stay_lora_beside_a_patch_also_at_a_norm(tmp_path: Any) -> None:
    model, batch = llama(), batch_for(llama())
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = attach_state(model, mixed())
    forms = {n: p.form.info.name for p in adapter._record.parts for n in p.sites}
    assert forms == {DOWN: "lora", Q: "patch", NORM: "patch"}
    for s in (1.0, -0.5):
        with rw.view(model, {"merged": s}):
            assert torch.allclose(logits(model, batch), logits(written(mixed(), s), batch), atol=2e-5)
    adapter.save(tmp_path / "a")
    assert torch.equal(logits(rw.load(llama(), tmp_path / "a").model, batch), logits(model, batch))
    adapter.detach()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())


def test_patches_add_and_their_order_changes_nothing() -> None:
    one, two = AdapterState({Q: KINDS["entries"]}), AdapterState({Q: KINDS["columns"], NORM: Dense(draw(32, 1))})
    batch = batch_for(llama())
    outs = []
    for order in ((one, two), (two, one)):
        model = llama()
        for s in order:
            attach_state(model, s, name="one" if s is one else "two")
        rw.activate(model, ["one", "two"])
        outs.append(logits(model, batch))
    assert torch.allclose(*outs, atol=1e-5)
    assert torch.allclose(outs[0], logits(written(one + two), batch), atol=2e-5)


def test_whole_tensors_stand_in_the_parameters_place() -> None:
    new = 1 + draw(32)
    model = llama()
    attach_state(model, AdapterState({}, {NORM: new}))
    norm = model.model.layers[0].input_layernorm
    assert torch.allclose(norm.weight, new, atol=1e-6)
    with rw.view(model, {"merged": 0.25}):
        assert torch.allclose(norm.weight, 0.75 * norm._parameters["weight"] + 0.25 * new, atol=1e-6)
    with pytest.raises(MergeError, match="did you mean|known"):
        attach_state(llama(), AdapterState({}, {"model.nrm.weight": new}))


def test_copies_pickles_checkpoints_and_generates() -> None:
    model, batch = llama(), batch_for(llama())
    attach_state(model, mixed())
    want = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), want)
    with torch.no_grad():
        rw.adapters(twin)["merged"].sites[Q].v_values.mul_(5)
    assert not torch.equal(logits(twin, batch), want) and torch.equal(logits(model, batch), want)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), batch), want)
    ids = batch["input_ids"][:2, :5]
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_follows_a_cast_and_takes_swapped_buffers() -> None:
    model, batch = llama(), batch_for(llama())
    adapter = attach_state(model, AdapterState({Q: KINDS["entries"]}))
    want = logits(model, batch)
    name = next(n for n, _ in model.named_buffers() if n.endswith("v_values"))
    with torch.no_grad():
        off = torch.func.functional_call(model, {name: torch.zeros(4)}, kwargs=batch).logits
    with rw.view(model, {}):
        assert torch.equal(off, logits(model, batch))
    assert torch.equal(logits(model, batch), want)
    model.to(torch.bfloat16)
    assert adapter.sites[Q].delta().dtype == torch.bfloat16 and adapter.sites[Q].v_index.dtype == torch.int64
    assert (logits(model, batch).float() - want).abs().max() < 0.1


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral", "mamba", "vit"])
def test_at_other_sorts_of_place(family: str, tmp_path: Any) -> None:
    """Transposed, fused, expert, read and convolution places: the same as a dense form of the same numbers."""
    make, targets = FAMILIES[family]
    model = make()
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    probe = rw.attach(model, {"form": "lora", "r": 2, "targets": targets})
    shapes = {n: d.site.spec.shape for n, d in probe.sites.items()}
    probe.detach()
    state = AdapterState({n: Dense(0.3 * draw(*s, seed=i)) for i, (n, s) in enumerate(shapes.items())})
    batch = batch_for(model)
    base = logits(model, batch)
    adapter = attach_state(model, state)
    moved = logits(model, batch)
    assert (moved - base).abs().max() > 1e-3
    adapter.save(tmp_path / "a")
    assert torch.equal(logits(rw.load(make(), tmp_path / "a").model, batch), moved)
    adapter.merge(force=True)
    assert torch.allclose(logits(model, batch), moved, atol=1e-3)
    adapter.detach()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())


def test_refusals() -> None:
    with pytest.raises(OptionError, match="attach_state"):
        rw.attach(llama(), {"form": "patch"})
    model = llama()
    for state, error in (
        (AdapterState({Q: Dense(torch.zeros(3, 4))}), OptionError),
        (AdapterState({"model.layers.9.q_proj": Dense(torch.zeros(3, 4))}), RankwiseError),
        (AdapterState({}), MergeError),
    ):
        with pytest.raises(error):
            attach_state(model, state)
        assert not hasattr(model, "rankwise")
    adapter = attach_state(model, AdapterState({Q: KINDS["dense"]}))
    with pytest.raises(OptionError, match="nothing would be trained"):
        rw.Session(model, adapter, lr=1e-3, total_steps=1)


def test_a_file_of_another_kind_is_refused() -> None:
    adapter = attach_state(llama(), AdapterState({Q: KINDS["entries"]}))
    held = adapter.sites[Q]
    tensors = {f"{Q}::{n}": t for n, t in held.named_buffers()}
    for state in ({"kind": "rows", "meta": {"size": [32, 32]}}, {"kind": "entries", "meta": {}}):
        with pytest.raises(ArtefactError, match="cannot be rebuilt"):
            held.restore_state(state, tensors, Q)
