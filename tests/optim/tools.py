"""A small world of named parameters for the optimiser tests: two pairs, a stack, weights, a vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise import catalogue
from rankwise.optim import Context, GradTransform, OptimizerMethod, Param, TransformOptimizer


def tensor(*shape: int, key: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key), dtype=torch.float64).to(dtype)


def param(name: str, value: Tensor, role: str = "other", site: str = "", **kw) -> Param:
    return Param(name, nn.Parameter(value.clone()), site or name.rsplit(".", 1)[0], role, **kw)


def pair(
    site: str, out: int, inn: int, r: int, s: float = 2.0, dtype: torch.dtype = torch.float64, experts: int = 0
) -> list[Param]:
    lead = (experts,) if experts else ()
    key = sum(map(ord, site))
    return [
        param(f"{site}.A", tensor(*lead, r, inn, key=key, dtype=dtype), "A", scale=s, component_axis=len(lead)),
        param(f"{site}.B", tensor(*lead, out, r, key=key + 1, dtype=dtype), "B", scale=s, component_axis=len(lead) + 1),
    ]


def world(dtype: torch.dtype = torch.float64) -> list[Param]:
    """Every role an optimiser may meet; projected and stepped by every registered method."""
    return [
        *pair("l0.q", 7, 5, 2, dtype=dtype),
        *pair("l1.up", 6, 9, 3, dtype=dtype, experts=2),
        param("l0.q.magnitude", tensor(7, key=5, dtype=dtype), "magnitude", decay=False),
        param("l2.down.weight", tensor(8, 6, key=6, dtype=dtype), "weight"),
        param("l2.out.weight", tensor(6, 10, key=7, dtype=dtype), "weight"),
    ]


#: options under which every registered method acts on the whole world
OPTIONS = {"galore": [{"r": 3, "every": 2}, {"r": 3, "every": 2, "moments": "rotate"}, {"r": 3, "every": 2, "moments": "zero"}],
           "lora_pro": [{"variant": v} for v in ("adam", "light", "sgd")],
           "allora": [{}, {"apply_to": "gradient"}, {"every": 3}, {"norm_of": "factor"}],
           "sgd": [{}, {"momentum": 0.9, "nesterov": True}]}  # fmt: skip
METHODS = [(m.name, o) for m in catalogue.methods("optimizer") for o in OPTIONS.get(m.name, [{}])]


def make(name: str, params: list[Param], lr: float = 1e-2, options: dict | None = None, **kw) -> TransformOptimizer:
    return TransformOptimizer(catalogue.make("optimizer", name, **(options or {})), params, lr, **kw)


def grads_at(params: list[Param], t: int, only: set[str] | None = None) -> None:
    """Gradients that depend on the name, the value and the step: ½‖p − target‖² plus noise."""
    for p in params:
        if only is not None and p.name not in only:
            p.tensor.grad = None
            continue
        noise = tensor(*p.tensor.shape, key=sum(map(ord, p.name)) * 1000 + t).to(p.tensor.dtype)
        p.tensor.grad = p.tensor.detach() + 0.5 * noise


def walk(opt: TransformOptimizer, params: list[Param], first: int, last: int, only: set[str] | None = None) -> None:
    for t in range(first, last + 1):
        grads_at(params, t, only)
        opt.step()


class Wire(OptimizerMethod):
    """A transform as a method."""

    def __init__(self, transform: GradTransform) -> None:
        self._transform = transform

    def transform(self, params):
        return self._transform


def by_name(params: list[Param]) -> dict[str, Param]:
    return {p.name: p for p in params}


def context(step: int = 1, lr: float = 1.0, params: list[Param] | None = None) -> Context:
    return Context(step, lr, params=by_name(params or []))


def same(xs: list[Param], ys: list[Param]) -> bool:
    return all(torch.equal(x.tensor, y.tensor) for x, y in zip(sorted(xs, key=lambda p: p.name), sorted(ys, key=lambda p: p.name)))
