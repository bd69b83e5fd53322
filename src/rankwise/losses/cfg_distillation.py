"""Classifier-free guidance distilled into the conditional branch: one forward a token instead of two."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.catalogue import register
from rankwise.errors import DataError, OptionError
from rankwise.losses.base import LossTerm

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


@register(
    "loss",
    "cfg_distillation",
    title="Classifier-free guidance distilled into the conditional branch",
    reference="182",
)
@dataclasses.dataclass(kw_only=True)
class CFGDistillation(LossTerm):
    """weight·KL(p ‖ softmax(ℓ_u + γ·(ℓ_c − ℓ_u))), the mean over answer tokens (labels other than −100).

    p: the adapted model's next-token distribution after prompt and answer so far; ℓ_c, ℓ_u: the original model's logits (N, T, V) with
    the prompt and without it.  Without: the prompt's tokens but its last are masked from attention, so positions stay.
    γ = 1 makes the target ℓ_c: the loss is 0 at the start, and no second reference pass is made.  γ > 1 trades diversity for
    quality.  Answers may be data or samples.  It is added to the task's loss, as every term is.

    Source: arXiv 2410.06084, without code; the loss is a reconstruction, and its reward of diversity is not here.
    Errors: γ ≠ 1 with packed rows, or where no row has a prompt (labels −100 before the answer).
    """

    needs_reference: ClassVar[bool] = True
    #: with γ ≠ 1 rows need prompts, which a plain batch of the contract has not
    example: ClassVar[Mapping[str, Any]] = {"form": "lora", "losses": [{"name": "cfg_distillation", "gamma": 1.0}]}
    gamma: float = 3.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.gamma >= 0 or not self.weight >= 0:
            raise OptionError(f"The loss 'cfg_distillation' needs gamma ≥ 0 and weight ≥ 0; it got {self.gamma} and {self.weight}.")

    def term(self, outputs: Any, reference: Any | None, batch: Mapping[str, Any], adapter: Adapter, step: int) -> dict[str, Tensor]:
        with_prompt = reference.logits.float()  # type: ignore[union-attr]
        target = with_prompt
        if self.gamma != 1:
            bare = unconditional(batch)
            with adapter.reference():
                without = _quietly(adapter.model, bare).float()
            target = guided(with_prompt, without, self.gamma)
        mask = batch["labels"][:, 1:] != -100
        return {"cfg_distillation": self.weight * divergence(outputs.logits[:, :-1].float()[mask], target[:, :-1][mask])}


def guided(conditional: Tensor, unconditional: Tensor, gamma: float) -> Tensor:
    """ℓ_u + γ·(ℓ_c − ℓ_u)."""
    return unconditional + gamma * (conditional - unconditional)


def divergence(student: Tensor, target: Tensor) -> Tensor:
    """KL(student ‖ target), the mean over rows of logits (N, V); 0 for no row."""
    if not len(student):
        return student.sum()
    return F.kl_div(F.log_softmax(target, -1), F.log_softmax(student, -1), log_target=True, reduction="batchmean")


def unconditional(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its prompts: what comes before an answer's first token, but the last of it, is masked from attention."""
    labels = batch["labels"]
    if "position_ids" in batch:
        raise DataError(
            "The loss 'cfg_distillation' takes one prompt and one answer a row; these rows are packed. Train with packing off."
        )
    answer = labels != -100
    first = answer.int().argmax(1)  # where the answer begins; 0 where there is none
    places = torch.arange(labels.shape[1], device=labels.device)
    seen = places[None] >= (first - 1)[:, None]
    given = batch.get("attention_mask", torch.ones_like(labels))
    if bool((seen | (given == 0)).all()):
        raise DataError(
            "The loss 'cfg_distillation' guides towards the prompt, but no row has one; mask the prompt's labels with −100."
        )
    return {**{k: v for k, v in batch.items() if k != "labels"}, "attention_mask": given * seen.to(given.dtype)}


def _quietly(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logits without dropout, each module's mode as it was; the reference pass of the Session for another batch."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        with torch.random.fork_rng(devices=[]):
            logits: Tensor = model(**batch).logits
            return logits
    finally:
        for m in training:
            m.training = True
