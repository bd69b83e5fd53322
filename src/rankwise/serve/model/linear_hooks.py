"""Linear modules of a served model: products with packed weights, shared inputs multiplied once, changes added.

Each linear of the model gets a :class:`Hook` as its ``forward``.  Modules that share an input run as one product with
their weights laid together: the first one called computes all and leaves the slices for the others, which are told
apart by the input being the very same object.  Outside a step (no plan on this thread) a module is its plain self.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rankwise.forms.packed import PACKED, packable, probe
from rankwise.runtime.context import forward_context
from rankwise.serve.ops.base import DeltaOp, Group

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import NonLoraChange
    from rankwise.serve.batch import Segment


@dataclasses.dataclass(slots=True)
class Changes:
    """What acts on the rows of one product in this step.

    Attributes:
        op: the delta operator, begun for this step; ``groups``: names of the groups that an acting adapter touches.
        non_lora_changes: module → (segment, changes) to run one by one.
        full_params: parameter → (segment, tensor) that stands in for the base's.
    """

    op: DeltaOp | None = None
    groups: frozenset[str] = frozenset()
    non_lora_changes: Mapping[str, Sequence[tuple[Segment, tuple[NonLoraChange, ...]]]] = dataclasses.field(default_factory=dict)
    full_params: Mapping[str, Sequence[tuple[Segment, Tensor]]] = dataclasses.field(default_factory=dict)


NOTHING = Changes()


@dataclasses.dataclass(slots=True)
class Acting:
    """The changes of the running step: of its packed tokens, and of the rows whose logits are wanted (the head's)."""

    body: Changes = dataclasses.field(default_factory=lambda: NOTHING)
    head: Changes = dataclasses.field(default_factory=lambda: NOTHING)


Finish = Callable[[Tensor], Tensor]


class Bundle:
    """Modules that share an input, and their product, made once for all of them.

    Args:
        rows: rows of a usual step, for the choice of packing; ``pack``: True or False overrules the probe.
        finish: what becomes of a changed output (N×out) before it leaves: a sum over devices.
    """

    def __init__(
        self, group: Group, modules: Sequence[nn.Module], rows: int = 16, pack: bool | None = None, finish: Finish | None = None
    ):
        self.group, self.finish = group, finish
        self.plain: list[Callable[[Tensor], Tensor]] = [m.forward for m in modules]
        self.bias = [b if isinstance(b := getattr(m, "bias", None), Tensor) else None for m in modules]
        self.packed: Tensor | None = None
        self.together = False
        self.changed = False
        self.key: Tensor | None = None
        self.flat = torch.empty(0)
        self.ys: list[Tensor | None] = []
        self.v: Tensor | None = None
        if all(type(m) is nn.Linear for m in modules):
            self._pack(modules, rows, pack)

    @torch.no_grad()
    def _pack(self, modules: Sequence[nn.Module], rows: int, pack: bool | None) -> None:
        weights = [m.get_parameter("weight").detach() for m in modules]
        if not all(packable(w) for w in weights):
            return
        joint = sum(w.shape[0] for w in weights)
        wanted = probe(joint, self.group.inp, torch.float32, rows, training=False).kind == PACKED if pack is None else pack
        if not wanted:
            return
        # only the packed copy of the weights laid together is kept: the model's own tensors stay what they are
        self.packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), rows)
        biases = [torch.zeros(w.shape[0]) if b is None else b.detach() for w, b in zip(weights, self.bias, strict=True)]
        self.joint_bias = torch.cat(biases) if any(b is not None for b in self.bias) else None
        self.together = len(modules) > 1

    def enter(self, x: Tensor) -> Tensor:
        """The input as N×in; siblings are recognised by being handed the very same object."""
        if self.key is not x:
            self.key, self.v, self.ys = x, None, []
            self.flat = x.reshape(-1, x.shape[-1])
        return self.flat

    def product(self, x: Tensor, j: int) -> Tensor:
        """The base's output of module ``j``, N×out, to be changed in place by the caller."""
        flat = self.enter(x)
        if self.packed is None:
            return self.plain[j](x).reshape(flat.shape[0], -1)
        if not self.together:
            return self._run(flat)
        if not self.ys or self.ys[j] is None:  # the second: a module called again with the same object
            self.ys, self.changed = list(self._run(flat).split(self.group.outs, -1)), False
        y = self.ys[j]
        assert y is not None
        self.ys[j] = None
        return y

    def _run(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.joint_bias, "none", [], "")

    def change(self, op: DeltaOp, j: int, y: Tensor, at_once: bool) -> None:
        """Add what the delta operator computes to the output of one module.

        Args:
            op: begun for this step.
            j: the module, by its place in the group.
            y: N×out_j, its output, changed in place.
            at_once: also add to the outputs of its siblings that wait.
        """
        if at_once and len(self.group.outs) == 1:
            op.apply(self.group, self.flat, [y])
        elif at_once and self.together:
            if not self.changed:  # so this is the first of them, and the others are all there
                op.apply(self.group, self.flat, [y if other is None else other for other in self.ys])
                self.changed = True
        else:
            op.expand(self.group, j, self.shrunk(op), y)

    def shrunk(self, op: DeltaOp) -> Tensor:
        if self.v is None:
            self.v = op.shrink(self.group, self.flat)
        return self.v

    def forget(self) -> None:
        """Let the step's tensors go."""
        self.key, self.v, self.ys = None, None, []
        self.flat = torch.empty(0)


