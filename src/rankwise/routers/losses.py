"""Balance losses over routers' records; all ignore padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rankwise.routers.base import Record


def switch(records: Sequence[Record], *, per: Literal["choice", "row"] = "choice") -> Tensor:
    """E·Σ_e f_e·P_e, f_e the share of choices of expert e (``per="choice"``, least 1 when uniform; ``"row"`` divides by
    rows, least k), P_e its mean probability."""
    total = torch.zeros(())
    for r in records:
        d = r.decision
        assert d.probs is not None
        probs = d.probs if r.mask is None else d.probs[r.mask]
        counts = d.counts(r.mask)
        by = counts.sum() if per == "choice" else torch.tensor(float(max(len(probs), 1)), device=counts.device)
        total = total.to(probs.device) + d.units * ((counts / by.clamp_min(1)) * probs.mean(0)).sum()
    return total / max(len(records), 1)


def z_loss(records: Sequence[Record]) -> Tensor:
    """Mean of logsumexp(logits)²."""
    values = []
    for r in records:
        logits = r.decision.logits
        assert logits is not None
        values.append(torch.logsumexp(logits if r.mask is None else logits[r.mask], -1))
    return torch.cat(values).square().mean()
