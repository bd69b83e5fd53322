"""Find every weight of a model that can be adapted: one walk over its modules, in linear time."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol, TypedDict, cast

import torch
from torch import nn

from rankwise.codecs.library import find_bridge
from rankwise.errors import TargetError
from rankwise.sites.coupling import coupled_axes
from rankwise.sites.roles import input_key, layer_of, parts_of, role_of
from rankwise.sites.site import CONVS, Site
from rankwise.sites.spec import Mode, SiteSpec


class _OfModule(TypedDict):
    """The fields of a :class:`SiteSpec` that every weight of one module shares."""

    module: str
    layer: int
    parent: str
    quantised: str


class _OfWeight(_OfModule):
    """… and those of its ``weight``."""

    dtype: str
    bias: bool


class _Features(Protocol):
    """The shape attributes of a linear layer of any library."""

    in_features: int
    out_features: int


#: roles whose input is their block's, and whose output is its block's
_ENTER, _LEAVE = {"q", "k", "v", "qkv", "gate", "up", "gate_up"}, {"o", "down", "out"}


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every site of ``model`` by name, in module order: weights, parts of fused projections, expert stacks.

    Other parameters (norms, biases, …) are listed too, with mode *plain*; blocks are not (see :func:`block_site`).
    Tied weights have the same ``tie_group``, sites that share attention heads or channels the same coupled axis.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in _walk(model):
        for name, p in module._parameters.items():
            if p is not None:
                owners[id(p)].append(f"{path}.{name}" if path else name)
    sites: dict[str, Site] = {}
    readers = _read_by_parent(model)
    for path, module in _walk(model):
        for spec in _specs(model, path, module, path in readers):
            shared = owners[id(module._parameters[spec.param])]
            if len(shared) > 1:
                spec = dataclasses.replace(spec, tie_group=shared[0])
            sites[spec.name] = Site(spec, module)
    for name, axis in coupled_axes(model, sites).items():
        sites[name].coupled_axes = (axis,)
    return sites


def block_site(model: nn.Module, path: str) -> Site:
    """The site of a whole module, for forms that wrap one (bottleneck adapters, expert blocks); width 0 where nothing tells it."""
    module = model.get_submodule(path)
    inp, out = _widths(model, path, module)
    first = next(module.parameters(), torch.empty(0))
    common = _common(path, module)
    role = path.rpartition(".")[2]
    spec = SiteSpec(name=path, param="", kind="block", mode="block", role=role, out=out, inp=inp, dtype=_dtype(first), **common)
    return Site(spec, module)


def _widths(model: nn.Module, path: str, block: nn.Module) -> tuple[int, int]:
    """(inp, out) of a block: what its first projection takes and its last gives, by role (routers and shared gates give neither)."""
    inner = [s for p, m in _walk(block) for s in _specs(model, f"{path}.{p}".rstrip("."), m, False)]
    inner = [s for s in inner if s.rows is None and s.kind in ("linear", "experts")]
    if not inner:
        return 0, 0
    enters = [s.inp for s in inner if s.role in _ENTER] or [inner[0].inp]
    leaves = [s.out for s in inner if s.role in _LEAVE] or [inner[-1].out]
    return enters[0], leaves[-1]


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """named_modules without the adapters' own modules."""
    for path, module in model.named_modules():
        if path == "rankwise" or path.startswith("rankwise."):
            continue
        yield path, module


def _read_by_parent(model: nn.Module) -> set[str]:
    """Paths of linears whose weight another module's forward reads instead of calling them."""
    out = set()
    for path, module in _walk(model):
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            out |= {f"{path}.{name}".lstrip(".") for name, _ in module.named_modules() if name}
        elif type(module).__name__ == "MambaMixer":  # hands these weights to its fused kernel, or multiplies by them itself
            out |= {f"{path}.{name}".lstrip(".") for name in ("conv1d", "x_proj", "dt_proj", "out_proj")}
    return out


def _specs(model: nn.Module, path: str, module: nn.Module, read: bool) -> Iterator[SiteSpec]:
    """The specs of one module's own parameters."""
    done: set[str] = set()
    own = _weight_spec(model, path, module, read)
    if own is not None:
        yield own
        done.add(own.param)
        yield from _parts(model, module, own)
    for name, p in module._parameters.items():
        if p is None or name in done:
            continue
        if _is_stack(module, name, p):
            spec = _stack_spec(path, module, name, p)
            yield spec
            if not _interleaved(module):
                yield from _parts(model, module, spec)
        else:
            yield _plain_spec(path, module, name, p)


