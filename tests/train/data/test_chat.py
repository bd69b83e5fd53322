"""The loss is on what the assistant says and on nothing else, whatever the template and the blanks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest

from rankwise.errors import DataError
from rankwise.train.data import read, tokenize
from tests.train.data.conftest import MARKED, PLAIN, learnt, make


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in zip(itertools.cycle(("user", "assistant")), turns)]}


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("said", ["ok", " ok", "ok ", "ok\n", "\n\nok", "\n", "é ∑ 🙂"])
def test_the_assistants_words_and_its_end_are_learnt_and_no_more(tokenizer: Any, template: str, said: str) -> None:
    tokenizer.chat_template = template
    row = chat("ask one", said, "the cat\n", "dos")
    (e,) = tokenize(read([row]), tokenizer, 256)
    assert learnt(e, tokenizer) == f"{said}<eos>dos<eos>"
    assert e.input_ids == tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("said", [" ok", "ok ", " ok ", " "])
def test_a_blank_at_the_edge_of_a_turn_neither_drops_nor_adds_a_turn(tokenizer: Any, template: str, said: str) -> None:
    """A span that begins or ends with a space has no token of its own edge under tokenizers that trim offsets."""
    tokenizer.chat_template = template
    (e,) = tokenize(read([chat("ask", said, "two", said, "the cat", "dos")]), tokenizer, 256)
    assert learnt(e, tokenizer) == f"{said}<eos>{said}<eos>dos<eos>"
    taught = [i for i, label in enumerate(e.labels) if label != -100]
    assert "ask" not in tokenizer.decode([e.input_ids[i] for i in taught]) and [e.input_ids[i] for i in taught] == [
        e.labels[i] for i in taught
    ]


def test_both_ways_agree(tokenizer: Any) -> None:
    rows = [chat("a b", "c\nd"), chat("x", " y ", "z", "\nw\n")]
    plain, marked = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    plain.chat_template, marked.chat_template = PLAIN, MARKED
    assert tokenize(read(rows), plain, 99) == tokenize(read(rows), marked, 99)


def test_a_template_that_treats_the_last_turn_apart_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and loop.last %}thought {% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert learnt(tokenize(read([chat("a", "b")]), tokenizer, 64)[0], tokenizer) == "thought b<eos>"
    with pytest.raises(DataError, match="up to message 2 differently.*one record for each assistant's turn"):
        tokenize(read([chat("a", "b", "c", "d")]), tokenizer, 64)


def test_eos_is_added_where_the_template_has_no_end(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (e,) = tokenize(read([chat("hi", "yes")]), tokenizer, 99)
    assert learnt(e, tokenizer) == "yes\n<eos>" and e.input_ids.count(tokenizer.eos_token_id) == 1


def test_slow_tokenizers_are_mapped_by_prefixes(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

        def __init__(self, inner: Any):
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, *args: Any, **kw: Any) -> Any:
            return self.inner(*args, **kw)

    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="this tokenizer gives no offsets"):
        tokenize(read([chat("x", "the c", "at")]), Slow(tokenizer), 99)
    tokenizer.chat_template = PLAIN
    row = chat("ask", "\nok ", "two", "dos")
    assert tokenize(read([row]), Slow(tokenizer), 99) == tokenize(read([row]), tokenizer, 99)


@pytest.mark.parametrize(
    ("template", "turns", "says"),
    [
        ("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}", ("a", "b"), r"record 1: .*add \{% generation"),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
            ("a", "b", "c", "d"),
            "up to message 2 differently",
        ),
        ("{{ raise_exception('no system here') }}", ("a", "b"), "refuses this conversation: no system here"),
        ("{% generation %}{% endgeneration %}", ("a", "b"), "renders nothing of what the assistant says"),
        (PLAIN, ("a",), "none of its messages is the assistant's"),
        (None, ("a", "b"), "no chat template"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(tokenizer: Any, template: str | None, turns: tuple[str, ...], says: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=says):
        tokenize(read([chat(*turns)]), tokenizer, 64)


def test_tools_and_other_keys_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }};{% endfor %}{% for m in messages %}{{ m.role }}{{ m.tool_calls or '' }}{{ m.content }}{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": 7}]}
    (e,) = tokenize(read([{"messages": [{"role": "user", "content": "q"}, call], "tools": [{"name": "add"}]}]), tokenizer, 99)
    assert tokenizer.decode(e.input_ids).startswith("add;userqassistant[{'id': 7}]")


def test_completions_begin_as_generation_does_and_end_once() -> None:
    for bos, text in itertools.product((True, False), ("b c", "b c<eos>")):
        t = make(bos=bos)
        (e,) = tokenize(read([{"prompt": "a\n", "completion": text}]), t, 64)
        prompt = t("a\n")["input_ids"]
        assert e.input_ids[: len(prompt)] == prompt and e.labels[: len(prompt)] == [-100] * len(prompt)
        assert learnt(e, t) == "b c<eos>" and e.input_ids.count(t.eos_token_id) == 1


def test_a_tokenizer_that_puts_blanks_before_its_input_puts_none_before_the_completion() -> None:
    t = make(space=True)
    for prompt, answer in (("one\n", "two"), ("the cat", " sat")):
        (e,) = tokenize(read([{"prompt": prompt, "completion": answer}]), t, 64)
        assert t.decode(e.input_ids, skip_special_tokens=True) == prompt + answer
