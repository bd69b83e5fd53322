"""Files to batches: layouts, loss masks, isolation of packed documents, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise import assets
from rankwise.errors import DataError
from rankwise.train.data import Collator, Example, check_isolation, pack, read, tokenize
from rankwise.train.evaluate import evaluate
from tests.models import FAMILIES, llama


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return assets.load_base()[1]


def jsonl(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def learnt(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode([t for t, label in zip(example.input_ids, example.labels, strict=True) if label != -100])


def test_layouts(tmp_path: Path, tokenizer: Any) -> None:
    rows = {
        "completion": {"prompt": "def f():\n", "completion": "    return 1\n"},
        "alpaca": {"instruction": "Add", "input": "1 2", "output": "3"},
        "text": {"text": "import os\n"},
        "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }
    kinds = {name: read(jsonl(tmp_path, row))[0] for name, row in rows.items()}
    assert {n: r.kind for n, r in kinds.items()} == {
        "completion": "completion", "alpaca": "completion", "text": "text", "messages": "messages", "sharegpt": "messages", "preference": "preference",
    }  # fmt: skip
    assert kinds["alpaca"].fields == {"prompt": "Add\n\n1 2\n\n", "completion": "3"}
    assert kinds["messages"].fields == kinds["sharegpt"].fields


def test_loss_is_on_the_completion_and_the_assistant_only(tokenizer: Any) -> None:
    eos = tokenizer.eos_token
    (done,) = tokenize(read([{"prompt": "def f():\n", "completion": "    return 1\n"}]), tokenizer, 64)
    assert learnt(done, tokenizer) == "    return 1\n" + eos and done.input_ids.count(tokenizer.eos_token_id) == 1
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "uno"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "dos"},
    ]
    (chat,) = tokenize(read([{"messages": turns}]), tokenizer, 256)
    said = learnt(chat, tokenizer)
    assert "uno" in said and "dos" in said and "one" not in said and "two" not in said
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(chat.input_ids) == whole


def test_a_template_that_renders_prefixes_differently_is_refused(tokenizer: Any) -> None:
    import copy

    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="generation"):
        tokenize(read([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]), odd, 64)
    odd.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenize(read([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]), odd, 64)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a", '], r":2 is not valid JSON: .* at column"),
        (['{"text": "a"}', '{"words": "a"}'], r":2 has the keys words; expected"),
        (['{"text": "a", "text": "b"}'], r":1 has the key 'text' twice"),
        (['{"prompt": "a", "completion": ""}'], r":1: completion is empty"),
        (['{"prompt": "a", "completion": 3}'], r"completion is a int"),
        (['{"messages": []}'], r"messages must be a list.*empty"),
        (['{"messages": [{"role": "boss", "content": "x"}]}'], r"message 1 must have a role"),
        (['{"text": "a"}', '{"prompt": "a", "completion": "b"}'], r"mixes layouts"),
        (["[1]"], r":1 is a list, not a record"),
        (["[" * 100_000], r":1 "),
        ([""], "holds no records"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, rows: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(jsonl(tmp_path, *rows))


def test_bad_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo \xe9\n")
    with pytest.raises(DataError, match=r"latin.txt:2 is not UTF-8: byte 0xe9 at offset 8"):
        read(tmp_path / "latin.txt")
    (tmp_path / "x.parquet").write_bytes(b"")
    for bad, says in (
        (tmp_path / "x.parquet", "suffix"),
        (tmp_path / "none.txt", "no file"),
        (tmp_path / "empty", "neither text files"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=says):
            read(bad)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read(tmp_path / "bom.txt")[0].fields["text"] == "one\ntwo"
    path = jsonl(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "x = 1\n" * 200})
    with pytest.raises(DataError, match=r"data.jsonl:2 has [\d,]+ tokens, more than max_length = 64"):
        tokenize(read(path), tokenizer, 64)
    assert len(tokenize(read(path), tokenizer, 64, truncation=True)) == 2


def test_long_texts_are_split_and_nothing_is_lost(tokenizer: Any) -> None:
    text = "value = compute(value)\n" * 80
    parts = tokenize(read([{"text": text}]), tokenizer, 50)
    assert tokenizer.decode([t for p in parts for t in p.input_ids], skip_special_tokens=True) == text
    assert max(len(p) for p in parts) <= 50


def documents(n: int = 7) -> list[Example]:
    g = torch.Generator().manual_seed(0)
    out = []
    for i in range(n):
        ids = torch.randint(3, 64, (3 + 2 * i,), generator=g).tolist()
        out.append(Example(ids, list(ids)))
    return out


def test_packing_keeps_every_token_once_and_is_full() -> None:
    rows = pack(documents(), 20)
    assert all(len(r.input_ids) <= 20 and sum(r.lengths) == len(r.input_ids) for r in rows)
    assert sorted(t for r in rows for t in r.input_ids) == sorted(t for d in documents() for t in d.input_ids)
    assert len(rows) == 4, "best-fit decreasing: 63 tokens in 4 rows of 20"
    for r in rows:
        at = 0
        for n in r.lengths:
            assert r.labels[at] == -100
            at += n


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_documents_of_a_row_do_not_see_each_other_and_the_loss_is_the_padded_one(family: str) -> None:
    model = FAMILIES[family][0]()
    check_isolation(model, 64)
    docs = documents(5)
    batch = Collator.for_model(model, 0)(pack(docs, 24))
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    packed = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    padded = evaluate(model, docs, pad_id=0)
    assert packed.item() == pytest.approx(padded["loss"] * padded["tokens"], rel=1e-4)
    row = pack([docs[3], docs[4]], 24)
    first = Collator.for_model(model, 0)(row)
    changed = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.items()}
    changed["input_ids"][0, : row[0].lengths[0]] = 5
    with torch.no_grad():
        a, b = (model(**{k: v for k, v in x.items() if k != "labels"}).logits[0, row[0].lengths[0] :] for x in (first, changed))
    assert torch.allclose(a, b, atol=1e-5), "a change in one document moved another"


def test_models_that_cannot_isolate_are_refused() -> None:
    with pytest.raises(DataError, match="packing=False"):
        check_isolation(FAMILIES["mamba"][0](), 64)
    model = llama()
    inner = model.forward
    model.forward = lambda **batch: inner(input_ids=batch["input_ids"])
    with pytest.raises(DataError, match="see each other"):
        check_isolation(model, 64)
