"""patch: a given ΔW of any kind, added to W's output and never trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.delta.base import Delta, rebuild
from rankwise.errors import ArtefactError, OptionError
from rankwise.forms.base import AdapterLayer, Form, Plan

if TYPE_CHECKING:
    from rankwise.sites.site import Site

PREFIX = "v_"


def key(field: str) -> str:
    """The name of the buffer for a ΔW's tensor ``field`` (a sum's are called ``0.A``, and a buffer's name has no dot)."""
    return PREFIX + field.replace(".", "/")


class FrozenDelta(AdapterLayer):
    """A given ΔW; its tensors are buffers, so they move, save and copy with the model and no optimiser sees them."""

    def __init__(self, site: Site):
        super().__init__(site)
        self._value: Delta | None = None

    def hold(self, value: Delta) -> None:
        """Set ΔW to ``value``, detached and on the site's device.

        Raises:
            OptionError: its shape is not the weight's, or it depends on x.
        """
        if value.kind == "gated" or not value.constant:
            raise OptionError(
                f"The change at {self.site.name!r} depends on x (a router decides), so it is no patch; collapse() it."
            )
        value = value._sized(torch.Size(self.site.spec.shape))
        if tuple(value.shape) != self.site.spec.shape:
            raise OptionError(f"A patch of {tuple(value.shape)} does not fit {self.site.name!r}, which is {self.site.spec.shape}.")
        self._value = value.detach().to(device=self.site.device)
        for field, t in self._value.tensors().items():
            self.register_buffer(key(field), t)

    def delta(self) -> Delta:
        """The ΔW; rebuilt only where the buffers have been exchanged (a cast, a move, a functional call)."""
        value = self._value
        assert value is not None
        held = {f: self._buffers[key(f)] for f in value.tensors()}
        if any(held[f] is not t for f, t in value.tensors().items()):
            value = rebuild(value.kind, held, value.meta())  # type: ignore[arg-type]
            if not any(t is not None and t.requires_grad for t in held.values()):
                self._value = value
        return value

    def file_state(self) -> dict[str, Any]:
        assert self._value is not None
        return {"kind": self._value.kind, "meta": self._value.meta()}

    def restore_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
        start = f"{name}::{PREFIX}"
        mine = {k.removeprefix(start).replace("/", "."): t.clone() for k, t in tensors.items() if k.startswith(start)}
        try:
            self.hold(rebuild(state["kind"], mine, state["meta"]))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ArtefactError(f"The patch at {name!r} cannot be rebuilt from its file: {error}.") from error


@register("form", "patch", title="patch: any finished change of weight, on and off")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch(Form):
    """y += Δ·x with Δ: out×in a constant value of any kind (dense, entries, rows, columns, low-rank, sums, …); nothing is trained.

    For merged, extracted and sparse ΔW's: attached by ``rankwise.merge.attach_state``, weighted by a view's strength, summed
    with other adapters, and removed bit for bit, since W is never written.  Where a forward reads the parameter itself (norms,
    biases, expert stacks) it reads W + strength·ΔW.  A file holds each site's kind, tensors and meta.  Merges exactly;
    exports to PEFT where every ΔW is low-rank or dense.

    Source: none, rankwise's own.  Errors: attached by a recipe alone (there is no value); a shape that is not the weight's; a ΔW that
    depends on x.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"constant"})
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "plain")
    reads: ClassVar[tuple[str, ...]] = ("called", "read", "plain")
    ranked: ClassVar[bool] = False
    example: ClassVar[None] = None  # trains nothing and needs a value; its own tests run the laws

    def plan(self, sites: Sequence[Site], plan: Plan) -> Plan:
        if not plan.notes.get("restoring"):
            raise OptionError(
                "The form 'patch' holds a value, which a recipe cannot give; attach one with rankwise.merge.attach_state(model, state)."
            )
        return plan

    def build(self, site: Site, plan: Plan) -> FrozenDelta:
        return FrozenDelta(site)
