"""The fast executor of a called linear: base and adapters in one autograd function, where nothing forbids it.

It stands beside :func:`rankwise.place.add_changes`, which is its reference; it returns None where it does not apply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from rankwise.place import Place, Tap
    from rankwise.view import View


def fast_forward(module: Any, place: Place, x: Tensor, view: View, acting: list[tuple[Tap, Tensor]]) -> Tensor | None:
    """y of the whole module, or None for the reference path."""
    return None
