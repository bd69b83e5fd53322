"""A body's fields as what the engine samples by: defaults, and every bound at its edge."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.serve.http.errors import Refusal
from rankwise.serve.http.sampling import COMPLETION_TOKENS, SEEDS, choices, max_tokens, sampling, stops
from rankwise.serve.http.schemas import Chat, Completion
from rankwise.serve.http.settings import Settings

SETTINGS = Settings(model="base", context=100, vocabulary=64, choices=4, stops=2, stop_length=5)


def completion(**fields: Any) -> Completion:
    return Completion(model="base", prompt="x", **fields)


def chat(**fields: Any) -> Chat:
    return Chat(model="base", messages=[{"role": "user", "content": "x"}], **fields)


def test_defaults_are_openais() -> None:
    s = sampling(completion(), 10, 0, SETTINGS)
    assert (s.max_tokens, s.temperature, s.top_p, s.top_k, s.seed, s.logprobs) == (COMPLETION_TOKENS, 1.0, 1.0, 0, None, None)
    assert sampling(chat(), 10, 0, SETTINGS).max_tokens == 90, "a chat goes on to the end of the context"
    assert sampling(completion(temperature=0), 10, 0, SETTINGS).temperature == 0, "0 is a value, and no default"


def test_the_context_is_full_to_the_last_token() -> None:
    assert max_tokens(completion(max_tokens=90), 10, SETTINGS) == 90
    for body, prompt, field in (
        (completion(max_tokens=91), 10, "max_tokens"),
        (completion(), 100, "prompt"),
        (chat(), 100, "messages"),
    ):
        with pytest.raises(Refusal, match=r"The context is 100 tokens") as said:
            max_tokens(body, prompt, SETTINGS)
        assert (said.value.param, said.value.code) == (field, "context_length_exceeded")


def test_a_chat_says_its_length_once() -> None:
    assert (
        max_tokens(chat(max_completion_tokens=7), 10, SETTINGS)
        == max_tokens(chat(max_tokens=7, max_completion_tokens=7), 10, SETTINGS)
        == 7
    )
    with pytest.raises(Refusal, match="here they differ"):
        max_tokens(chat(max_tokens=7, max_completion_tokens=8), 10, SETTINGS)


def test_each_choice_has_its_own_seed() -> None:
    assert [sampling(completion(seed=5), 1, i, SETTINGS).seed for i in range(3)] == [5, 6, 7]
    assert sampling(completion(seed=-SEEDS), 1, 0, SETTINGS).seed == -SEEDS
    for seed in (-SEEDS - 1, SEEDS - SETTINGS.choices):
        with pytest.raises(Refusal, match="whole number of 64 bits"):
            sampling(completion(seed=seed), 1, 0, SETTINGS)


def test_choices_and_stops_have_their_limits() -> None:
    assert (
        choices(completion(), SETTINGS) == 1
        and choices(completion(n=4), SETTINGS) == 4
        and choices(completion(n=2, best_of=2), SETTINGS) == 2
    )
    for fields, words in (({"n": 5}, "from 1 to 4 choices"), ({"n": 0}, "n = 0"), ({"n": 2, "best_of": 3}, "not ranked")):
        with pytest.raises(Refusal, match=words):
            choices(completion(**fields), SETTINGS)
    assert stops(completion(stop="abc"), SETTINGS) == ["abc"] and stops(completion(), SETTINGS) == []
    for stop, words in ((["a", "b", "c"], "has 3 strings"), ([""], "has 0 characters"), (["abcdef"], "has 6 characters")):
        with pytest.raises(Refusal, match=words):
            stops(completion(stop=stop), SETTINGS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"logit_bias": {"64": 1}}, "token id 64; ids go from 0 to 63"), ({"logit_bias": {"-1": 1}}, "keys are token ids"),
        ({"logit_bias": {"²": 1}}, "keys are token ids"), ({"logit_bias": {"1": 101}}, "from -100 to 100"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "at most 1024"), ({"stop_token_ids": [64]}, "token id 64"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        sampling(completion(**fields), 1, 0, SETTINGS)


def test_bias_and_logprobs_are_passed_on() -> None:
    s = sampling(completion(logit_bias={"3": -100, "63": 2.5}, logprobs=2, stop_token_ids=[7]), 1, 0, SETTINGS)
    assert s.logit_bias == {3: -100.0, 63: 2.5} and s.logprobs == 2 and s.stop_ids == (7,)
    assert sampling(chat(logprobs=True), 1, 0, SETTINGS).logprobs == 0 and sampling(chat(), 1, 0, SETTINGS).logprobs is None
    with pytest.raises(Refusal, match="says nothing without logprobs"):
        sampling(chat(top_logprobs=2), 1, 0, SETTINGS)
