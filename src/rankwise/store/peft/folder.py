"""A PEFT folder's two files, config and tensors, read as one version and held against our export's stamp."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rankwise.errors import ArtefactError
from rankwise.store import tensorfile
from rankwise.store.names import open_folder
from rankwise.store.peft import config as cfg

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def read_pair(folder: os.PathLike[str], allow_nonfinite: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one version of the folder: both are opened through one descriptor."""
    where = os.fspath(folder)
    for attempt in range(20):
        at = open_folder(folder)
        try:
            raw = tensorfile.read_small(folder, cfg.CONFIG, cfg.MAX_CONFIG, at=at)
            tensors, metadata = tensorfile.read_tensors(folder, cfg.WEIGHTS, allow_nonfinite=allow_nonfinite, at=at)
            break
        except FileNotFoundError as e:
            if attempt == 19 or not _replaced(folder, at):
                raise ArtefactError(_missing(folder)) from e
        finally:
            os.close(at)
    config = cfg.parse_config(raw, f"{where}/{cfg.CONFIG}")
    check_stamp(raw, tensors, metadata, where)
    return config, tensors


def check_stamp(raw: bytes, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> None:
    """Refuse tensors that our export stamped with a config that is not this one.

    Args:
        raw: the config file's bytes.
        tensors: of the weights file.
        metadata: of the weights file; without a stamp there is nothing to check.
        where: for the message.

    Raises:
        ArtefactError: the two do not belong together.
    """
    stamp = metadata.get("rankwise_sha256")
    if stamp is not None and stamp != tensorfile.digest(tensors, cfg.config_salt(tensorfile.strict_json(raw, where))):
        raise ArtefactError(
            f"{where}: {cfg.CONFIG} and {cfg.WEIGHTS} do not belong together, or one was changed after it was written. "
            "Export the adapter again."
        )


def _replaced(folder: os.PathLike[str], at: int) -> bool:
    """Whether the folder's name now leads elsewhere than the descriptor: a new version came while we read."""
    try:
        return os.stat(folder).st_ino != os.fstat(at).st_ino
    except FileNotFoundError:
        return True


def _missing(folder: os.PathLike[str]) -> str:
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    pickled = [n for n in names if n.startswith("adapter_model.") and n != cfg.WEIGHTS]
    if pickled:
        return f"{os.fspath(folder)!r} holds its tensors as {pickled[0]!r}, which can run code when it is opened; save it again in PEFT as safetensors."
    return f"{os.fspath(folder)!r} is no PEFT adapter: it needs {cfg.CONFIG} and {cfg.WEIGHTS}, and holds {', '.join(names[:6]) or 'nothing'}."
