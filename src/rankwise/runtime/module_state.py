"""What one adapted module holds beside its own tensors: its adapters, originals of moved weights, and how its product runs.

Plain objects, not modules, so the model's own tree and state dict stay as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rankwise.forms.packed import Product
from rankwise.runtime.view import Owner, View, current

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer
    from rankwise.forms.input_group import InputGroup
    from rankwise.sites.site import Site


class AdapterBranch:
    """One adapter's layer at one site of a module.

    Args:
        name: the adapter's.
        site: where.
        form: the layer that holds the adapter's tensors; at tied sites one layer serves both ends.
        transposed: at the other end of a tie whose storage is the transpose (embedding and output head).
    """

    __slots__ = ("form", "fusable", "name", "site", "transposed", "was_called")

    def __init__(self, name: str, site: Site, form: AdapterLayer, transposed: bool = False):
        self.name = name
        self.site = site
        self.form = form
        self.transposed = transposed
        self.was_called = form.in_place
        self.fusable = (
            not transposed and site.spec.rows is None and form.fused_factors() is not None
        )  # else never for the fast path

    def change(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """Δy in this site's rows of the module's output."""
        if self.transposed:
            return self.form.dropped(self.form.total_delta().transposed().scaled(strength), self.site, x, y)
        return self.form(x, y, strength)


class FastPath:
    """What the fast path keeps at a module: how its product runs, and the group of sites that the same tensor feeds."""

    def __init__(self, base: type[nn.Module]):
        self.plain = base.forward is nn.Linear.forward
        self.product = Product()
        self.group: InputGroup | None = None
        self.members: list[AdaptedModuleState] = []


class AdaptedModuleState:
    """What an adapted module knows: its branches by adapter name, and original tensors to act where an owner does not.

    A plain object, not a module, so the model's own tree and state dict stay as they were.
    """

    def __init__(self, registry: Owner, base: type[nn.Module]):
        self.registry = registry
        self.base = base
        self.branches: dict[str, list[AdapterBranch]] = {}
        self.originals: dict[str, dict[str, nn.Parameter]] = {}  # adapter → parameter name → the base's own tensor
        self.fast = FastPath(base)

    def acting(self) -> tuple[View, list[tuple[AdapterBranch, Tensor]]]:
        """The current view, and [(branch, strength)] of the adapters that act in it."""
        view = current(self.registry)
        found = [
            (branch, s) for name, s in view.strengths.items() for branch in self.branches.get(name, ()) if not branch.form.in_place
        ]
        return view, found

    @contextlib.contextmanager
    def base_tensors(self, module: nn.Module, view: View) -> Iterator[None]:
        """Put the base's own tensors in place while an adapter that moved them is out of the view."""
        away = [o for name, o in self.originals.items() if name not in view.strengths]
        swapped = {p: t for o in away for p, t in o.items()}
        moved = {p: module._parameters[p] for p in swapped}
        module._parameters.update(swapped)
        try:
            yield
        finally:
            module._parameters.update(moved)

    def must_restore(self, view: View) -> bool:
        return bool(self.originals) and any(name not in view.strengths for name in self.originals)
