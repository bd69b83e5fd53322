"""Small sources of two sites, and the options under which a merge keeps everything."""

from __future__ import annotations

from typing import Any

import torch

from rankwise.catalogue import MethodInfo
from rankwise.delta import AdapterState, LowRank


def source(seed: int, r: int = 3, out: int = 10, inp: int = 8) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g)
    return AdapterState({"x": LowRank(draw(r, inp), draw(out, r), 0.5), "y": LowRank(draw(r, inp), draw(out, r), 0.5)})


def dense(state: AdapterState, site: str = "x") -> torch.Tensor:
    return state.sites[site].dense().double()


def keep_all(info: MethodInfo) -> dict[str, Any]:
    """Nothing dropped, nothing scaled, no rank lost."""
    wanted = {"density": 1.0, "gamma": 0.0, "lam": 1.0, "alpha": 1.0, "reweigh_output": False, "rank": 8}
    return {k: v for k, v in wanted.items() if k in info.options}
