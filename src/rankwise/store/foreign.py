"""Which library wrote an adapter: told from its files and its keys, never from its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import ArtefactError
from rankwise.store import tensorfile
from rankwise.store.diffusers import is_diffusers, read_diffusers
from rankwise.store.gguf import read_gguf
from rankwise.store.interchange import find_file
from rankwise.store.kohya import is_kohya, read_kohya
from rankwise.store.peft import config as cfg
from rankwise.store.peft.read import read_peft

if TYPE_CHECKING:
    from rankwise.delta.state import AdapterState
    from rankwise.store.peft.info import PeftInfo


def read_foreign(path: str | os.PathLike[str], specs: Mapping[str, Any], config: Any = None) -> tuple[AdapterState, PeftInfo]:
    """(state, info) of a PEFT folder or hub id, or of a diffusers, kohya or GGUF file (or the folder of one).

    Args:
        specs: every site of the model in module order.
        config: the model's config; GGUF's names and row order depend on it.

    Raises:
        ArtefactError: none of these, or one that does not fit the model.
    """
    p = Path(path)
    if not p.exists() or (p / cfg.CONFIG).exists():
        return read_peft(path, specs)
    file = find_file(p, ".gguf")
    if file is not None:
        return read_gguf(file, specs, config)
    file = find_file(p, ".safetensors")
    if file is None:
        found = sorted(f.name for f in p.iterdir())[:6] if p.is_dir() else [p.name]
        for name in found:
            tensorfile.refuse_pickle(name, b"", os.fspath(p / name if p.is_dir() else p))
        raise ArtefactError(
            f"{p} holds no adapter: expected rankwise.safetensors, adapter_config.json, or one .safetensors or .gguf file of another "
            f"library; found {', '.join(found) or 'nothing'}."
        )
    return _read_tensorfile(file, specs)


def _read_tensorfile(file: Path, specs: Mapping[str, Any]) -> tuple[AdapterState, PeftInfo]:
    tensors, metadata = tensorfile.read_tensors(file.parent, file.name)
    if metadata.get("format") == "rankwise":
        raise ArtefactError(f"{file} is a native file under another name; call it rankwise.safetensors, and give its folder.")
    for key, tensor in tensors.items():
        if not tensor.numel():
            raise ArtefactError(f"{file}: tensor {key!r} is empty; it was not gathered before saving.")
    if is_kohya(tensors):
        return read_kohya(tensors, metadata, specs, os.fspath(file))
    if is_diffusers(tensors):
        return read_diffusers(tensors, metadata, specs, os.fspath(file))
    hint = (
        " PEFT's tensors need their adapter_config.json beside them." if any(k.startswith("base_model.") for k in tensors) else ""
    )
    raise ArtefactError(f"{file} holds no adapter of diffusers or kohya: its keys begin {sorted(tensors)[:2]}.{hint}")
