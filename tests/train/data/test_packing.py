"""Packed is padded: the same loss token for token, and no document sees another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import DataError, OptionError
from rankwise.train.data import Collator, Example, Packed, attention_for, check_isolation, pack, tokens_of_loss

V = 64
TEXT = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    pad_token_id=0,
)
GPT2 = dict(
    vocab_size=V,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
)
SLIDING = ["sliding_attention", "full_attention"]


def model(name: str, attention: str = "sdpa") -> Any:
    import transformers as T

    torch.manual_seed(0)
    config: dict[str, Callable[[], Any]] = {
        "Llama": lambda: T.LlamaConfig(**TEXT),
        "Qwen3": lambda: T.Qwen3Config(**TEXT, head_dim=8),
        "Qwen3 sliding": lambda: T.Qwen3Config(
            **TEXT, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=SLIDING
        ),
        "Mistral": lambda: T.MistralConfig(**TEXT, sliding_window=4),
        "Gemma3": lambda: T.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4, layer_types=SLIDING),
        "GPT2": lambda: T.GPT2Config(**GPT2),
        "Mamba": lambda: T.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
        "T5": lambda: T.T5Config(vocab_size=V, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8, decoder_start_token_id=0),
        "Bert": lambda: T.BertConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        ),
    }
    make = config[name]()
    make._attn_implementation = "eager" if name in ("Mamba", "T5") else attention
    cls = {"T5": T.T5ForConditionalGeneration, "Bert": T.BertForMaskedLM}.get(name) or T.AutoModelForCausalLM._model_mapping[
        type(make)
    ]
    out = cls(make).eval()
    with torch.no_grad():  # random weights attend to nothing in particular; make a leak loud
        for p in out.parameters():
            p.mul_(3.0) if p.ndim > 1 else None
    return out


def documents(lengths: tuple[int, ...] = (9, 3, 14, 6, 11), seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, V, (n,), generator=g).tolist() for n in lengths]
    return [Example(i, [-100, -100, *i[2:]]) for i in ids]


def token_losses(net: Any, batch: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """(document's tokens up to the learnt one) → its loss."""
    logits = net(**{k: v for k, v in batch.items() if k != "labels"}).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    loss = loss.view(len(logits), -1)
    out = {}
    for b, q in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        start = 0 if "position_ids" not in batch else q - int(batch["position_ids"][b, q])
        out[tuple(batch["input_ids"][b, start : q + 2].tolist())] = float(loss[b, q])
    return out


CAUSAL = ["Llama", "Qwen3", "Qwen3 sliding", "Mistral", "Gemma3", "GPT2"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_packed_loss_is_the_padded_one_token_for_token(name: str, attention: str) -> None:
    net = model(name, attention)
    collator = Collator.for_model(net, 0)
    check_isolation(net, V)
    docs = documents()
    packed, padded = collator(pack(docs, 24)), collator(docs)
    assert packed["input_ids"].shape[0] < len(docs) and tokens_of_loss(packed) == tokens_of_loss(padded) == sum(
        len(d) - 2 for d in docs
    )
    a, b = token_losses(net, packed), token_losses(net, padded)
    assert a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) < 1e-5 * max(1.0, max(b.values()))
    check_isolation(net, packed)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_changed_document_leaves_the_others_as_they_were(name: str, attention: str) -> None:
    net = model(name, attention)
    docs = documents((11, 9, 4))
    (row,) = pack(docs, 24)
    batch = {k: v for k, v in Collator.for_model(net, 0)([row]).items() if k != "labels"}
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][0, :11] = 5
    a, b = (net(**x).logits[0] for x in (batch, other))
    assert (a[11:] - b[11:]).abs().max() < 1e-6 and (a[:11] - b[:11]).abs().max() > 0.1
    loose = {"input_ids": batch["input_ids"]}, {"input_ids": other["input_ids"]}
    c, d = (net(**x).logits[0] for x in loose)
    assert (c[11:] - d[11:]).abs().max() > 1e-3, "without isolation this would have been seen"


def test_gradients_of_packed_and_padded_agree() -> None:
    net = model("Gemma3")
    grads = []
    for rows in (documents(), pack(documents(), 24)):
        batch = Collator.for_model(net, 0)(rows)
        net.zero_grad()
        net(**batch, num_items_in_batch=tokens_of_loss(batch)).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 1 - 1e-6
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[0].abs().max()


