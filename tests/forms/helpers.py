"""One linear with one adapter: the smallest place a form's identities show."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rankwise as rw
from rankwise import catalogue


def one(
    recipe: dict[str, Any], inp: int = 12, out: int = 10, seed: int = 0, bias: bool = True, **more: Any
) -> tuple[nn.Module, Any, Any]:
    """(model, adapter, the site's module)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inp, out, bias=bias))
    form = recipe.get("form", "lora")
    ranked = catalogue.find("form", form["name"] if isinstance(form, dict) else form).cls.ranked  # type: ignore[attr-defined]
    adapter = rw.attach(model, {"targets": ["0"], **({"r": 3} if ranked else {}), **recipe}, **more)
    return model, adapter, next(iter(adapter.sites.values()))
