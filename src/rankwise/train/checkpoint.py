"""Checkpoints that are whole or absent: filled under a hidden name, synced, renamed; only then do older ones go."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankwise.errors import ArtefactError, TrainingError
from rankwise.runtime.read import copy_in
from rankwise.store import atomic
from rankwise.store.native import load_native

if TYPE_CHECKING:
    from rankwise.adapter import Adapter

RUN_STATE = "rankwise_run.pt"  # written last: a checkpoint without it is not whole
UNFINISHED = ".checkpoint-unfinished"  # one run writes to an output folder, so one name is enough


def begin(output_dir: str | Path) -> Path:
    """A fresh hidden folder in ``output_dir`` to fill; what a run that died left there is removed."""
    hidden = Path(output_dir) / UNFINISHED
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    return hidden


def publish(filled: Path, final: Path) -> None:
    """Give ``filled`` the name ``final`` in one step, after all its bytes are on the disk.

    Raises:
        ArtefactError: the system refused; what stood at ``final`` is unharmed.
    """
    try:
        for folder, _, names in os.walk(filled):
            for name in names:
                _sync(os.path.join(folder, name))
            _sync(folder)
        atomic._swap(filled, final, atomic.FILES)
        _sync(final.parent)
    except OSError as error:
        raise ArtefactError(f"The checkpoint {final} could not be written: {error}. Free the disk, or choose another.") from error


def _sync(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_saves(adapter: Adapter, output_dir: str | Path) -> None:
    """Save the adapter and read it back, before the first step: an adapter that cannot be kept is not worth training.

    Raises:
        ArtefactError: it cannot be written, or comes back with other bits.
    """
    hidden = begin(output_dir)
    try:
        adapter.save(hidden)
        back, _ = load_native(hidden)
        for name, t in adapter.tensors().items():
            if name in back and not torch.equal(back[name], t.detach().cpu()):
                raise ArtefactError(f"{name!r} came back from {output_dir} with other bits than it was saved with.")
        for name in adapter.named_parameters():
            if name not in back:
                raise ArtefactError(f"{name!r} is trained, but its adapter's file does not hold it; the run would be lost.")
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def restore_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Copy a checkpoint's tensors into an adapter that is attached; never a second wrap, never a new init."""
    tensors, head = load_native(folder)
    if head["recipe"] != adapter.recipe.to_json():
        raise ArtefactError(
            f"The checkpoint in {folder} was made by another recipe ({head['recipe']}); resume with the recipe it was made by."
        )
    copy_in(adapter._record, tensors)


def whole_checkpoint(output_dir: str | Path, wanted: str | bool) -> str:
    """The checkpoint to resume from: the one named, or the newest that is whole; TrainingError where there is none."""
    if isinstance(wanted, str):
        if not (Path(wanted) / RUN_STATE).exists():
            raise TrainingError(
                f"There is no whole checkpoint in {wanted!r} (it lacks {RUN_STATE}); name another, or leave the name out."
            )
        return wanted
    found = [p for p in Path(output_dir).glob("checkpoint-*") if (p / RUN_STATE).exists() and p.name.rpartition("-")[2].isdigit()]
    if not found:
        raise TrainingError(f"There is no whole checkpoint in {str(output_dir)!r} to resume from; start without resume.")
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2])))
