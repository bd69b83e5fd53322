"""The values of any kind of adapter, by site: attached for a moment to a copy of the base that shares its tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rankwise.adapter import Adapter, rebuild
from rankwise.errors import OptionError
from rankwise.forms.base import AdapterLayer
from rankwise.recipe import Part, Recipe, build
from rankwise.runtime.shared_copy import shared_copy
from rankwise.serve.types import AdapterRefused

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rankwise.delta.base import Delta

_FULL = "it trains the base's own weights (form 'full'), which all rows share; train a 'lora', 'dora' or 'dense' one instead"
_REPLACED = "it puts another weight in the base's place (a base rule 'replace'), which all rows share"


class ValueReader:
    """Attaches adapters to a copy of the base that shares its tensors: the serving model is left alone."""

    def __init__(self, model: nn.Module):
        if "rankwise" in model._modules:
            raise OptionError("Adapters are attached to this model; serving needs the plain base: detach() them first.")
        self.model = shared_copy(model)
        self._lock = threading.Lock()

    def values(self, head: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> dict[str, Delta | AdapterLayer]:
        """What :func:`values_of` gives of the adapter that a native header and its tensors describe; one at a time.

        Raises:
            AdapterRefused: see :func:`values_of`.
        """
        refuse_in_place(head, name)
        recipe = Recipe(**head["recipe"]) if head.get("recipe") else Recipe(parts=[e["part"] for e in head["parts"]])
        with self._lock:
            adapter = rebuild(self.model, recipe, head, tensors, "served", activate=False)
            try:
                return values_of(adapter)
            finally:
                adapter.detach()


def refuse_in_place(head: Mapping[str, Any], name: str) -> None:
    """Refuse what would write into the base's own tensors once attached; before it is."""
    for site, state in head.get("states", {}).items():
        if state.get("replaced"):
            raise AdapterRefused(f"The adapter {name!r} cannot be served at {site!r}: {_REPLACED}.")
    for entry in head["parts"]:
        if "weight" in build("form", Part(**entry["part"]).form).provides:
            raise AdapterRefused(f"The adapter {name!r} cannot be served: {_FULL}.")


def values_of(adapter: Adapter) -> dict[str, Delta | AdapterLayer]:
    """Each site's value against the untouched base, copied; where x decides, the module itself, copied and set to evaluation.

    Sites at the other ends of ties have the same change (transposed where they store the weight the other way).

    Raises:
        AdapterRefused: a wrapped block, weights trained or replaced in place, a tie of a change that x decides.
    """
    record = adapter._record
    known = adapter._registry.known
    out: dict[str, Delta | AdapterLayer] = {}
    for name, module in record.deltas.items():
        spec = module.site.spec
        if spec.mode == "block":
            raise AdapterRefused(f"The adapter changes {name!r}, where it cannot be served: it wraps a whole block.")
        if module.in_place or module.replaced:
            raise AdapterRefused(f"The adapter cannot be served at {name!r}: {_FULL if module.in_place else _REPLACED}.")
        value = adapter.delta(name)
        out[name] = value.clone() if value.constant else _frozen(module)
        for other in record.tied_sites.get(name, ()):
            if not value.constant:
                raise AdapterRefused(
                    f"The adapter cannot be served at {name!r}: x decides its change, and {other!r} shares the weight."
                )
            flipped = (known[other].spec.kind == "embedding") != (spec.kind == "embedding")
            out[other] = value.transposed().clone() if flipped else value.clone()
    return out


def _frozen(module: AdapterLayer) -> AdapterLayer:
    """A copy that training no longer moves; it keeps its site, not a copy of the model."""
    twin = copy.deepcopy(
        module, {id(module.site): module.site, **{id(m.site): m.site for m in module.modules() if isinstance(m, AdapterLayer)}}
    )
    return twin.requires_grad_(False).eval()
