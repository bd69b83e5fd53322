"""Records to token ids and labels: the loss is on the completion, on the assistant's part, or on all of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from rankwise.errors import DataError
from rankwise.train.data.readers import Record

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids and labels (−100: no loss), of equal length; ``where`` the record came from."""

    input_ids: list[int]
    labels: list[int]
    where: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


def tokenize(
    records: Sequence[Record], tokenizer: Any, max_length: int, *, overlong: Literal["auto", "error", "truncate", "split"] = "auto"
) -> list[Example]:
    """Examples of at most ``max_length`` tokens.

    ``overlong``: what becomes of a longer record; auto splits texts into windows and refuses others by name, since a cut
    completion teaches to stop in the middle.

    Raises:
        DataError: a record too long, or without a token to learn (with its file and line).
    """
    out: list[Example] = []
    for record in records:
        example = _example(record, tokenizer)
        if all(label == IGNORED for label in example.labels):
            raise DataError(f"{record.where} has no token to learn from: the prompt is all of it.")
        if len(example) <= max_length:
            out.append(example)
            continue
        how = ("split" if record.kind == "text" else "error") if overlong == "auto" else overlong
        if how == "error":
            raise DataError(
                f"{record.where} has {len(example):,} tokens, more than max_length = {max_length:,}; shorten it, raise max_length, or give overlong='truncate'."
            )
        step = max_length
        starts = range(0, len(example), step) if how == "split" else [0]
        parts = [Example(example.input_ids[i : i + step], example.labels[i : i + step], record.where) for i in starts]
        out += [p for p in parts if len(p) > 1 and any(label != IGNORED for label in p.labels)]
    return out


def _example(record: Record, tokenizer: Any) -> Example:
    if record.kind == "text":
        ids = _bos(tokenizer) + _plain(tokenizer, record.fields["text"]) + _eos(tokenizer)
        return Example(ids, list(ids), record.where)
    if record.kind == "completion":
        prompt = _bos(tokenizer) + _plain(tokenizer, record.fields["prompt"])
        answer = _plain(tokenizer, record.fields["completion"]) + _eos(tokenizer)
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer, record.where)
    if record.kind == "messages":
        return _chat(record, tokenizer)
    raise DataError(f"{record.where} is a preference pair; train it with stage='dpo'.")


def _chat(record: Record, tokenizer: Any) -> Example:
    """Loss on what the assistant says, found by the template's own markers or by rendering prefixes and comparing."""
    messages = record.fields["messages"]
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            f"{record.where} holds messages, but this tokenizer has no chat template; set tokenizer.chat_template, or use prompt/completion."
        )
    if "{% generation" in template or "{%- generation" in template:
        made = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = made["input_ids"], made["assistant_masks"]
        return Example(list(ids), [i if m else IGNORED for i, m in zip(ids, mask, strict=True)], record.where)
    ids = _render(tokenizer, messages, False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _render(tokenizer, messages[:i], True), _render(tokenizer, messages[: i + 1], False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"{record.where}: this chat template renders a conversation's beginning differently from the whole, so the assistant's part cannot be "
                "found; add {% generation %} markers to the template."
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return Example(ids, labels, record.where)


def _render(tokenizer: Any, messages: Sequence[Any], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    return _plain(tokenizer, text)


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _bos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _eos(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
