"""The layouts a record may have, told by its keys: text, completion, alpaca, messages, preference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rankwise.errors import DataError, Option, OptionError

Kind = Literal["text", "completion", "messages", "preference"]
_ROLES = ("system", "user", "assistant", "tool", "developer")
_ROLE_OF = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}
EXPECTED = "text | prompt + completion | instruction (+ input) + output | messages | (prompt +) chosen + rejected"
#: layout → (kind, keys it must have, keys it may have)
LAYOUTS: dict[str, tuple[Kind, frozenset[str], frozenset[str]]] = {
    "text": ("text", frozenset({"text"}), frozenset()),
    "completion": ("completion", frozenset({"prompt", "completion"}), frozenset()),
    "alpaca": ("completion", frozenset({"instruction", "output"}), frozenset({"input"})),
    "messages": ("messages", frozenset({"messages"}), frozenset({"tools"})),
    "sharegpt": ("messages", frozenset({"conversations"}), frozenset({"tools"})),
    "preference": ("preference", frozenset({"chosen", "rejected"}), frozenset({"prompt"})),
}
FORMATS = ("auto", *LAYOUTS)
#: columns that change what an example means; they are refused where the layout has no place for them
_MEANINGFUL = ("system", "history", "weight", "label", "images", "tools")


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as read.

    Args:
        kind: text, completion, messages or preference.
        fields: of that kind.
        where: it came from (``file:line``).
        extra: columns that the layout has no use for (ids, sources); the reader warns of them.
    """

    kind: Kind
    fields: Mapping[str, Any]
    where: str
    extra: tuple[str, ...] = ()


def check_format(fmt: str) -> None:
    """Refuse an unknown ``fmt``.  Raises OptionError."""
    if fmt not in FORMATS:
        raise OptionError(f"fmt is one of {', '.join(FORMATS)}; it is {fmt!r}.")


def record_of(row: Any, where: str, fmt: str = "auto") -> Record:
    """The record of one row of data.

    Raises:
        DataError: keys of no layout, of more than one, or values of the wrong type (with ``where``).
    """
    if isinstance(row, Record):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}, not a record; expected {EXPECTED}.")
    # tables made of several layouts have a column for each; those that a row lacks are None
    row = {k: v for k, v in row.items() if v is not None}
    layout = _layout(row, where, fmt)
    kind, must, may = LAYOUTS[layout]
    extra = tuple(sorted(str(k) for k in set(row) - must - may))
    odd = [k for k in extra if k in _MEANINGFUL and row[k] not in ("", [], {})]
    if odd:
        raise DataError(
            f"{where}: a {layout} record has no place for {', '.join(odd)}, which would change its meaning; use messages, or drop the column."
        )
    return Record(kind, _FIELDS[layout](row, where), where, extra)


def same_layout(records: Sequence[Record], source: str) -> None:
    """Refuse data whose records are of different kinds, or whose pairs differ in form.  Raises DataError."""
    first: dict[str, str] = {}
    for r in records:
        form = r.kind
        if r.kind == "preference":
            chat = "messages" if isinstance(r.fields["chosen"], list) else "text"
            form = f"preference of {chat}{'' if 'prompt' in r.fields else ' without a prompt'}"  # type: ignore[assignment]
        first.setdefault(form, r.where)
    if len(first) > 1:
        seen = ", ".join(f"{k} ({w})" for k, w in sorted(first.items()))
        raise DataError(f"{source} mixes layouts: {seen}; split it into one file each.")


def _layout(row: Mapping[str, Any], where: str, fmt: str) -> str:
    keys = set(row)
    seen = ", ".join(sorted(map(str, keys))) or "none"
    if fmt != "auto":
        missing = sorted(LAYOUTS[fmt][1] - keys)
        if missing:
            raise DataError(f"{where} has the keys {seen}, but ", Option("fmt", fmt), f" needs {', '.join(missing)} too.")
        return fmt
    fits = [name for name, (_, must, _) in LAYOUTS.items() if must <= keys]
    if not fits:
        raise DataError(f"{where} has the keys {seen}; expected {EXPECTED}.")
    if len(fits) > 1:
        raise DataError(
            f"{where} has the keys {seen}, which fit {' and '.join(fits)}; keep the columns of one, or give ",
            Option("fmt", fits[0]),
            ".",
        )
    return fits[0]


def _text(row: Mapping[str, Any], name: str, where: str, empty: bool = False) -> str:
    value = row[name]
    if isinstance(value, list):
        raise DataError(f"{where}: {name} is a list, not text; a chat goes in messages.")
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is a {type(value).__name__}, not text.")
    if not empty and not value:
        raise DataError(f"{where}: {name} is empty, so there is nothing to learn from it.")
    return unicode_text(value, f"{where}: {name}")


def unicode_text(value: str, where: str) -> str:
    """``value``, refused where it holds half a surrogate pair (JSON may), which no tokenizer can encode."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds the lone surrogate {value[error.start]!a} at character {error.start}; it is not text."
        ) from error
    return value


def _plain(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"text": _text(row, "text", where)}


def _completion(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"prompt": _text(row, "prompt", where, empty=True), "completion": _text(row, "completion", where)}


def _alpaca(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    more = _text(row, "input", where, empty=True) if "input" in row else ""
    asked = _text(row, "instruction", where) + (f"\n\n{more}" if more else "")
    return {"prompt": asked + "\n\n", "completion": _text(row, "output", where)}


def _chat(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    out = {"messages": messages_of(row.get("messages", row.get("conversations")), where)}
    return out | ({"tools": row["tools"]} if row.get("tools") else {})


def _preference(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    chats = [n for n in names if isinstance(row[n], list)]
    if chats and len(chats) < len(names):
        raise DataError(
            f"{where}: {', '.join(chats)} hold messages, but the others text; give all of {', '.join(names)} as one or the other."
        )
    if chats:
        return {n: messages_of(row[n], f"{where}: {n}") for n in names}
    return {n: _text(row, n, where, empty=n == "prompt") for n in names}


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Messages as {role, content, …}, from either spelling (role/content, from/value).  Raises DataError."""
    if not isinstance(value, list) or not value:
        what = "empty" if isinstance(value, list) else type(value).__name__
        raise DataError(f"{where}: messages must be a list of {{role, content}}; it is {what}.")
    return [_message(m, i, where) for i, m in enumerate(value, 1)]


def _message(m: Any, i: int, where: str) -> dict[str, Any]:
    given: dict[str, Any] = {k: v for k, v in m.items() if v is not None} if isinstance(m, Mapping) else {}
    role, content = given.pop("role", given.pop("from", None)), given.pop("content", given.pop("value", None))
    role = _ROLE_OF.get(role, role) if isinstance(role, str) else role
    if content is None and given.get("tool_calls"):
        content = ""  # a turn that only calls a tool says nothing
    if isinstance(content, list) and content and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    if role not in _ROLES or not isinstance(content, str):
        raise DataError(f"{where}: message {i} must have a role ({', '.join(_ROLES)}) and text content; it is {str(m)[:80]!r}.")
    return {"role": role, "content": unicode_text(content, f"{where}: message {i}"), **given}


_FIELDS = {
    "text": _plain,
    "completion": _completion,
    "alpaca": _alpaca,
    "messages": _chat,
    "sharegpt": _chat,
    "preference": _preference,
}


def extras(records: Iterable[Record]) -> dict[str, str]:
    """Columns that no layout uses → the first place they were seen."""
    out: dict[str, str] = {}
    for r in records:
        for name in r.extra:
            out.setdefault(name, r.where)
    return out
