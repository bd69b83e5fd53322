"""Text that comes token by token is the text of the whole, and stop strings never leak a beginning."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from rankwise.serve.http.detokenise import Detokeniser, StopCutter, _Window
from tests.serve.http.live import base

TEXTS = [
    "def f(x):\n    return x  # é",
    "日本語のテキスト 🙂🙃",
    "a\u200db — “q” ﷽ \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "",
    "  two  blanks  ",
]


def metaspace(folder: Path) -> Any:
    """A tokenizer whose decoder needs neighbours: blanks as ▁, bytes as <0xE2>."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)} | {"▁": 259}
    vocab |= {c: 260 + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz():=#“”")}
    core = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(params=["bytes", "window", "metaspace"])
def detokeniser(request: pytest.FixtureRequest, tmp_path: Path) -> Detokeniser:
    made = Detokeniser(metaspace(tmp_path) if request.param == "metaspace" else base()[1])
    assert made.exact == (request.param != "metaspace")
    if request.param == "window":
        made.stream = lambda prompt=(): _Window(made, prompt)  # type: ignore[method-assign,misc,assignment]
    return made


def test_pieces_join_to_the_whole_and_split_no_character(detokeniser: Detokeniser) -> None:
    for text in TEXTS:
        ids = detokeniser.tokenizer(text, add_special_tokens=False)["input_ids"]
        stream = detokeniser.stream()
        pieces = [stream.push(i) for i in [*ids, detokeniser.tokenizer.eos_token_id]]
        assert "�" not in "".join(pieces)
        assert "".join(pieces) + stream.flush() == text


def test_random_ids_join_to_the_whole(detokeniser: Detokeniser) -> None:
    rng, n = random.Random(3), len(detokeniser.tokenizer)
    # byte fallback shows a whole run of bytes otherwise once one of them is wrong, which no stream can foresee
    first = 0 if detokeniser.exact else 259
    for _ in range(60):
        ids = [rng.randrange(first, n) for _ in range(rng.randint(1, 150))]
        stream = detokeniser.stream()
        text = "".join(stream.push(i) for i in ids) + stream.flush()
        assert text == detokeniser.text(ids)


def test_a_window_continues_a_prompt_without_losing_its_first_blank(tmp_path: Path) -> None:
    d = Detokeniser(metaspace(tmp_path))
    ids = d.tokenizer("ab cd ef", add_special_tokens=False)["input_ids"]
    stream = d.stream(ids[:3])
    assert isinstance(stream, _Window)
    assert "".join(stream.push(i) for i in ids[3:]) + stream.flush() == " cd ef"


def test_bytes_that_are_no_character_do_not_wait_for_ever(tmp_path: Path) -> None:
    d = Detokeniser(metaspace(tmp_path))
    stream = d.stream()
    out = [stream.push(3 + 0xFF) for _ in range(100)]
    assert "".join(out).count("�") > 80
    assert len("".join(out) + stream.flush()) == 100


def test_raw_bytes_of_tokens_join_to_the_text(detokeniser: Detokeniser) -> None:
    for text in TEXTS:
        ids = detokeniser.tokenizer(text, add_special_tokens=False)["input_ids"]
        raw = b"".join(detokeniser.raw(i) for i in ids).decode()
        assert raw.lstrip(" ") == text.lstrip(" ")
    assert detokeniser.raw(detokeniser.tokenizer.eos_token_id).decode() == detokeniser.tokenizer.eos_token
    assert detokeniser.raw(10**6) == b""


def test_stop_strings_against_a_search_of_the_whole() -> None:
    rng = random.Random(4)
    met = 0
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 14)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(0, 3))]
        cutter, out = StopCutter(stops), ""
        for c in text:  # one character at a time: the first stop string that is complete counts
            out += cutter.push(c)
            assert text.startswith(out)
            if cutter.stopped:
                break
        out += cutter.flush()
        ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
        first = min((e for e, _ in ends), default=None)
        starts = [b for e, b in ends if e == first]
        assert cutter.stopped == bool(ends)
        assert out == (text if first is None else text[: min(starts)])
        met += cutter.stopped
    assert 500 < met < 2900


def test_what_may_become_a_stop_string_waits_and_the_rest_does_not() -> None:
    cutter = StopCutter(["END", "\n\n"])
    assert [cutter.push(t) for t in ("one E", "N", "x", "\n", "y\n")] == ["one ", "", "ENx", "", "\ny"]
    assert cutter.flush() == "\n"
