"""SCE and nearswap: selection by variance, weights by energy, steps of at most t."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.merge import merge_states
from tests.merge.tools import dense, source


def test_sce_selects_weighs_and_elects() -> None:
    a, b = source(0), source(1)
    x = torch.stack([dense(a), dense(b)])
    spread = x.var(0, unbiased=False).flatten()
    mask = torch.zeros(80, dtype=torch.bool)
    mask[spread.topk(40).indices] = True
    kept = x * mask.view(10, 8)
    w = kept.square().sum((1, 2), keepdim=True)
    w = w / w.sum()
    agree = kept * torch.where(kept.sum(0) >= 0, 1.0, -1.0) > 0
    want = torch.where((w * agree).sum(0) > 0, (w * kept * agree).sum(0) / (w * agree).sum(0).clamp_min(1e-30), 0)
    assert torch.allclose(dense(merge_states([a, b], None, "sce", density=0.5, rank=8)), want, atol=1e-4)


def test_nearswap_moves_by_at_most_t() -> None:
    a, b = source(0), source(1)
    go = lambda t: dense(merge_states([a, b], None, "nearswap", t=t, rank=8))
    assert torch.allclose(go(0.0), dense(a), atol=1e-5) and torch.allclose(go(1e9), dense(b), atol=1e-4)
    step = dense(b) - dense(a)
    assert torch.allclose(go(0.3), dense(a) + step.clamp(-0.3, 0.3), atol=1e-5)
    with pytest.raises(OptionError, match="t ≥ 0"):
        go(-1.0)


def test_one_source_has_no_variance_to_select_by() -> None:
    assert merge_states([source(0)], None, "sce").sites["x"].exact_rank == 3
    with pytest.raises(OptionError, match="one has none; give two, or density = 1"):
        merge_states([source(0)], None, "sce", density=0.5)
