"""Balance losses: the formulas, and padding has no say."""

from __future__ import annotations

import pytest
import torch

from rankwise.routers.base import Record
from rankwise.routers.decision import Decision
from rankwise.routers.losses import switch, z_loss


def test_switch_loss_is_k_at_uniform_and_trains_the_router() -> None:
    n = 4000
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(n)])
    d = Decision(torch.full((n, 2), 0.5), 4, index=index, probs=torch.full((n, 4), 0.25), logits=torch.zeros(n, 4))
    assert switch([Record(d)], per="row").item() == pytest.approx(2.0, abs=1e-3)
    assert switch([Record(d)]).item() == pytest.approx(1.0, abs=1e-3)
    assert z_loss([Record(d)]).item() == pytest.approx(torch.log(torch.tensor(4.0)).item() ** 2, rel=1e-5)


def test_padding_changes_neither_losses_nor_other_rows() -> None:
    g = torch.Generator().manual_seed(0)
    probs = torch.rand(10, 4, generator=g).softmax(-1)
    index = probs.topk(2).indices
    mask = torch.tensor([True] * 6 + [False] * 4)
    whole = Decision(torch.ones(10, 2), 4, index=index, probs=probs, logits=probs.log())
    part = Decision(torch.ones(6, 2), 4, index=index[:6], probs=probs[:6], logits=probs[:6].log())
    assert torch.allclose(switch([Record(whole, mask)]), switch([Record(part)]))
    assert torch.allclose(z_loss([Record(whole, mask)]), z_loss([Record(part)]))
