"""Files to records: plain text, JSON lines (prompt/completion, alpaca, chat, preference), JSON, a `datasets` folder.

A record that cannot be understood is an error with its file and line; nothing is skipped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rankwise.errors import DataError, need

Kind = Literal["text", "completion", "messages", "preference"]
_TEXT = (".txt", ".md", ".py", ".rst")
_ROLES = ("system", "user", "assistant", "tool", "developer")
_EXPECTED = "text | prompt + completion | instruction (+ input) + output | messages | prompt + chosen + rejected"


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as read: what it is, its fields, and where it came from (``file:line``)."""

    kind: Kind
    fields: Mapping[str, Any]
    where: str


def read(source: str | Path | Iterable[Mapping[str, Any]]) -> list[Record]:
    """Records of a file, a folder (of texts, or saved by `datasets`), or of dicts.

    Raises:
        DataError: no data, not UTF-8 (with the byte), malformed JSON (with the line), keys that are no known layout.
    """
    if not isinstance(source, (str, Path)):
        records = [_record(row, f"record {i + 1}") for i, row in enumerate(source)]
    else:
        records = _from_path(Path(source))
    if not records:
        raise DataError(f"{source if isinstance(source, (str, Path)) else 'The data'} holds no records; give at least one example.")
    kinds = {r.kind for r in records}
    if len(kinds) > 1:
        first = {k: next(r.where for r in records if r.kind == k) for k in sorted(kinds)}
        raise DataError(
            f"The data mixes layouts: {', '.join(f'{k} ({w})' for k, w in first.items())}; split it into one file each."
        )
    return records


def _from_path(path: Path) -> list[Record]:
    if not path.exists():
        raise DataError(f"There is no file or folder {str(path)!r}.")
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _from_datasets(path)
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT and p.is_file())
        if not files:
            raise DataError(f"The folder {path} holds neither text files ({', '.join(_TEXT)}) nor a dataset saved by `datasets`.")
        return [r for p in files for r in _from_path(p)]
    text = _decode(path)
    if path.suffix == ".jsonl":
        return _json_lines(path, text)
    if path.suffix == ".json":
        data = _loads(text, str(path))
        if not isinstance(data, list):
            raise DataError(
                f"{path} holds one {type(data).__name__}; a .json file is a list of records (or use .jsonl, one a line)."
            )
        return [_record(row, f"{path}:[{i}]") for i, row in enumerate(data)]
    if path.suffix in _TEXT:
        return [Record("text", {"text": text}, f"{path}:1")] if text.strip() else []
    raise DataError(f"{path} has the suffix {path.suffix!r}; read are {', '.join(_TEXT)}, .jsonl, .json and folders.")


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}. Re-encode the file."
        ) from error


def _json_lines(path: Path, text: str) -> list[Record]:
    out = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            out.append(_record(_loads(line, f"{path}:{n}"), f"{path}:{n}"))
    return out


def _loads(text: str, where: str) -> Any:
    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in items]
        twice = next((k for k in keys if keys.count(k) > 1), None)
        if twice is not None:
            raise DataError(f"{where} has the key {twice!r} twice; which is meant cannot be known.")
        return dict(items)

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON: {error.msg} at column {error.colno}.") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to be a record.") from error


def _from_datasets(path: Path) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        raise need("datasets", "data", "Reading a saved dataset") from error
    data = datasets.load_from_disk(str(path))
    if hasattr(data, "keys"):
        names = list(data.keys())
        if names != ["train"]:
            raise DataError(f"{path} holds the splits {', '.join(names)}; give the folder of one of them.")
        data = data["train"]
    return [_record(row, f"{path}:[{i}]") for i, row in enumerate(data)]


def _record(row: Any, where: str) -> Record:
    if isinstance(row, Record):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}, not a record; expected {_EXPECTED}.")
    keys = set(row)
    if {"chosen", "rejected"} <= keys:
        return Record("preference", _strings(row, ("chosen", "rejected"), where, also=("prompt",)), where)
    if "messages" in keys or "conversations" in keys:
        return Record("messages", {"messages": _messages(row.get("messages", row.get("conversations")), where)}, where)
    if {"prompt", "completion"} <= keys:
        return Record("completion", _strings(row, ("prompt", "completion"), where), where)
    if {"instruction", "output"} <= keys:
        fields = _strings(row, ("instruction", "output"), where, also=("input",))
        asked = fields["instruction"] + (f"\n\n{fields['input']}" if fields.get("input") else "")
        return Record("completion", {"prompt": asked + "\n\n", "completion": fields["output"]}, where)
    if "text" in keys:
        return Record("text", _strings(row, ("text",), where), where)
    raise DataError(f"{where} has the keys {', '.join(sorted(map(str, keys))) or 'none'}; expected {_EXPECTED}.")


def _strings(row: Mapping[str, Any], names: Sequence[str], where: str, also: Sequence[str] = ()) -> dict[str, Any]:
    out = {}
    for name in (*names, *(n for n in also if row.get(n) is not None)):
        value = row[name]
        if name in ("chosen", "rejected", "prompt") and isinstance(value, list):
            value = _messages(value, where)
        elif not isinstance(value, str):
            raise DataError(f"{where}: {name} is a {type(value).__name__}, not text.")
        elif name in names and name != "prompt" and not value:
            raise DataError(f"{where}: {name} is empty, so there is nothing to learn from it.")
        out[name] = value
    return out


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: messages must be a list of {{role, content}}; it is {type(value).__name__ if not isinstance(value, list) else 'empty'}."
        )
    out = []
    for i, m in enumerate(value):
        role, content = (m.get("role", m.get("from")), m.get("content", m.get("value"))) if isinstance(m, Mapping) else (None, None)
        role = {"human": "user", "gpt": "assistant"}.get(role, role)  # type: ignore[arg-type]
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: message {i + 1} must have a role ({', '.join(_ROLES)}) and text content; it is {str(m)[:80]!r}."
            )
        out.append({"role": role, "content": content})
    return out
