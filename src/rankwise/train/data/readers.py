"""Files to records: plain text, JSON lines, JSON, CSV, Parquet, a folder of texts, a folder saved by `datasets`.

A record that cannot be understood is an error with its file and line; nothing is skipped without a word.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, Option, need
from rankwise.train.data.layouts import Kind, Record, check_format, extras, record_of, same_layout

TEXT = (".txt", ".md", ".py", ".rst")
TABLES = (".jsonl", ".json", ".csv", ".parquet")
#: bytes of a line of JSON beyond which it is taken for a damaged file
LINE_LIMIT = 64 * 2**20


def read(source: str | Path | Iterable[Mapping[str, Any]], fmt: str = "auto", split: str | None = None) -> list[Record]:
    """Records of a file, a folder (of texts, or saved by `datasets`), or of dicts.

    Args:
        source: .txt .md .py .rst (one document each, or a folder of them; hidden files are left out, as ``ls`` does),
            .jsonl, .json (a list, or lines), .csv, .parquet, a saved dataset, or an iterable of dicts.
        fmt: auto tells the layout by its keys; else text, completion, alpaca, messages, sharegpt or preference.
        split: the split of a saved dataset that holds several.

    Warns:
        UserWarning: columns that the layout has no use for, and files of a folder that are left out; once each.

    Raises:
        DataError: no data, not UTF-8 (with the byte), malformed JSON (with the line), keys that are no known layout.
        OptionError: an unknown ``fmt``.
    """
    check_format(fmt)
    if isinstance(source, (str, Path)):
        name, records = str(source), _from_path(Path(source), fmt, split)
    else:
        rows: Any = _split(source, split, "The data") if isinstance(source, Mapping) else source
        if split is not None and rows is source:
            raise DataError(Option("split", split), " was given, but the data has no splits.")
        name, records = "The data", [record_of(row, f"record {i}", fmt) for i, row in enumerate(rows, 1)]
    if not records:
        raise DataError(f"{name} holds no records; give at least one example.")
    same_layout(records, name)
    unused = extras(records)
    if unused:
        shown = ", ".join(f"{k} ({w})" for k, w in sorted(unused.items()))
        warnings.warn(f"{name}: columns that are not used: {shown}.", stacklevel=2)
    return records


def _from_path(path: Path, fmt: str, split: str | None) -> list[Record]:
    if not path.exists():
        raise DataError(f"There is no file or folder {str(path)!r}.")
    saved = path.is_dir() and any((path / n).exists() for n in ("dataset_info.json", "dataset_dict.json"))
    if split is not None and not saved:
        raise DataError(
            Option("split", split), f" was given, but {path} is not a dataset saved by `datasets`, so it has no splits."
        )
    if path.is_dir():
        return _from_datasets(path, fmt, split) if saved else _from_folder(path, fmt)
    suffix = path.suffix.lower()
    if suffix in TABLES:
        return _TABLE[suffix](path, fmt)
    if suffix in TEXT or fmt == "text":
        text = decode(path)
        return [Record("text", {"text": text}, f"{path}:1")] if text.strip() else []
    raise DataError(f"{path} has the suffix {path.suffix!r}; read are {', '.join(TEXT + TABLES)} and folders.")


def _from_folder(path: Path, fmt: str) -> list[Record]:
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(s.startswith(".") for s in p.relative_to(path).parts))
    texts, tables = ([p for p in files if p.suffix.lower() in kinds] for kinds in (TEXT, TABLES))
    chosen = texts if texts or fmt == "text" else tables
    if not chosen:
        raise DataError(
            f"The folder {path} holds neither text files ({', '.join(TEXT)}) nor tables ({', '.join(TABLES)}) nor a dataset saved by `datasets`."
        )
    parts = {p: _from_path(p, fmt, None) for p in chosen}
    out = Counter(p.suffix or p.name for p in files if p not in parts) + Counter({"empty": sum(not r for r in parts.values())})
    if out and any(parts.values()):
        left = ", ".join(f"{n} {suffix}" for suffix, n in sorted(out.items()))
        warnings.warn(f"{path}: read {sum(map(bool, parts.values()))} files; left out {left}.", stacklevel=4)
    return [r for records in parts.values() for r in records]


def decode(path: Path) -> str:
    """The text of a file, without a byte-order mark, lines ended by ``\\n``.  Raises DataError with the offending byte."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        mark = 3 if raw.startswith(b"\xef\xbb\xbf") else 0  # the codec counts from behind the mark
        at = error.start + mark
        line = raw[:at].count(b"\n") + 1
        raise DataError(f"{path}:{line} is not UTF-8: byte {raw[at]:#04x} at offset {at}. Re-encode the file.") from error


