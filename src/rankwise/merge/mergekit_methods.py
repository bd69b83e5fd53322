"""mergekit's methods as rows of ours, and its settings' values at a tensor: filters and gradients over the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from rankwise.catalogue import make
from rankwise.errors import OptionError
from rankwise.merge.engine.base import Merge, Merged

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import Stack
    from rankwise.merge.methods.entries import Entrywise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Each(Merge):
    """An entry-wise row whose sparsifier may differ from source to source; the first rule's way to join is all's."""

    rules: tuple[Entrywise, ...] = ()
    info: ClassVar[Any] = None

    def combine(self, stack: Stack, seed: int) -> Merged:
        keep = [r.sparsifier().keep(stack, t, seed) for t, r in enumerate(self.rules)]
        made, w = torch.empty(stack.shape, dtype=stack.dtype), stack.column()
        for rows in stack.blocks():
            kept = torch.stack([k(stack.block(t, rows), rows.start) for t, k in enumerate(keep)])
            made[rows] = self.rules[0].join(kept, w)
        return Merged(self.rules[0].lam * made)


Shared: TypeAlias = Mapping[str, Any]
PerSource: TypeAlias = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Method:
    """One of mergekit's: what it takes, and our rule for one tensor's values of it.

    ``shared`` and ``own`` are parameters with their defaults (None: it must be given) of the whole merge and of a source;
    ``base``: "changes" are measured from it, it is a "source" (the "first" of two), or it is only allowed ("optional").

    Args:
        rule: the merge at one tensor, from the values of ``shared`` and of ``own``.
        shared: parameters of the whole merge and their defaults.
        own: parameters of each source and their defaults.
        base: what the base model is to it.
        only: parameters of which one value alone is supported.
    """

    rule: Callable[[Shared, PerSource], Merge]
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: str = "changes"
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # parameters of which only this value is known


def _entrywise(
    name: str, vote: bool, normalize: bool, rescale: bool | None, *, gamma: bool = False, epsilon: bool = False
) -> Method:
    """A row of the generalised task arithmetic: sparsify, weigh, perhaps elect signs by weighted values, perhaps divide."""

    def rule(shared: Shared, own: PerSource) -> Merge:
        options: dict[str, Any] = {"lam": shared["lambda"]}
        options |= (
            {"elect": "weighted", "divide": "weights" if shared["normalize"] else "none"}
            if vote
            else {"normalize": shared["normalize"]}
        )
        if rescale is not None:
            options["rescale"] = "l1" if shared["rescale"] else "none"
        rules = []
        for values in own:
            density = values["density"]
            each: dict[str, Any] = {"density": density}
            if gamma:  # mergekit keeps all at density 1, and drops fewer outliers where density and gamma overlap
                each["gamma"] = 0.0 if density >= 1 else min(values["gamma"], 1 - density)
            if epsilon:
                each["epsilon"] = values["epsilon"]
            rules.append(make("merge", name, **options, **each))
        return Each(rules=tuple(rules))

    more = ({"gamma": 0.01} if gamma else {}) | ({"epsilon": 0.15} if epsilon else {})
    shared = {"lambda": 1.0, "normalize": normalize} | ({} if rescale is None else {"rescale": rescale})
    only = {"int8_mask": False} | ({"rescale": False} if rescale is None else {})
    return Method(rule, shared, {"weight": None, "density": 1.0, **more}, only=only)


def _row(name: str, options: Mapping[str, str], **fields: Any) -> Method:
    """A row whose options are shared parameters, by another name."""
    return Method(lambda shared, own: make("merge", name, **{ours: shared[k] for k, ours in options.items()}), **fields)


_WEIGHT: dict[str, Any] = {"weight": None}
METHODS: dict[str, Method] = {
    "linear": _row("average", {"normalize": "normalize"}, shared={"normalize": True}, own=_WEIGHT, base="source"),
    "task_arithmetic": _row("task_arithmetic", {"lambda": "lam", "normalize": "normalize"}, shared={"lambda": 1.0, "normalize": False}, own=_WEIGHT,
                            only={"int8_mask": False, "density": 1.0, "rescale": False}),
    "ties": _entrywise("ties", True, True, None),
    "dare_linear": _entrywise("dare_linear", False, False, True),
    "dare_ties": _entrywise("dare_ties", True, False, True),
    "della": _entrywise("della", True, True, True, epsilon=True),
    "della_linear": _entrywise("della_linear", False, False, True, epsilon=True),
    "breadcrumbs": _entrywise("breadcrumbs", False, False, None, gamma=True),
    "breadcrumbs_ties": _entrywise("breadcrumbs_ties", True, False, None, gamma=True),
    "sce": _row("sce", {"select_topk": "density"}, shared={"select_topk": 1.0}, only={"int8_mask": False}),
    "slerp": _row("slerp", {"t": "t"}, shared={"t": None}, base="first"),
    "nearswap": _row("nearswap", {"t": "t"}, shared={"t": None}, base="first"),
    "nuslerp": _row("nuslerp", {}, own=_WEIGHT, base="optional", only={"nuslerp_flatten": True, "nuslerp_row_wise": False}),
    "multislerp": _row("multislerp", {}, own=_WEIGHT, base="optional", only={"normalize_weights": True, "eps": 1e-8}),
    "karcher": _row("karcher", {"max_iter": "iterations", "tol": "tol"}, shared={"max_iter": 10, "tol": 1e-5}, base="source"),
    "model_stock": _row("model_stock", {}, only={"filter_wise": False}),
    "passthrough": Method(lambda shared, own: make("merge", "average", lam=own[0]["scale"], normalize=False), own={"scale": 1.0}, base="source"),
}  # fmt: skip


def resolve(setting: Any, tensor: str, t: float, flag: bool, where: str) -> Any:
    """A setting's value at a tensor: a number, a list as a gradient at ``t`` in [0, 1], or entries of ``filter`` and ``value``.

    Args:
        setting: as the file has it.
        tensor: its name, which a filter is part of.
        t: the layer's position, 0 … 1.
        flag: true or false is wanted, not a number.
        where: the setting's name in messages.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _scalar(setting, flag, where)
    if setting and all(isinstance(e, Mapping) for e in setting):
        for entry in setting:
            if unknown := sorted(set(entry) - {"filter", "value"}):
                raise OptionError(f"{where} has an entry with {unknown[0]!r}; entries have 'filter' and 'value'.")
            chosen = entry.get("filter")
            if chosen in (None, "*") or str(chosen) in tensor:
                return resolve(entry.get("value"), tensor, t, flag, where)
        return None
    values = [_scalar(v, flag, where) for v in setting]
    if not values:
        raise OptionError(f"{where} is an empty list.")
    at = t * (len(values) - 1)
    if flag:
        return values[int(at)]
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return (1 - (at - low)) * values[low] + (at - low) * values[high]


def _scalar(value: Any, flag: bool, where: str) -> Any:
    if flag and isinstance(value, bool):
        return value
    try:  # YAML reads 1e-5 as a string
        if not flag and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise OptionError(f"{where} takes {'true or false' if flag else 'a number'}; it got {value!r}.")
