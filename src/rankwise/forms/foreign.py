"""Which form takes the tensors of another library's file: told by what the file holds, so that no reader names a form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from rankwise.catalogue import methods
from rankwise.errors import OptionError

if TYPE_CHECKING:
    from rankwise.forms.base import Form


@dataclasses.dataclass(frozen=True)
class ForeignForm:
    """The form that takes what another library's file holds at a site: its name, and {what the file holds: its own tensor}."""

    name: str
    tensors: Mapping[str, str]

    def at(self, site: str, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one site as a native file names them."""
        return {f"{site}::{self.tensors[what]}": t for what, t in held.items()}


_FOREIGN: dict[frozenset[str], ForeignForm] = {}


def takes_foreign(**tensors: str) -> Callable[[type[Form]], type[Form]]:
    """Register a form for what other libraries' files hold at a site: ``A``, ``B``, ``magnitude``, ``difference`` → its own tensor.

    Raises:
        OptionError: another form takes just these already.
    """

    def enter(cls: type[Form]) -> type[Form]:
        taken = _FOREIGN.setdefault(frozenset(tensors), ForeignForm(cls.info.name, tensors))
        if taken.name != cls.info.name:
            raise OptionError(f"The form {taken.name!r} takes {sorted(tensors)} of other libraries' files already.")
        return cls

    return enter


def foreign_form(*held: str) -> ForeignForm:
    """The form that takes exactly what a file of another library holds.

    Raises:
        OptionError: there is none.
    """
    methods("form")  # all are read, and have said what they take
    if frozenset(held) not in _FOREIGN:
        raise OptionError(f"No form takes {', '.join(sorted(held))} of another library's file.")
    return _FOREIGN[frozenset(held)]
