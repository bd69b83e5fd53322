"""Balance losses over routers' records; all ignore padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankwise.routers.base import RoutingRecord


def switch(records: Sequence[RoutingRecord], *, per: Literal["choice", "row"] = "choice") -> Tensor:
    """E·Σ_e f_e·P_e over the rows of all records together, f_e the share of choices of expert e (``per="choice"``, least 1
    when uniform; ``"row"`` divides by rows, least k), P_e its mean probability."""
    units = records[0].decision.units
    probs = _together([_probs(r) for r in records], [r.mask for r in records])
    counts = torch.stack([r.decision.counts(r.mask).to(probs.device) for r in records]).sum(0)
    by = counts.sum() if per == "choice" else counts.new_tensor(float(len(probs)))
    return units * ((counts / by.clamp_min(1)) * (probs.sum(0) / max(len(probs), 1))).sum()


def z_loss(records: Sequence[RoutingRecord]) -> Tensor:
    """Mean of logsumexp(logits)² over the rows of all records together."""
    logits = [r.decision.logits for r in records]
    assert all(t is not None for t in logits)
    values = _together(logits, [r.mask for r in records]).logsumexp(-1)  # type: ignore[arg-type]
    return values.square().sum() / max(len(values), 1)


def _probs(record: RoutingRecord) -> Tensor:
    assert record.decision.probs is not None
    return record.decision.probs


def _together(rows: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """The unmasked rows of all, on the first one's device."""
    return torch.cat([(t if m is None else t[m]).to(rows[0].device) for t, m in zip(rows, masks, strict=True)])
