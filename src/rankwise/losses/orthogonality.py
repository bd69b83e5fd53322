"""Soft orthogonality of the factors, as AdaLoRA asks of its singular vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.errors import OptionError, RecipeError
from rankwise.losses.base import LossTerm

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


@register(
    "loss",
    "orthogonality",
    title="Soft orthogonality of both factors",
    paper="arXiv 2303.10512",
    reference="203",
    requires=("components",),
)
@dataclasses.dataclass(kw_only=True)
class Orthogonality(LossTerm):
    """γ · mean over factors of ‖A·Aᵀ − I‖_F and ‖Bᵀ·B − I‖_F (the norm, not its square), in fp32.

    Zero exactly where both factors are orthonormal.  Source: QingruZhang/AdaLoRA (γ = 0.1; HF PEFT 0.5).
    """

    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise OptionError(f"The loss 'orthogonality' needs gamma ≥ 0; it got {self.gamma}.")

    def term(self, outputs: Any, reference: Any | None, batch: Mapping[str, Any], adapter: Adapter, step: int) -> dict[str, Tensor]:
        parts: list[Tensor] = []
        for delta in adapter.sites.values():
            A, B = getattr(delta, "A", None), getattr(delta, "B", None)
            if A is not None and B is not None:
                parts += [_gap(A.float() @ A.float().mT), _gap(B.float().mT @ B.float())]
        if not parts:
            raise RecipeError("The loss 'orthogonality' found no pair of factors A, B in this adapter; drop it.")
        return {"orthogonality": self.gamma * torch.stack(parts).mean()}


def _gap(gram: Tensor) -> Tensor:
    eye = torch.eye(gram.shape[-1], device=gram.device)
    return (gram - eye).square().sum((-1, -2)).clamp_min(1e-30).sqrt().mean()
