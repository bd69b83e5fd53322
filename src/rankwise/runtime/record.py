"""What is known of one attached adapter: its recipe, its modules, and its tensors by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer, Form, Plan
    from rankwise.recipe import Part, Recipe
    from rankwise.sites.site import Site


class AnyKeyModuleDict(nn.Module):
    """A ModuleDict that takes any key: a dot, a slash or a method's name in a key is no harm."""

    def put(self, name: str, module: nn.Module) -> None:
        self._modules[name.replace(".", "/")] = module

    def get(self, name: str) -> nn.Module:
        found = self._modules[name.replace(".", "/")]
        assert found is not None
        return found

    def take(self, name: str) -> None:
        del self._modules[name.replace(".", "/")]


class AdapterModule(nn.Module):
    """One adapter's tensors: a layer at each site, and tensors that several sites share."""

    def __init__(self) -> None:
        super().__init__()
        self.sites = AnyKeyModuleDict()
        self.banks = AnyKeyModuleDict()


@dataclasses.dataclass
class InstalledPart:
    """One part of a recipe as it was built.

    Attributes:
        part: of the recipe.
        form: its form.
        plan: ranks, scales and shared tensors.
        sites: name → site.
    """

    part: Part
    form: Form
    plan: Plan
    sites: dict[str, Site]


@dataclasses.dataclass
class AdapterRecord:
    """What the registry knows of one adapter.

    Attributes:
        name: of the adapter, free text.
        slot: the registry's child that holds its tensors.
        recipe: what it was made from.
        parts: the recipe's parts as they were built.
        deltas: site → its layer.
        tied_sites: site → names of the sites at the other ends of its tie.
        home: the module that holds every tensor once.
        merged: whether it is folded into the base weights.
        checked: whether a forward has shown that every layer takes part.
    """

    name: str
    slot: str
    recipe: Recipe
    parts: list[InstalledPart]
    deltas: dict[str, AdapterLayer]
    tied_sites: dict[str, list[str]]
    home: AdapterModule
    merged: bool = False
    checked: bool = False

    def site_of(self) -> dict[str, Site]:
        return {n: s for p in self.parts for n, s in p.sites.items()}

    def tensors(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """Every tensor of the adapter by name, ``<site>::<tensor>`` or ``bank:<key>::<tensor>``; ``buffers`` includes frozen ones."""
        groups: list[tuple[str, nn.Module]] = [(n, d) for n, d in self.deltas.items()]
        groups += [(f"bank:{k}", b) for k, b in self.home.banks._modules.items() if b is not None]
        return {f"{key}::{name}": t for key, module in groups for name, t in _tensors_of(module, buffers)}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The tensors that training moves; a base weight in training stands under its own path."""
        return {key: t for key, t in self.tensors(buffers=False).items() if t.requires_grad}  # type: ignore[misc]

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file of the adapter holds: its tensors, and weights that stand in W's place."""
        extra = {f"{n}::{k}": t for n, d in self.deltas.items() for k, t in d.file_tensors().items()}
        return {**self.tensors(), **extra}


def _tensors_of(module: nn.Module, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    extra = getattr(module, "base_parameters", None)  # the form `full` trains the base's own
    if extra is not None:
        yield from extra().items()
    if buffers:
        yield from module.named_buffers()
