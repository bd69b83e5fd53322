"""Records to token ids and labels: the loss is on the completion, on the assistant's part, or on all of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rankwise._renamed import renamed_argument
from rankwise.errors import DataError, Option, OptionError
from rankwise.train.data.chat import IGNORED, chat_ids

if TYPE_CHECKING:
    from rankwise.train.data.layouts import Record

#: what becomes of a record longer than a row: as in transformers, True cuts it to ``max_length`` and False cuts nothing (it is
#: refused); "split" makes windows of a text, "auto" splits texts and refuses other records
Truncation = bool | Literal["auto", "split"]
#: values of ``overlong``, as this was called → those of ``truncation``
OVERLONG: dict[Any, Truncation] = {"truncate": True, "error": False}


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids and labels (−100: no loss), of equal length; ``where`` the record came from."""

    input_ids: list[int]
    labels: list[int]
    where: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    def learns(self) -> bool:
        """Whether a label is left once the first, which nothing comes before, is dropped."""
        return any(label != IGNORED for label in self.labels[1:])


def check_truncation(value: Any) -> None:
    """Raise OptionError for what is no :data:`Truncation`."""
    if not (isinstance(value, bool) or value in ("auto", "split")):
        raise OptionError(
            f"truncation is auto, true (cut to max_length), false (refuse longer records) or split (windows of a text); it is {value!r}."
        )


@renamed_argument("overlong", "truncation", OVERLONG)
def tokenize(records: Sequence[Record], tokenizer: Any, max_length: int, *, truncation: Truncation = "auto") -> list[Example]:
    """Examples of at most ``max_length`` tokens, in the order of the records.

    A text begins as ``tokenizer(text)`` begins (with BOS where the tokenizer puts one) and ends with one EOS; so does a
    completion.  A prompt is tokenised as it is when one generates from it.

    Args:
        records: what :func:`~rankwise.train.data.readers.read` gave.
        tokenizer: of transformers.
        max_length: tokens of a row, 2 or more.
        truncation: what becomes of a longer record; as in transformers True cuts it to ``max_length`` and False cuts
            nothing, so it is refused.  "split" makes windows of a text (every token in one of them), "auto" does so with
            texts and refuses others by name, since a cut completion teaches to stop in the middle.

    Raises:
        DataError: a record too long, or without a token to learn (with its file and line).
        OptionError: ``max_length`` below 2, an unknown ``truncation``, or split for what is not a text.
    """
    check_truncation(truncation)
    if max_length < 2:
        raise OptionError(f"max_length is at least 2, for a token is learnt from the one before it; it is {max_length}.")
    out: list[Example] = []
    for record in records:
        example = _example(record, tokenizer)
        if not example.learns():
            raise DataError(f"{record.where} has no token to learn from: {_why(record, example)}.")
        out += [example] if len(example) <= max_length else _shorten(example, record, max_length, truncation)
    return out


def _why(record: Record, example: Example) -> str:
    if record.kind == "text":
        return f"it has {len(example)} token"
    if record.kind == "messages":
        return "the chat template renders nothing of what the assistant says"
    return "the prompt is all of it"


def _shorten(example: Example, record: Record, max_length: int, truncation: Truncation) -> list[Example]:
    how = ("split" if record.kind == "text" else False) if truncation == "auto" else truncation
    raise_it, cut_it = Option("max_length"), Option("truncation", True)
    if how == "split" and record.kind != "text":
        raise OptionError(
            Option("truncation", "split"),
            f" is for texts; a {record.kind} record ({record.where}, {len(example):,} tokens) would be parted "
            "from its prompt. Raise ",
            raise_it,
            ", or give ",
            cut_it,
            ".",
        )
    if how is False:
        raise DataError(
            f"{record.where} has {len(example):,} tokens, more than max_length = {max_length:,}; shorten it, raise ",
            raise_it,
            ", or give ",
            cut_it,
            ".",
        )
    if how is True:
        cut = Example(example.input_ids[:max_length], example.labels[:max_length], record.where)
        if not cut.learns():
            raise DataError(
                f"{record.where} has no token to learn from within max_length = {max_length:,}: its prompt alone is as long; shorten it or raise ",
                raise_it,
                ".",
            )
        return [cut]
    return [Example(example.input_ids[a:b], example.labels[a:b], record.where) for a, b in _windows(len(example), max_length)]


def _windows(n: int, size: int) -> list[tuple[int, int]]:
    """Windows of ``size`` that cover n tokens once; a last one of a single token, which could learn nothing, borrows one."""
    ends = [*range(size, n, size), n]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1 and size > 2:
        ends[-2] -= 1
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _example(record: Record, tokenizer: Any) -> Example:
    if record.kind == "text":
        ids = closed([*opening(tokenizer), *plain(tokenizer, record.fields["text"])], tokenizer)
        return Example(ids, list(ids), record.where)
    if record.kind == "completion":
        prompt, answer = _parts(tokenizer, record.fields["prompt"], record.fields["completion"])
        prompt, answer = [*opening(tokenizer), *prompt], closed(answer, tokenizer)
        return Example(prompt + answer, [IGNORED] * len(prompt) + answer, record.where)
    if record.kind == "messages":
        return Example(*chat_ids(record.fields, tokenizer, record.where), record.where)
    raise DataError(f"{record.where} is a preference pair; train it with ", Option("stage", "dpo"), ".")


def _parts(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Prompt and answer; together where that leaves the prompt's tokens as they are (a tokenizer that puts a blank before
    all it is given would put one between them), else apart, so that the prompt is what one generates from."""
    first, whole = plain(tokenizer, prompt), plain(tokenizer, prompt + answer)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    return first, plain(tokenizer, answer)


def plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text alone, without the tokens that the tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening(tokenizer: Any) -> list[int]:
    """[BOS] where ``tokenizer(text)`` begins with it, else nothing: what is trained begins as what is generated from."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []


def closed(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids with one EOS at their end, also where the text brings its own."""
    eos = tokenizer.eos_token_id
    while eos is not None and ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids if eos is None else [*ids, eos]
