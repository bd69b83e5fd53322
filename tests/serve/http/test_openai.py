"""The real client against a real server: every answer is what the merged model says alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.http.live import Live, base, greedy, merged, wait, write_adapter

PROMPT = "def add(a, b):\n"


def expected(n: int, *parts: tuple[Path, float], prompt: str = PROMPT) -> str:
    tokenizer = base()[1]
    return tokenizer.decode(greedy(merged(*parts), tokenizer(prompt)["input_ids"], n), skip_special_tokens=True)


def test_completion_of_base_and_adapters_equals_the_merged_models(client: Any, folders: dict[str, Path]) -> None:
    texts = {}
    for model, parts in (("base", []), ("ada", [(folders["ada"], 1.0)]), ("base:bob", [(folders["bob"], 1.0)])):
        got = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
        texts[model] = got.choices[0].text
        assert got.choices[0].text == expected(12, *parts)
        assert got.model == model
    assert len(set(texts.values())) == 3


def test_a_mix_equals_the_weighted_sum(client: Any, folders: dict[str, Path]) -> None:
    mix = [{"name": "ada", "weight": 0.5}, {"name": "bob", "weight": 0.25}]
    got = client.completions.create(model="base", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"adapters": mix})
    assert got.choices[0].text == expected(12, (folders["ada"], 0.5), (folders["bob"], 0.25))


def test_chat_uses_the_template_and_goes_on_to_the_end(client: Any) -> None:
    tokenizer = base()[1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    plain = [messages[0], {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = client.chat.completions.create(model="base", messages=messages, max_completion_tokens=20, temperature=0)
    assert got.choices[0].message.content == tokenizer.decode(greedy(base()[0], ids, 20), skip_special_tokens=True)
    assert got.usage.prompt_tokens == len(ids)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


@pytest.mark.parametrize("model", ["base", "ada"])
def test_a_stream_says_the_same_as_the_whole(client: Any, model: str) -> None:
    ask = dict(model=model, messages=[{"role": "user", "content": "Count: é 日本 🙂"}], max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1])


def test_n_choices_with_a_seed_are_each_the_seed_plus_i(client: Any) -> None:
    ask = dict(model="ada", prompt=PROMPT, max_tokens=8, temperature=1.0)
    three = client.completions.create(**ask, n=3, seed=11)
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert three.usage.completion_tokens == 24
    alone = [client.completions.create(**ask, seed=11 + i).choices[0].text for i in range(3)]
    assert [c.text for c in three.choices] == alone
    assert len(set(alone)) == 3


def test_many_prompts_as_text_and_as_ids(client: Any) -> None:
    tokenizer = base()[1]
    prompts = [PROMPT, "import os\n", "The"]
    got = client.completions.create(model="base", prompt=prompts, max_tokens=6, temperature=0, n=2)
    assert [c.index for c in got.choices] == list(range(6))
    for i, p in enumerate(prompts):
        assert got.choices[2 * i].text == got.choices[2 * i + 1].text == expected(6, prompt=p)
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    same = client.completions.create(model="base", prompt=ids, max_tokens=6, temperature=0)
    assert [c.text for c in same.choices] == [c.text for c in got.choices[::2]]
    assert same.usage.prompt_tokens == sum(len(i) for i in ids)
    one = client.completions.create(model="base", prompt=ids[0], max_tokens=6, temperature=0, echo=True)
    assert one.choices[0].text == tokenizer.decode(ids[0], skip_special_tokens=True) + got.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_before_them_and_free_the_slot(client: Any, live: Live, stream: bool) -> None:
    text = expected(40)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    ask = dict(model="base", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "never-met"])
    if stream:
        chunks = list(client.completions.create(**ask, stream=True))
        got, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        whole = client.completions.create(**ask)
        got, reason = whole.choices[0].text, whole.choices[0].finish_reason
        assert whole.usage.completion_tokens < 40
    assert got == text[: text.index(stop)]
    assert reason == "stop"
    wait(live.empty)


def test_logprobs_of_both_apis_are_the_models_own(client: Any) -> None:
    import torch

    model, tokenizer = base()
    ids = tokenizer(PROMPT)["input_ids"]
    new = greedy(model, ids, 6)
    with torch.no_grad():
        rows = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    got = client.completions.create(model="base", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)
    lp = got.choices[0].logprobs
    assert "".join(lp.tokens) == got.choices[0].text
    assert lp.token_logprobs == pytest.approx([rows[i, t].item() for i, t in enumerate(new)], abs=1e-4)
    assert [len(t) for t in lp.top_logprobs] == [3] * 6
    assert lp.text_offset == [sum(len(t) for t in lp.tokens[:i]) for i in range(6)]
    chat = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Hi"}], max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode("utf-8", "replace") == chat.choices[0].message.content
    for t in content:
        assert t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob
        assert t.logprob == pytest.approx(t.top_logprobs[0].logprob)
    streamed = list(client.completions.create(model="base", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3, stream=True))
    assert [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens] == lp.tokens


def test_bias_and_penalties_reach_the_sampler(client: Any) -> None:
    tokenizer = base()[1]
    token = tokenizer(" return", add_special_tokens=False)["input_ids"][0]
    got = client.completions.create(model="base", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(token): 100})
    assert got.choices[0].text == tokenizer.decode([token] * 4)
    less = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=40, temperature=0, presence_penalty=2.0, frequency_penalty=2.0
    )
    assert less.choices[0].text != expected(40)


def test_unknown_names_are_never_answered_by_the_base(client: Any) -> None:
    for name in ("eve", "base:eve", "Base", "../ada", "ada ", "base:", "a" * 5000):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as caught:
            client.completions.create(model=name, prompt=PROMPT)
        assert caught.value.code == "model_not_found" or len(name) > 512
        assert "bob" not in str(caught.value), "names of other adapters are not told"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="base", prompt=PROMPT, extra_body={"adapters": [{"name": "eve"}]})


def test_models_name_their_parent_and_adapters_their_digest(client: Any, live: Live) -> None:
    listed = {m.id: m.to_dict() for m in client.models.list()}
    assert set(listed) >= {"base", "ada", "bob"}
    assert listed["base"]["parent"] is None
    assert listed["ada"]["parent"] == "base"
    assert listed["ada"]["root"].endswith("ada")
    assert client.models.retrieve("ada").id == "ada"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("eve")


def test_load_reload_unload_at_run_time(client: Any, live: Live, folders: dict[str, Path], tmp_path: Path) -> None:
    def post(path: str, **body: Any) -> Any:
        return client.post(path, body=body, cast_to=object)

    def text(model: str) -> tuple[str, str]:
        got = client.completions.create(model=model, prompt=PROMPT, max_tokens=10, temperature=0)
        return got.choices[0].text, got.system_fingerprint

    cyd = write_adapter(folders["ada"].parent / "deep" / "er", 3)
    made = post("/load_lora_adapter", lora_name="cyd", lora_path="deep/er")
    assert made["digest"] == live.cache.resolve("cyd").digest
    first = text("cyd")
    assert first[0] == expected(10, (cyd, 1.0))
    with pytest.raises(openai.BadRequestError, match="load_inplace"):
        post("/load_lora_adapter", lora_name="cyd", lora_path="ada")
    post("/load_lora_adapter", lora_name="cyd", lora_path=str(folders["bob"]), load_inplace=True)
    again = text("cyd")
    assert again[0] == expected(10, (folders["bob"], 1.0))
    assert again[1] != first[1]
    (folders["ada"].parent / "link").symlink_to(tmp_path)
    for path in (str(tmp_path), "../..", "/etc", "no/such/\0name", "link"):
        with pytest.raises(openai.BadRequestError, match="no folder inside the folders of adapters") as caught:
            post("/load_lora_adapter", lora_name="dan", lora_path=path)
        assert caught.value.code == "adapter_refused"
    for name in ("base", "../x", "a/b", ""):
        with pytest.raises(openai.BadRequestError):
            post("/load_lora_adapter", lora_name=name, lora_path="ada")
    assert post("/unload_lora_adapter", lora_name="cyd")["in_use"] == 0
    for call in (lambda: text("cyd"), lambda: post("/unload_lora_adapter", lora_name="cyd")):
        with pytest.raises(openai.NotFoundError):
            call()


def test_unload_while_a_request_runs(client: Any, live: Live, folders: dict[str, Path]) -> None:
    wait(live.empty)
    client.post("/load_lora_adapter", body={"lora_name": "eli", "lora_path": "bob"}, cast_to=object)
    live.slow.seconds = 0.02
    try:
        stream = client.completions.create(model="eli", prompt=PROMPT, max_tokens=30, temperature=0, stream=True)
        first = next(stream).choices[0].text
        client.post("/unload_lora_adapter", body={"lora_name": "eli"}, cast_to=object)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="eli", prompt=PROMPT)
        text = first + "".join(c.choices[0].text for c in stream)
    finally:
        live.slow.seconds = 0.0
    assert text == expected(30, (folders["bob"], 1.0)), "what runs ends on the weights it began with"
    wait(live.empty)


def test_closing_a_stream_frees_the_slot_within_steps(client: Any, live: Live) -> None:
    wait(live.empty)
    live.slow.seconds = 0.02
    try:
        stream = client.completions.create(model="ada", prompt=PROMPT, max_tokens=400, temperature=0, stream=True)
        for _ in range(3):
            next(iter(stream))
        assert live.engine.stats().running == 1
        before = live.engine.steps
        stream.close()
        wait(live.empty, 5)
        assert live.engine.steps - before <= 10
    finally:
        live.slow.seconds = 0.0


def test_a_client_that_gives_up_waiting_is_cancelled_too(live: Live) -> None:
    wait(live.empty)
    live.slow.seconds = 0.02
    try:
        hasty = openai.OpenAI(api_key="none", base_url=live.url + "/v1", max_retries=0, timeout=0.5)
        with hasty, pytest.raises(openai.APITimeoutError):
            hasty.completions.create(model="ada", prompt=PROMPT, max_tokens=400, temperature=0, n=2)
        wait(live.empty, 5)
    finally:
        live.slow.seconds = 0.0


def test_an_engine_fault_is_a_plain_500_and_others_go_on(client: Any, live: Live) -> None:
    wait(live.empty)
    live.slow.fault = RuntimeError("secret /path/of/weights")
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="ada", prompt=PROMPT, max_tokens=4)
        assert "secret" not in json.dumps(caught.value.body)
        with pytest.raises(openai.InternalServerError):
            list(client.completions.create(model="ada", prompt=PROMPT, max_tokens=4, stream=True))
    finally:
        live.slow.fault = None
    assert client.completions.create(model="ada", prompt=PROMPT, max_tokens=4).choices[0].text
    wait(live.empty)


def test_a_defect_is_a_500_that_tells_nothing(client: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise RuntimeError("secret /path/of/weights")

    monkeypatch.setattr(live.cache, "resolve", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="ada", prompt=PROMPT, max_tokens=4)
    assert "secret" not in str(caught.value)
    assert caught.value.code == "internal_error"


def test_no_memory_for_a_request_is_a_429_and_for_an_adapter_too(client: Any, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise MemoryError

    for owner, name in ((live.cache, "resolve"), (live.cache.source, "fetch")):
        live.cache.relieve()
        with monkeypatch.context() as m:
            m.setattr(owner, name, none)
            with pytest.raises(openai.RateLimitError, match="no memory left") as caught:
                client.completions.create(model="ada", prompt=PROMPT, max_tokens=4, temperature=0)
            assert int(caught.value.response.headers["retry-after"]) == 5
    got = client.completions.create(model="ada", prompt=PROMPT, max_tokens=4, temperature=0)
    assert got.choices[0].text == expected(4, (live.root / "ada", 1.0))


def test_a_fault_outside_the_forward_ends_requests_and_not_the_engine(client: Any, live: Live) -> None:
    plain = live.engine.scheduler.policy
    live.engine.scheduler.policy = None  # type: ignore[assignment]
    try:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="ada", prompt=PROMPT, max_tokens=4)
        assert not live.engine.stats().healthy
    finally:
        live.engine.scheduler.policy = plain
    assert client.completions.create(model="ada", prompt=PROMPT, max_tokens=4).choices[0].text
    assert live.engine.stats().healthy
    wait(live.empty)
