"""What is read, and what is refused with file and line."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import DataError, OptionError
from rankwise.train.data import read, readers, tokenize
from tests.train.data.conftest import make

ROWS = [{"prompt": 'a,\n"b"', "completion": "c"}, {"prompt": "ü\u2028x", "completion": "d"}]


def test_every_container_gives_the_same_records(tmp_path: Path) -> None:
    import csv

    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(r, ensure_ascii=False).encode() for r in ROWS) + b"\r\n"
    )
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    with open(tmp_path / "c.csv", "w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, ["prompt", "completion"])
        w.writeheader()
        w.writerows(ROWS)
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "e")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "f")
    got = {n: read(tmp_path / n) for n in ("a.jsonl", "b.json", "lines.json", "c.csv", "d.parquet", "e")}
    for name, records in got.items():
        assert [dict(r.fields) for r in records] == ROWS, name
    assert [r.where for r in got["a.jsonl"]] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 3)]
    assert [r.where for r in got["c.csv"]] == [f"{tmp_path}/c.csv:{n}" for n in (2, 4)], "a quoted line end counts"
    assert [dict(r.fields) for r in read(tmp_path / "f", split="test")] == ROWS[1:]
    assert [dict(r.fields) for r in read(whole)] == ROWS
    with pytest.raises(DataError, match="holds the splits train, test; give split="):
        read(tmp_path / "f")
    for source in (tmp_path / "e", tmp_path / "b.json", ROWS):
        with pytest.raises(DataError, match="splits"):
            read(source, split="test")


def test_folders(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name, text in (("b.py", "two"), ("a.txt", "one"), ("empty.py", ""), ("x.json", "{}"), (".git/c.txt", "no")):
        (tmp_path / name).write_text(text)
    with pytest.warns(UserWarning, match=r"read 2 files; left out 1 \.json, 1 empty"):
        records = read(tmp_path)
    assert [r.fields["text"] for r in records] == ["one", "two"]
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in (0, 1):
        (shards / f"{i}.jsonl").write_text(json.dumps({"text": str(i)}))
    assert [r.fields["text"] for r in read(shards)] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl:2 is not UTF-8: byte 0xff at offset 24"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "\xff"}', r"a\.jsonl:1 is not UTF-8: byte 0xff at offset 13"),
        ("a.jsonl", b'\n{"text": "a"', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}', r"a\.jsonl:1: text holds the lone surrogate '\\ud800' at character 2"),
        ("a.jsonl", b'{"text": "a", "prompt": "b", "completion": "c"}', r":1 has the keys .*which fit text and completion; .*fmt="),
        ("a.jsonl", b'{"instruction": "a", "output": "b", "system": "be rude"}', r":1: a alpaca record has no place for system"),
        (
            "a.jsonl",
            b'{"prompt": "a", "chosen": [{"role": "user", "content": "x"}], "rejected": "c"}',
            ":1: chosen hold messages, but the others text",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"chosen": "b", "rejected": "c"}',
            "mixes layouts: preference of text",
        ),
        ("a.json", b'[\n{"text": "a"},\n]', r"a\.json is not valid JSON.*line [23]"),
        ("a.json", b'{"text": "a"}', "holds one dict"),
        ("a.csv", b"text,text\na,b", r"a\.csv:1: the header names a column twice"),
        ("a.csv", b"prompt,completion\na,b\nc\n", r"a\.csv:3 has 1 cells, but the header names 2"),
        ("a.csv", b'text\n"abc', r"a\.csv:2 is not valid CSV"),
        ("a.csv", b"text\n", "no records"),
        ("a.txt", b" \n", "no records"),
        ("a.pdf", b"x", "suffix '.pdf'"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        read(tmp_path / name)


def test_a_huge_line_is_refused_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 200}))
    with pytest.raises(DataError, match=r"a\.jsonl:2 is a line of 212 characters"):
        read(tmp_path / "a.jsonl")


def test_fmt_decides_where_keys_do_not(tmp_path: Path) -> None:
    row = {"text": "all", "instruction": "i", "input": "", "output": "o", "id": 3}
    with pytest.warns(UserWarning, match=r"not used: id \(record 1\), text \(record 1\)"):
        (r,) = read([row], fmt="alpaca")
    assert r.fields == {"prompt": "i\n\n", "completion": "o"}
    with pytest.raises(DataError, match="fmt='messages' needs messages too"):
        read([row], fmt="messages")
    with pytest.raises(OptionError, match="fmt is one of auto, text"):
        read([row], fmt="csv")
    (tmp_path / "notes.log").write_text("hello")
    assert read(tmp_path / "notes.log", fmt="text")[0].fields == {"text": "hello"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read([{"text": "a", "prompt": None}])


def test_preference_as_messages() -> None:
    said = lambda c: [{"role": "assistant", "content": c}]
    (r,) = read([{"prompt": [{"from": "human", "value": "q"}], "chosen": said("a"), "rejected": said("b")}])
    assert r.kind == "preference" and r.fields["prompt"] == [{"role": "user", "content": "q"}] and r.fields["rejected"] == said("b")


def test_overlong_records() -> None:
    t = make()
    long: dict[str, Any] = {"prompt": "the cat " * 30, "completion": "sat"}
    with pytest.raises(DataError, match=r"record 2 has \d+ tokens, more than max_length = 16"):
        tokenize(read([{"prompt": "a", "completion": "b"}, long]), t, 16)
    with pytest.raises(DataError, match="no token to learn from within max_length = 16"):
        tokenize(read([long]), t, 16, truncation=True)
    with pytest.raises(OptionError, match="'split' is for texts"):
        tokenize(read([long]), t, 16, truncation="split")
    with pytest.raises(OptionError, match="at least 2"):
        tokenize(read([long]), t, 1)
    with pytest.raises(OptionError, match="truncation is"):
        tokenize(read([long]), t, 16, truncation="drop")  # type: ignore[arg-type]
    left = set()
    for n, size in itertools.product((7, 8, 9), range(3, 40)):
        text = "one two three four five six seven\n" * n + " x" * n
        whole = tokenize(read([{"text": text}]), t, 10_000)[0].input_ids
        assert whole[0] == t.bos_token_id and whole.count(t.eos_token_id) == 1 and whole[-1] == t.eos_token_id
        parts = tokenize(read([{"text": text}]), t, size)
        assert [i for p in parts for i in p.input_ids] == whole and all(2 <= len(p) <= size for p in parts), size
        left.add(len(whole) % size)
    assert {0, 1, 2} <= left, "also where one token is left over"