def _weight_spec(model: nn.Module, path: str, module: nn.Module, read: bool) -> SiteSpec | None:
    """The spec of a module that is linear in its weight, or None."""
    weight = module._parameters.get("weight")
    try:
        bridge, refusal = find_bridge(module), ""
    except TargetError as error:  # one foreign layer must not refuse the model, only a target that names it
        bridge, refusal = None, str(error)
    name = path or "weight"
    common = _common(path, module)
    if refusal:
        return SiteSpec(name=name, role=role_of(path, "linear"), out=1, inp=1, refusal=refusal, **common)
    common["quantised"] = bridge.name if bridge else ""
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return _in_proj_spec(path, module, common)
    if weight is None:
        return None
    dtype = bridge.name if bridge else _dtype(weight)
    known: _OfWeight = {**common, "dtype": dtype, "bias": module._parameters.get("bias") is not None}
    cls = type(module)
    if isinstance(module, nn.Linear) or (bridge is not None and not isinstance(module, nn.Embedding)):
        called = not read and (bridge is not None or cls.forward is nn.Linear.forward)
        return _linear_spec(model, name, module, called, known)
    if cls.__name__ == "Conv1D" and hasattr(module, "nf"):
        inp, out = weight.shape
        return SiteSpec(name=name, kind="linear", role=role_of(path, "linear"), out=out, inp=inp, transposed=True, **known)
    if isinstance(module, CONVS):
        mode: Mode = "called" if not read and cls.forward in {c.forward for c in CONVS} else "read"
        out, inp, kernel = weight.shape[0], weight[0].numel(), tuple(module.kernel_size)
        role = role_of(path, "conv")
        return SiteSpec(
            name=name, kind="conv", mode=mode, role=role, out=out, inp=inp, kernel=kernel, groups=module.groups, **known
        )
    if isinstance(module, nn.Embedding):
        mode = "called" if (bridge is not None or cls.forward is nn.Embedding.forward) and module.max_norm is None else "read"
        out, inp = module.embedding_dim, module.num_embeddings
        return SiteSpec(name=name, kind="embedding", mode=mode, role=role_of(path, "embedding"), out=out, inp=inp, **known)
    if "Router" in cls.__name__ and weight.dim() == 2:
        return SiteSpec(name=name, kind="linear", mode="read", role="router", out=weight.shape[0], inp=weight.shape[1], **known)
    return None


def _common(path: str, module: nn.Module) -> _OfModule:
    return {"module": path, "layer": layer_of(path), "parent": type(module).__name__, "quantised": ""}


def _in_proj_spec(path: str, module: nn.MultiheadAttention, common: _OfModule) -> SiteSpec:
    name, weight = "in_proj_weight", module.in_proj_weight
    assert weight is not None
    bias = module.in_proj_bias is not None
    out, inp = weight.shape
    full = f"{path}.{name}".lstrip(".")
    return SiteSpec(name=full, param=name, mode="read", role="qkv", out=out, inp=inp, dtype=_dtype(weight), bias=bias, **common)


def _linear_spec(model: nn.Module, name: str, module: nn.Module, called: bool, known: _OfWeight) -> SiteSpec:
    linear, path = cast("_Features", module), known["module"]
    out, inp = linear.out_features, linear.in_features
    role = role_of(path, "linear")
    group = input_key(path, role, inp) if called else ""
    if _is_head(model, module):
        role = "head"
    routed = ".experts." in f".{path}."
    mode: Mode = "called" if called else "read"
    return SiteSpec(name=name, mode=mode, role=role, out=out, inp=inp, input_group=group, routed=routed, **known)


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    return callable(get) and get() is module


def _is_stack(module: nn.Module, name: str, p: torch.Tensor) -> bool:
    return p.dim() == 3 and p.is_floating_point() and ("Experts" in type(module).__name__ or hasattr(module, "num_experts"))


def _interleaved(module: nn.Module) -> bool:
    return getattr(module, "is_concatenated", True) is False


def _stack_spec(path: str, module: nn.Module, name: str, p: torch.Tensor) -> SiteSpec:
    transposed = bool(getattr(module, "is_transposed", False))
    stack, a, b = p.shape
    out, inp = (b, a) if transposed else (a, b)
    full = f"{path}.{name}".lstrip(".")
    spec = SiteSpec(name=full, param=name, kind="experts", mode="read", out=out, inp=inp, dtype=_dtype(p), **_common(path, module))
    return dataclasses.replace(spec, role=role_of(full, "experts"), stack=stack, transposed=transposed)


def _parts(model: nn.Module, module: nn.Module, whole: SiteSpec) -> Iterator[SiteSpec]:
    """The parts of a fused projection, as sites with rows of the same module."""
    parts = list(parts_of(model, module, whole.role, whole.out))
    for role, rows, repeat in parts:
        size = (rows[1] - rows[0]) * repeat[0]
        key = f"{whole.module}#{whole.param}" if whole.mode == "called" else ""
        yield dataclasses.replace(
            whole, name=f"{whole.name}[{role}]", role=role, rows=rows, repeat=repeat, out=size, input_group=key
        )


def _plain_spec(path: str, module: nn.Module, name: str, p: torch.Tensor) -> SiteSpec:
    out = p.shape[0] if p.dim() else 1
    inp = p[0].numel() if p.dim() > 1 else 1
    full, common = f"{path}.{name}".lstrip("."), _common(path, module)
    return SiteSpec(name=full, param=name, kind="plain", mode="plain", role=name, out=out, inp=inp, dtype=_dtype(p), **common)


def _dtype(p: torch.Tensor) -> str:
    return str(p.dtype).removeprefix("torch.")