class Hook:
    """The forward of one called module in a served model.

    Args:
        path, bundle, j: the module: its name, its group's products, its place among them.
        acting: the changes of the running step.
        head: whether it is the output head, which sees the sample rows alone.
    """

    def __init__(self, path: str, bundle: Bundle, j: int, acting: Acting, *, head: bool = False):
        self.path, self.bundle, self.j, self.acting, self.head = path, bundle, j, acting, head

    def __call__(self, x: Tensor) -> Tensor:
        bundle = self.bundle
        if forward_context.step is None or not x.numel():  # the head, in a step that ends no prompt
            return bundle.plain[self.j](x)
        y = bundle.product(x, self.j)
        changes = self.acting.head if self.head else self.acting.body
        if changes is not NOTHING:
            self._change(y, changes)
        if bundle.finish is not None:
            y = bundle.finish(y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def joint(self, x: Tensor) -> Tensor | None:
        """The outputs of this module and its siblings side by side, N×Σout, for x: N×in; None where they are made apart.

        For who calls all of them anyway: no slices wait for anybody.  A change that is no pair of factors is made apart.
        """
        bundle, changes = self.bundle, self.acting.body
        if not bundle.together or bundle.finish is not None or changes.non_lora_changes or changes.full_params:
            return None
        y = bundle._run(x)
        if changes.op is not None and bundle.group.name in changes.groups:
            changes.op.apply(bundle.group, x, y.split(bundle.group.outs, -1))
        return y

    def _change(self, y: Tensor, changes: Changes) -> None:
        bundle, path = self.bundle, self.path
        x, bias = bundle.flat, bundle.bias[self.j]
        added = []
        for seg, non_lora_changes in changes.non_lora_changes.get(path, ()):  # every change sees the base's own output
            rows = slice(seg.start, seg.end)
            base = y[rows] if bias is None else y[rows] - bias
            added.append((rows, sum(fn(x[rows], base) for fn in non_lora_changes)))
        for seg, weight in changes.full_params.get(f"{path}.weight", ()):
            rows = slice(seg.start, seg.end)
            y[rows] = nn.functional.linear(x[rows], weight.to(x.dtype), bias)
        for seg, offset in changes.full_params.get(f"{path}.bias", ()):
            y[seg.start : seg.end] += offset.to(y.dtype) - (0 if bias is None else bias)
        if changes.op is not None and bundle.group.name in changes.groups:
            # a non-LoRA change reads the base's own output, which must not hold a sibling's call's changes yet
            bundle.change(changes.op, self.j, y, at_once=not (changes.non_lora_changes or changes.full_params))
        for rows, change in added:
            y[rows] += change


class EmbeddingHook:
    """The forward of the input embedding: an adapter's whole table on its rows, or a change of it."""

    def __init__(self, path: str, module: nn.Module, acting: Acting):
        self.path, self.acting = path, acting
        self.plain: Callable[[Tensor], Tensor] = module.forward

    def __call__(self, ids: Tensor) -> Tensor:
        y = self.plain(ids)
        changes = self.acting.body
        if forward_context.step is None or changes is NOTHING:
            return y
        flat, out = ids.reshape(-1), y.reshape(-1, y.shape[-1])
        added = []
        for seg, non_lora_changes in changes.non_lora_changes.get(self.path, ()):  # every change sees the base's own output
            rows = slice(seg.start, seg.end)
            base = out[rows].clone()
            added.append((rows, sum(fn(flat[rows], base) for fn in non_lora_changes)))
        for seg, table in changes.full_params.get(f"{self.path}.weight", ()):
            rows = slice(seg.start, seg.end)
            # a module may rescale what it looks up (Gemma): its own forward on the adapter's table
            out[rows] = _looked_up(self.plain, table, flat[rows])
        for rows, change in added:
            out[rows] += change
        return out.view_as(y)


def _looked_up(plain: Callable[[Tensor], Tensor], table: Tensor, ids: Tensor) -> Tensor:
    wrapped = _Plain(plain)
    own = wrapped.inner.get_parameter("weight")
    return functional_call(wrapped, {"inner.weight": table.to(own.dtype)}, (ids,))


class _Plain(nn.Module):
    """A module's own forward, whatever hook stands in for it."""

    def __init__(self, plain: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inner: nn.Module = plain.__self__  # type: ignore[attr-defined]
        self.plain = plain

    def forward(self, ids: Tensor) -> Tensor:
        return self.plain(ids)


def hook_model(
    model: nn.Module,
    groups: Sequence[Group],
    acting: Acting,
    *,
    rows: int = 16,
    pack: bool | None = None,
    finish: Mapping[str, Finish] = MappingProxyType({}),
) -> list[Bundle]:
    """Hook every module of ``groups``, the output head and the input embedding; returns the bundles.

    Args:
        model, groups: a causal language model, and its linears by common input.
        acting: filled with the changes of a step before it runs.
        rows, pack: see :class:`Bundle`; ``finish``: group → see there.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_path = next(n for n, m in model.named_modules() if m is head)
    if not any(head_path in g.modules for g in groups):
        groups = [*groups, Group(head_path, (head_path,), head.in_features, (head.out_features,))]
    bundles = []
    for g in groups:
        modules = [model.get_submodule(p) for p in g.modules]
        bundle = Bundle(g, modules, rows, pack, finish.get(g.name))
        for j, (path, m) in enumerate(zip(g.modules, modules, strict=True)):
            m.forward = Hook(path, bundle, j, acting, head=m is head)  # type: ignore[assignment]
        bundles.append(bundle)
    table = model.get_input_embeddings()  # type: ignore[operator]
    path = next(n for n, m in model.named_modules() if m is table)
    table.forward = EmbeddingHook(path, table, acting)
    return bundles
