"""Which rows and columns of different sites belong to one hidden unit: a head group of attention, a channel of an MLP.

Permuting or removing a unit is only right if it is done at every site that holds a part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a site that is cut into units.

    Attributes:
        group: sites with the same value share the units: unit i here is unit i there.
        dim: 0, the rows of the site's out×in matrix (its outputs); 1, its columns.
        units: how many; of attention, the key/value heads.
        grain: consecutive rows or columns of one unit: head_dim at k and v, head_dim times the query heads that share one
            key/value head at q and o, 1 at an MLP's channels.
    """

    group: str
    dim: Literal[0, 1]
    units: int
    grain: int

    def index(self, unit: int | Tensor) -> Tensor:
        """int64 rows or columns of a unit, or of several (n,) one after the other."""
        first = torch.as_tensor(unit).reshape(-1, 1) * self.grain
        return (first + torch.arange(self.grain)).reshape(-1)


def coupled_axes(model: nn.Module, sites: Mapping[str, Any]) -> dict[str, Axis]:
    """The axis of each site that shares its units with others; sites that share none, or where this is not certain, are absent.

    Shapes must add up: q has whole groups of k's heads, v and o are as wide as k and q.  Absent are attentions that hold
    something else for each head (relative biases, slopes, sinks, norms over all heads), and projections of another layout.
    """
    by_parent: dict[str, dict[str, list[Any]]] = {}
    for s in (s.spec for s in sites.values() if s.spec.kind in ("linear", "experts")):
        parent = s.module if s.kind == "experts" else s.module.rpartition(".")[0]
        by_parent.setdefault(parent, {}).setdefault(s.role, []).append(s)
    out: dict[str, Axis] = {}
    for parent, roles in by_parent.items():
        one = {role: found[0] for role, found in roles.items() if len(found) == 1}
        if {"q", "k", "v"} <= one.keys():
            out |= _attention(model, parent, one, _near(by_parent, parent, "o", one["q"]))
        if "up" in one:
            out |= _channels(parent, one, _near(by_parent, parent, "down", one["up"]))
    return out


def _near(by_parent: Mapping[str, Mapping[str, list[Any]]], parent: str, role: str, inner: Any) -> Any | None:
    """The one site of ``role`` in the same module, else in a sibling of it (BERT's ``self`` and ``output``)."""
    found = by_parent[parent].get(role, [])
    if not found:
        above = parent.rpartition(".")[0]
        found = [s for p, roles in by_parent.items() if p != parent and p.rpartition(".")[0] == above for s in roles.get(role, [])]
    return found[0] if len(found) == 1 and found[0].inp == inner.out and found[0].stack == inner.stack else None


def _attention(model: nn.Module, parent: str, one: Mapping[str, Any], o: Any | None) -> dict[str, Axis]:
    module = model.get_submodule(parent)
    config: Any = getattr(module, "config", None) or getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = _heads(module, text)
    q, k, v = one["q"].out, one["k"].out, one["v"].out
    if o is None or not heads or q % heads:
        return {}
    dim = q // heads
    if _heads_differ(module, text, dim) or v != k or k % dim or heads % (k // dim):
        return {}
    units = k // dim
    wide, thin = Axis(f"{parent}#heads", 0, units, q // units), Axis(f"{parent}#heads", 0, units, dim)
    return {one["q"].name: wide, one["k"].name: thin, one["v"].name: thin, o.name: dataclasses.replace(wide, dim=1)}


def _heads(module: nn.Module, config: Any) -> int:
    """Query heads of an attention: what the module says, else the config."""
    for name in ("num_heads", "n_heads", "num_attention_heads"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int(getattr(config, "num_attention_heads", 0) or 0)


def _heads_differ(module: nn.Module, config: Any, dim: int) -> bool:
    """Whether something that no site holds tells one head from another."""
    slopes = getattr(config, "model_type", "") in ("bloom", "mpt") or bool(getattr(config, "alibi", False))
    own = {n for n, p in module._parameters.items() if p is not None} - {"in_proj_weight", "in_proj_bias"}
    relative = any("relative_" in n for n in (*vars(module), *module._modules))
    norms = any("norm" in n and p.numel() > dim for n, p in module.named_parameters())
    return slopes or bool(own) or relative or norms


def _channels(parent: str, one: Mapping[str, Any], down: Any | None) -> dict[str, Axis]:
    enters = [one[r] for r in ("gate", "up") if r in one]
    if down is None or len({s.out for s in enters}) != 1:
        return {}
    axis = Axis(f"{parent}#channels", 0, down.inp, 1)
    return {**{s.name: axis for s in enters}, down.name: dataclasses.replace(axis, dim=1)}
