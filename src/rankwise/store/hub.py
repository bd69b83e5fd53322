"""Where an adapter lies: a folder here, or a repository on the Hugging Face hub fetched only when asked for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rankwise.errors import ArtefactError, need

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def local_folder(path: str | os.PathLike[str], names: tuple[str, ...], *, hub: bool, revision: str | None = None) -> Path:
    """The folder ``path``, or the cached snapshot of hub repository ``path`` with just the files ``names``.

    Args:
        path: a folder, or ``owner/name``.
        names: the files wanted.
        hub: whether a repository may be fetched.
        revision: of the repository; None: its main branch.

    Raises:
        ArtefactError: no such folder; or the repository is not in the cache and cannot be fetched.
        MissingExtra: a hub id without huggingface_hub installed.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        return Path(text)
    if not hub or not _ID.fullmatch(text) or os.path.lexists(text) or os.path.isdir(text.partition("/")[0]):
        raise ArtefactError(f"There is no folder {text!r}. Check the path; a hub id has the form 'owner/name'.")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as e:
        raise need("huggingface_hub", "hf", f"Fetching {text!r} from the hub") from e
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(names)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as e:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "on", "yes", "true"}
        why = (
            "HF_HUB_OFFLINE is set and it is not in the cache"
            if offline
            else f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
        )
        raise ArtefactError(f"There is no folder {text!r}, and as a hub repository it could not be fetched: {why}.") from e