def _json_lines(path: Path, fmt: str) -> list[Record]:
    return _lines(path, decode(path), fmt)


def _lines(path: Path, text: str, fmt: str) -> list[Record]:
    out = []
    for n, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand in a JSON string
        if line.strip():
            out.append(record_of(_loads(line, f"{path}:{n}"), f"{path}:{n}", fmt))
    return out


def _json(path: Path, fmt: str) -> list[Record]:
    text = decode(path)
    head = text.lstrip()
    if head.startswith("{") and "\n{" in head and not _whole(head):
        return _lines(path, text, fmt)  # lines of JSON under the other suffix
    data = _loads(text, str(path)) if head else []
    if not isinstance(data, list):
        raise DataError(f"{path} holds one {type(data).__name__}; a .json file is a list of records (or use .jsonl, one a line).")
    return [record_of(row, f"{path}:[{i}]", fmt) for i, row in enumerate(data)]


def _whole(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _loads(text: str, where: str) -> Any:
    def pairs(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) < len(items):
            twice = next(k for k, n in Counter(k for k, _ in items).items() if n > 1)
            raise DataError(f"{where} has the key {twice!r} twice; which is meant cannot be known.")
        return out

    if where[-1].isdigit() and len(text) > LINE_LIMIT:
        raise DataError(f"{where} is a line of {len(text):,} characters, more than {LINE_LIMIT:,}; are its line ends lost?")
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in text else ""
        raise DataError(f"{where} is not valid JSON: {error.msg} at column {error.colno}{line}.") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to be a record.") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{where} is not valid JSON: {error}.") from error


def _csv(path: Path, fmt: str) -> list[Record]:
    reader = csv.reader(io.StringIO(decode(path), newline=""), strict=True)
    before = csv.field_size_limit(LINE_LIMIT)
    out: list[Record] = []
    head: list[str] | None = None
    start = 1
    try:
        for row in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not row:
                continue
            if head is None:
                head = row
                if len(set(head)) < len(head):
                    raise DataError(f"{where}: the header names a column twice: {', '.join(head)}.")
                continue
            if len(row) != len(head):
                raise DataError(f"{where} has {len(row)} cells, but the header names {len(head)} columns.")
            out.append(record_of(dict(zip(head, row, strict=True)), where, fmt))
    except csv.Error as error:
        raise DataError(f"{path}:{start} is not valid CSV: {error}.") from error
    finally:
        csv.field_size_limit(before)
    return out


def _parquet(path: Path, fmt: str) -> list[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise need("pyarrow", "data", "Reading Parquet") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} has the suffix of a Parquet file, but is none that can be read: {str(error).splitlines()[0]}"
        ) from error
    return [record_of(row, f"{path}:[{i}]", fmt) for i, row in enumerate(rows)]


_TABLE: dict[str, Callable[[Path, str], list[Record]]] = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _from_datasets(path: Path, fmt: str, split: str | None) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        raise need("datasets", "data", "Reading a saved dataset") from error
    data: Any = datasets.load_from_disk(str(path))
    if isinstance(data, Mapping):
        data = _split(data, split, str(path))
    elif split is not None:
        raise DataError(Option("split", split), f" was given, but {path} holds one dataset without splits.")
    return [record_of(row, f"{path}:[{i}]", fmt) for i, row in enumerate(data)]


def _split(data: Mapping[str, Any], split: str | None, source: str) -> Any:
    names = list(data)
    if split is None and names == ["train"]:
        return data["train"]
    if split is None or split not in names:
        missing = "" if split is None else f"there is no {split!r}; "
        raise DataError(
            f"{source} holds the splits {', '.join(map(str, names))}; {missing}give ", Option("split", ...), ", one of them."
        )
    return data[split]


__all__ = ["Kind", "Record", "decode", "read"]
