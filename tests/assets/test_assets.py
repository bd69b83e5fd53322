"""What ships: it is small, it has learned, and its tasks are what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rankwise import assets
from rankwise.assets import corpus, digits, tasks


def test_the_base_is_small_and_has_learned() -> None:
    files = list(Path(assets.base_path()).iterdir())
    assert sum(f.stat().st_size for f in files) <= 12e6
    model, tokenizer = assets.load_base()
    assert 4.5e6 < sum(p.numel() for p in model.parameters()) < 6e6 and len(tokenizer) == 4096
    test = [t[:4000] for t in tasks.domains()["asyncio"][1][:2]]
    assert assets.bits_per_byte(model, tokenizer, test) < 0.8 * assets.unigram_bits_per_byte(tokenizer, test)


def test_tokenizer_round_trips_bytes() -> None:
    _, tokenizer = assets.load_base()
    text = "def f(x):\n\treturn 'é€𝄞' + \"\x00\x7f\"\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_bits_per_byte_is_the_naive_sum() -> None:
    model, tokenizer = assets.load_base()
    text = "import os\n\ndef main():\n    pass\n"
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            nats -= model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item()
    assert assets.bits_per_byte(model, tokenizer, [text]) == pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-4)


def test_held_out_files_were_never_trained_on() -> None:
    trained = corpus.pretraining_files()
    assert len(trained) > 300 and not any(corpus.is_held_out(f) for f in trained)
    for train, test in tasks.domains().values():
        assert train and test and not set(train) & set(test)


def test_tasks_are_records() -> None:
    train, test = tasks.docstring_task()
    assert len(train) > 200 and len(test) > 50 and set(train[0]) == {"prompt", "completion"}
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    pairs, _ = tasks.preference_task()
    assert set(pairs[0]) >= {"prompt", "chosen", "rejected"} and pairs[0]["chosen"] != pairs[0]["rejected"]


def test_digits_and_their_shifts() -> None:
    model = assets.load_digits_vit()
    plain = digits.accuracy(model, digits.digits()[1])
    assert plain > 0.9
    for shift in ("rotated", "inverted", "noisy"):
        assert digits.accuracy(model, digits.digits(shift)[1]) < plain - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("shift", ["rotated", "inverted"])
def test_an_adapter_learns_a_shift_of_real_digits(shift: str) -> None:
    import rankwise as rw

    torch.manual_seed(0)
    model = assets.load_digits_vit()
    (x, y), test = digits.digits(shift)
    before = digits.accuracy(model, test)
    adapter = rw.attach(model, {"form": "lora", "r": 4, "targets": ["q_proj", "v_proj", "fc1", "fc2", "projection"]})
    session = rw.Session(model, adapter, lr=1e-2, total_steps=60)
    model.train()
    for n in range(60):
        pick = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(n))
        batch = {"pixel_values": x[pick], "labels": y[pick]}
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
    model.eval()
    assert digits.accuracy(model, test) > before + 0.1
