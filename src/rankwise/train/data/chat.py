"""Messages to token ids and labels: the loss is on what the assistant says, and on the token that ends its turn.

The assistant's part is found in the *text* that the chat template makes, as spans of characters, and carried over to
tokens by their offsets: by the template's ``{% generation %}`` markers where it has them, else by rendering each
conversation's beginning and checking that the whole begins with it.  transformers' own mask is not used: in some of its
versions (5.23) a span that begins or ends with a space finds no token under tokenizers that trim offsets, and then it
drops the rest of the conversation from the loss, or adds the user's turns to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.errors import DataError, need

IGNORED = -100
Span = tuple[int, int]
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_ids(fields: Mapping[str, Any], tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a conversation; the ids are those of ``apply_chat_template``, and end with the
    tokenizer's EOS where the template ends the assistant's last turn with no special token of its own.

    Raises:
        DataError: no template, a template that cannot be rendered or whose parts cannot be told, no assistant's turn.
    """
    messages, tools = fields["messages"], fields.get("tools")
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"{where} has no token to learn from: none of its messages is the assistant's.")
    text, spans = _spans(tokenizer, messages, tools, where)
    ids, learnt = _tokens(tokenizer, text, spans, where)
    special = _special(tokenizer)
    eos = tokenizer.eos_token_id
    for i in range(1, len(ids)):  # the end of a turn is learnt also where the markers leave it out
        if learnt[i - 1] and ids[i] == eos and ids[i - 1] != eos:
            learnt[i] = True
    if messages[-1]["role"] == "assistant" and eos is not None and True in learnt:
        last = len(learnt) - 1 - learnt[::-1].index(True)
        if not special & set(ids[last:]):
            ids, learnt = [*ids, eos], [*learnt, True]
    return ids, [i if m else IGNORED for i, m in zip(ids, learnt, strict=True)]


def _spans(tokenizer: Any, messages: Sequence[Any], tools: Any, where: str) -> tuple[str, list[Span]]:
    """The rendered conversation and the assistant's spans of characters in it."""
    try:
        template = tokenizer.get_chat_template(None, tools)
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{where} holds messages, but this tokenizer has no chat template; set tokenizer.chat_template, or use prompt/completion."
        ) from error
    if _MARKER.search(template):
        return _marked(tokenizer, template, messages, tools, where)
    whole = _render(tokenizer, messages, tools, where)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], tools, where, prompt=True) if i else ""
        after = _render(tokenizer, messages[: i + 1], tools, where)
        if not whole.startswith(after) or not after.startswith(before):
            raise DataError(
                f"{where}: this chat template renders the conversation up to message {i + 1} differently from how the whole begins, so the assistant's "
                "part cannot be found; add {% generation %} markers to the template, or give one record for each assistant's turn."
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _marked(tokenizer: Any, template: str, messages: Sequence[Any], tools: Any, where: str) -> tuple[str, list[Span]]:
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise need("transformers", "hf", "A chat template") from error
    known: dict[str, Any] = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    try:
        made: Any = render_jinja_template(
            conversations=[list(messages)], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **known
        )
    except Exception as error:  # a template may raise whatever it likes
        raise _refused(where, error) from error
    return made[0][0], [(int(a), int(b)) for a, b in made[1][0]]


def _render(tokenizer: Any, messages: Sequence[Any], tools: Any, where: str, prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template may raise whatever it likes
        raise _refused(where, error) from error


def _refused(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: the chat template refuses this conversation: {(str(error).splitlines() or ['no reason'])[0]}")


def _tokens(tokenizer: Any, text: str, spans: Sequence[Span], where: str) -> tuple[list[int], list[bool]]:
    """Ids of the text, and whether each token has a character in one of the spans."""
    if not getattr(tokenizer, "is_fast", False):
        return _tokens_by_prefix(tokenizer, text, spans, where)
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt, end = [], 0
    for start, stop in made["offset_mapping"]:
        # trimmed blanks belong to the token behind them; the bytes of one character share its offsets
        start = min(start, end)
        end = max(end, stop)
        learnt.append(any(start < b and stop > a for a, b in spans))
    return list(made["input_ids"]), learnt


def _tokens_by_prefix(tokenizer: Any, text: str, spans: Sequence[Span], where: str) -> tuple[list[int], list[bool]]:
    """The same for tokenizers without offsets: the ids of each beginning must begin the whole's."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    learnt = [False] * len(ids)
    for a, b in spans:
        first, last = (list(tokenizer(text[:n], add_special_tokens=False)["input_ids"]) for n in (a, b))
        if ids[: len(first)] != first or ids[: len(last)] != last:
            raise DataError(
                f"{where}: a token reaches over the end of an assistant's turn, and this tokenizer gives no offsets; use a fast one."
            )
        learnt[len(first) : len(last)] = [True] * (len(last) - len(first))
    return ids, learnt


def _special(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *added}
