"""One small recipe for every registered method, made from the registry, so a method registered later needs no line here.

A method that cannot run with its defaults on a two-layer model of width 32 says how it can in a class attribute
``example`` (recipe fields).
"""

from __future__ import annotations

from typing import Any

from rankwise import catalogue
from rankwise.catalogue import MethodInfo

#: forms to carry a part that needs one, in the order they are tried
_CARRIERS = ("lora", "svd", "full", "bottleneck")


def example(info: MethodInfo) -> dict[str, Any]:
    """Recipe fields that use ``info``."""
    own = getattr(info.cls, "example", None)
    if own is not None:
        return with_rank(own)
    if info.kind == "form":
        return with_rank({"form": info.name})
    form = next(c for c in _CARRIERS if set(info.requires) <= set(catalogue.find("form", c).cls.provides))  # type: ignore[attr-defined]
    field = {"loss": "losses"}.get(info.kind, info.kind)
    value: Any = [info.name] if info.kind == "loss" else info.name
    return with_rank({"form": form, field: value})


def with_rank(recipe: dict[str, Any], r: int = 4) -> dict[str, Any]:
    """The recipe with a small rank, where its form has one."""
    form = recipe.get("form", "lora")
    name = form["name"] if isinstance(form, dict) else form
    if "parts" in recipe or not catalogue.find("form", name).cls.ranked:  # type: ignore[attr-defined]
        return dict(recipe)
    return {"r": r, **recipe}


def methods(*kinds: str) -> list[MethodInfo]:
    return [m for k in kinds for m in catalogue.methods(k) if getattr(m.cls, "example", True) is not None]


def ids(infos: list[MethodInfo]) -> list[str]:
    return [f"{m.kind}-{m.name}" for m in infos]


def mergeable(recipe: dict[str, Any]) -> bool:
    """Whether the recipe's change is a weight's: no router, a form that merges."""
    form = recipe.get("form", "lora")
    name = form["name"] if isinstance(form, dict) else form
    return not recipe.get("router") and catalogue.find("form", name).mergeable
