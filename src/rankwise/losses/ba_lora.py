"""BA-LoRA: stay near the original model's outputs, keep them diverse, keep their spectrum concentrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.catalogue import register
from rankwise.errors import DataError, OptionError
from rankwise.losses.base import LossTerm
from rankwise.recipe import preset

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


@register(
    "loss",
    "ba_lora",
    title="BA-LoRA: consistency, diversity and spectrum of the outputs",
    paper="arXiv 2408.04556",
    reference="054",
)
@dataclasses.dataclass(kw_only=True)
class BALoRA(LossTerm):
    """L = task + λ₁·R_c + λ₂·R_d + λ₃·R_s, Z the outputs' logits, Z⁰ the original model's (empty view, no gradient).

    ``task="generation"`` (Z: N×T×V, unmasked tokens): R_c = KL(p⁰‖p), R_d = −mean entropy(p), R_s = −Σ_{k≤K}σ_k/Σσ_k of
    the N×(T·V) logits.  ``"classification"`` (Z: N×C): R_c = mean squared error of the row-normalised logits, R_d =
    (1/C)·Σ_{i≠j}Cov(Z)_ij², R_s as above on N×C.  σ from the N×N Gram.  KL is per token (``per="token"``) or, as the
    published code has it, summed over tokens and divided by the batch (``per="batch"``).

    The reference is the original model, not "adapter off" on a residual base; published code counts padding, takes the
    log of a softmax and indexes σ as a matrix: here tokens are masked, log-softmax is used, σ is a vector.  With one row
    R_d and R_s are undefined: R_d (classification) and R_s are then left out.

    Source: cyp-jlu-ai/BA-LoRA, train.py.

    Args:
        consistency, diversity, spectrum: the weights λ₁, λ₂, λ₃; 0 or more.
        k: singular values in the numerator of R_s.
        task: generation or classification.
        per: token or batch, what the KL is a mean over.
    """

    needs_reference: ClassVar[bool] = True
    consistency: float = 1e-4
    diversity: float = 3e-4
    spectrum: float = 1e-4
    k: int = 3
    task: Literal["generation", "classification"] = "generation"
    per: Literal["token", "batch"] = "token"

    def __post_init__(self) -> None:
        if min(self.consistency, self.diversity, self.spectrum) < 0 or self.k < 1:
            raise OptionError("The loss 'ba_lora' needs weights ≥ 0 and k ≥ 1.")
        if self.task not in ("generation", "classification") or self.per not in ("token", "batch"):
            raise OptionError(
                f"The loss 'ba_lora' has task 'generation' or 'classification' and per 'token' or 'batch'; it got {self.task!r}, {self.per!r}."
            )

    def term(self, outputs: Any, reference: Any | None, batch: Mapping[str, Any], adapter: Adapter, step: int) -> dict[str, Tensor]:
        Z, Z0 = outputs.logits.float(), reference.logits.float()  # type: ignore[union-attr]
        want = 3 if self.task == "generation" else 2
        if Z.dim() != want:
            raise DataError(
                f"The loss 'ba_lora' with task={self.task!r} expects logits with {want} axes; this model gives {tuple(Z.shape)}."
            )
        if self.task == "generation":
            parts = self._generation(Z, Z0, _mask(batch, Z))
        else:
            parts = {"consistency": consistency(Z, Z0), "diversity": decorrelation(Z), "spectrum": concentration(Z, self.k)}
        weights = {"consistency": self.consistency, "diversity": self.diversity, "spectrum": self.spectrum}
        return {f"ba_{n}": weights[n] * v for n, v in parts.items() if weights[n] and v is not None}

    def _generation(self, Z: Tensor, Z0: Tensor, mask: Tensor) -> dict[str, Tensor | None]:
        logp, logp0 = F.log_softmax(Z, -1)[mask], F.log_softmax(Z0, -1)[mask]
        kl = (logp0.exp() * (logp0 - logp)).sum(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        kept = (Z * mask[..., None]).flatten(1)
        return {
            "consistency": kl.mean() if self.per == "token" else kl.sum() / len(Z),
            "diversity": -entropy.mean(),
            "spectrum": concentration(kept, self.k),
        }


def consistency(Z: Tensor, Z0: Tensor) -> Tensor:
    """Mean squared error of the row-normalised logits; at most 4/C, blind to positive scaling."""
    return F.mse_loss(F.normalize(Z, dim=-1), F.normalize(Z0, dim=-1))


def decorrelation(Z: Tensor) -> Tensor | None:
    """(1/C)·Σ_{i≠j} Cov(Z)_ij² with N − 1 in the covariance; None for one row."""
    if len(Z) < 2:
        return None
    centred = Z - Z.mean(0)
    cov = centred.mT @ centred / (len(Z) - 1)
    return (cov.square().sum() - cov.diagonal().square().sum()) / Z.shape[1]


def concentration(Z: Tensor, k: int) -> Tensor | None:
    """−Σ_{i≤k}σ_i/Σσ_i of Z: N×D, in [−1, −k/min(N, D)], by the N×N Gram; None for one row."""
    if len(Z) < 2:
        return None
    gram = Z @ Z.mT
    eps = 1e-6 * gram.diagonal().mean().detach()  # keeps repeated σ differentiable
    jitter = torch.linspace(0, 1, len(Z), device=Z.device) * eps
    sigma = torch.linalg.eigvalsh(gram + torch.diag(jitter)).clamp_min(1e-12).sqrt().flip(-1)
    return -sigma[:k].sum() / sigma.sum()


def _mask(batch: Mapping[str, Any], Z: Tensor) -> Tensor:
    labels, attention = batch.get("labels"), batch.get("attention_mask")
    if labels is not None and labels.shape == Z.shape[:2]:
        return labels != -100
    if attention is not None and attention.shape == Z.shape[:2]:
        return attention.bool()
    return torch.ones(Z.shape[:2], dtype=torch.bool, device=Z.device)


preset("ba_lora", "BA-LoRA: PiSSA with three loss terms", form="lora", init="pissa", losses=["ba_lora"])
