"""A Hugging Face model folder as a table of tensors: shapes from the headers, values memory-mapped when asked for."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ArtefactError
from rankwise.store import tensorfile
from rankwise.store.names import open_inside

HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
MAX_JSON = 64 << 20


class Checkpoint:
    """A model's folder: names, shapes and dtypes of its tensors, read from the headers; values when asked for.

    Raises:
        ArtefactError: no safetensors there, an index that does not fit its shards, a quantised model.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self._json("config.json")
        if self.config.get("quantization_config"):
            raise ArtefactError(f"{folder} is quantised; merge whole models in floating point and quantise the result.")
        self.table: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        self.alias: dict[str, str] = {}  # another name of a tensor → its name in the files
        named = self._index()
        for file in sorted(set(named.values())) if named else [self._single()]:
            for name, (dtype, shape) in _header(self.folder, file).items():
                if named and named.get(name) != file:
                    raise ArtefactError(f"{folder}: {file} holds {name!r}, which the index does not place there.")
                if dtype.itemsize == 1 and dtype.is_floating_point:
                    raise ArtefactError(f"{folder}: {name!r} is stored as {dtype}; merge whole models in 16 bits or more.")
                self.table[name] = (file, shape, dtype)
        if lost := sorted(set(named) - set(self.table)):
            raise ArtefactError(f"{folder}: the index names {lost[0]!r}, which no shard holds ({len(lost)} such).")
        self.tied = bool(self._text().get("tie_word_embeddings", self.config.get("tie_word_embeddings", False)))
        self._drop_tied_head()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.table[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self.table[name][2]

    def read(self, name: str) -> Tensor:
        """The tensor, its pages mapped from the file for as long as it lives."""
        from safetensors import safe_open

        with safe_open(self.folder / self.table[name][0], "pt") as f:
            return f.get_tensor(self.alias.get(name, name))  # type: ignore[no-any-return]

    @property
    def vocabulary(self) -> int | None:
        return self._text().get("vocab_size")

    def first(self, pattern: re.Pattern[str]) -> str | None:
        return next((n for n in self.table if pattern.search(n)), None)

    def _text(self) -> dict[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return tensorfile.strict_json(tensorfile.read_small(self.folder, name, MAX_JSON), str(self.folder / name))
        except FileNotFoundError as e:
            raise ArtefactError(f"{self.folder} has no {name}, so it is no model's folder.") from e

    def _index(self) -> dict[str, str]:
        found = sorted(self.folder.glob("*.safetensors.index.json"))
        if not found:
            return {}
        named = self._json(found[0].name).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
            raise ArtefactError(f"{found[0]} has no weight_map of tensor names to files.")
        return named

    def _single(self) -> str:
        found = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if len(found) != 1:
            for name in sorted(p.name for p in self.folder.iterdir()):
                if not found:
                    tensorfile.refuse_pickle(name if "model" in name else "", b"", str(self.folder / name))
            raise ArtefactError(f"{self.folder} holds {len(found)} safetensors files and no index; one was expected.")
        return found[0]

    def _drop_tied_head(self) -> None:
        """A tied head that is stored beside its embedding is the same tensor: it is merged once."""
        head, embedding = self.first(HEAD), self.first(EMBEDDING)
        if not self.tied or head is None or embedding is None:
            return
        if self.shape(head) != self.shape(embedding) or not torch.equal(self.read(head), self.read(embedding)):
            raise ArtefactError(
                f"{self.folder}: its config ties {head!r} to {embedding!r}, but the two differ; set tie_word_embeddings to false in it."
            )
        del self.table[head]


def _header(folder: Path, file: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    try:
        fd = open_inside(folder, file)
    except FileNotFoundError as e:
        raise ArtefactError(f"{folder}: the index names {file!r}, which is not there.") from e
    try:
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:
            table, _, _ = tensorfile.read_header(view, f"{folder}/{file}")
    except ValueError as e:
        raise ArtefactError(f"{folder}/{file} is empty.") from e
    finally:
        os.close(fd)
    return {n: (dtype, shape) for n, (dtype, shape, _, _) in table.items()}
