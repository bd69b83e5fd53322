"""What a file of another library holds besides low-rank changes and whole tensors, told as PEFT has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


class PeftInfo(TypedDict):
    """What a PEFT folder holds besides low-rank changes and whole tensors.

    ``magnitude`` and ``bias`` (the change of a bias, scale included) by site; ``base_layers`` the base weights that
    PEFT saves with an adapted embedding; ``untied`` the sites of a tie of which only this end was adapted.
    """

    config: dict[str, Any]
    base_model: str | None
    task_type: str | None
    dropout: float
    magnitude: dict[str, Tensor]
    bias: dict[str, Tensor]
    base_layers: dict[str, Tensor]
    untied: list[str]
    modules_to_save: list[str]