def test_how_each_model_is_told() -> None:
    told = {n: attention_for(model(n)) for n in CAUSAL}
    assert told == {
        "Llama": "mask",
        "Qwen3": "mask",
        "GPT2": "mask",
        "Qwen3 sliding": "varlen",
        "Mistral": "varlen",
        "Gemma3": "varlen",
    }
    assert attention_for(model("Llama", "eager")) == "additive"
    assert attention_for(torch.nn.Linear(2, 2)) == "mask"


@pytest.mark.parametrize("name", ["Mamba", "T5", "Bert"])
def test_models_that_cannot_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="packing=False"):
        check_isolation(model(name), V)


@pytest.mark.parametrize(
    ("name", "attention", "told"), [("Llama", "eager", "mask"), ("Gemma3", "sdpa", "mask"), ("Mistral", "sdpa", "mask")]
)
def test_a_wrong_way_of_telling_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, attention: str, told: Any) -> None:
    net = model(name, attention)
    monkeypatch.setattr(Collator, "for_model", classmethod(lambda cls, model, pad_id: cls(pad_id, told)))
    with pytest.raises(DataError, match="packing=False"):
        check_isolation(net, V)


def test_a_forward_that_drops_the_mask_is_seen_also_in_bf16() -> None:
    net = model("Llama").bfloat16()
    check_isolation(net, V)
    inner = net.forward
    net.forward = lambda **b: inner(input_ids=b["input_ids"])
    with pytest.raises(DataError, match="see each other"):
        check_isolation(net, V)
    assert not net.training


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60), st.sampled_from(["bfd", "sequential"]))
def test_every_token_once_in_rows_that_fit(lengths: list[int], strategy: Any) -> None:
    docs = [Example([i] * n, list(range(n))) for i, n in enumerate(lengths)]
    rows = pack(docs, 32, strategy)
    seen = sorted((r.input_ids[s], n) for r in rows for s, n in zip(starts(r), r.lengths, strict=True))
    assert seen == sorted(enumerate(lengths)) and all(len(r) <= 32 and sum(r.lengths) == len(r) for r in rows)
    assert all(r.labels[s] == -100 and r.position_ids[s] == 0 for r in rows for s in starts(r))
    if strategy == "bfd":
        assert sorted(32 - len(r) for r in rows) == naive_best_fit(lengths, 32)


def starts(row: Packed) -> list[int]:
    return [sum(row.lengths[:k]) for k in range(len(row.lengths))]


def naive_best_fit(lengths: list[int], size: int) -> list[int]:
    """The room left in each row, sorted."""
    room: list[int] = []
    for n in sorted(lengths, reverse=True):
        fits = [r for r in range(len(room)) if room[r] >= n]
        if fits:
            room[min(fits, key=lambda r: room[r])] -= n
        else:
            room.append(size - n)
    return sorted(room)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"f:3 has 9 tokens, more than a row of 8"):
        pack([Example([1] * 9, [1] * 9, "f:3")], 8)
    with pytest.raises(OptionError, match="strategy"):
        pack(documents(), 24, "ffd")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="attention is"):
        Collator(0, "flash")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not both"):
        Collator(0)([documents()[0], pack(documents(), 24)[0]])
    with pytest.raises(DataError, match="at least one row"):
        Collator(0)([])


def test_only_labels_with_a_token_before_them_count() -> None:
    batch = Collator(0)([Example([3, 4, 5], [3, 4, 5]), Example([3, 4], [-100, 4])])
    assert batch["labels"].tolist() == [[-100, 4, 5], [-100, 4, -100]] and batch["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 1, 0],
    ]
    assert tokens_of_loss(batch) == 3 == tokens_of_loss({"labels": torch.tensor([[3, 4, 5], [7, 4, -100]])})


def test_the_mask_itself_and_rounded_lengths() -> None:
    batch = Collator(9, "mask", multiple=4)([Packed([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5], [2, 3])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]] and batch["position_ids"].tolist() == [
        [0, 1, 0, 1, 2, 0, 0, 0]
    ]
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in (2, 3, 1, 1, 1))).bool()
    assert torch.equal(batch["attention_mask"][0, 0], expected) and tokens_of_loss(batch) == 3
    added = Collator(9, "additive", multiple=4)([Packed([1, 2, 3, 4, 5], [0] * 5, [2, 3])])["attention_mask"]
    assert torch.equal(added[0, 0] == 0, expected) and torch.isfinite(added).all()
