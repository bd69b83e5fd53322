"""The names that were loaded (and taken away) at run time, on disk: whole after any crash, read again at the next start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Literal

import pydantic

from rankwise.errors import ArtefactError, OptionError
from rankwise.store.atomic import replace_file
from rankwise.store.names import check_name


class _NameFile(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    version: Literal[1] = 1
    names: dict[str, str] = {}
    hidden: list[str] = []


#: (name → path, hidden names)
State = tuple[Mapping[str, str], frozenset[str]]


class Registry:
    """``names``: name → path it was loaded from; ``hidden``: names of the folders that were unloaded.  ``path`` None keeps nothing.

    Raises:
        ArtefactError: the file is damaged; it is never taken for an empty one.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self.path = None if path is None else Path(path)
        self.state: State = ({}, frozenset())  # replaced as one, so that whoever reads it sees no half of a change
        if self.path is not None and self.path.exists():
            found = self._read(self.path)
            self.state = found.names, frozenset(found.hidden)

    @property
    def names(self) -> Mapping[str, str]:
        return self.state[0]

    @property
    def hidden(self) -> frozenset[str]:
        return self.state[1]

    def _read(self, path: Path) -> _NameFile:
        try:
            found = _NameFile.model_validate_json(path.read_bytes())
            for name in (*found.names, *found.hidden):
                check_name(name)
        except (OSError, pydantic.ValidationError, OptionError) as error:
            raise ArtefactError(
                f"The registry of loaded adapters, {os.fspath(path)!r}, cannot be read: {str(error).splitlines()[0]}. "
                "Move it away to start with the folders alone."
            ) from error
        return found

    def set(self, names: Mapping[str, str], hidden: Set[str]) -> None:
        """Take these over, on disk first: what could not be written is not so.

        Raises:
            ArtefactError: the system refused; what was stands.
        """
        if self.path is not None:
            text = json.dumps(_NameFile(names=dict(names), hidden=sorted(hidden)).model_dump(), sort_keys=True, indent=1)
            replace_file(self.path, text.encode())
        self.state = dict(names), frozenset(hidden)
