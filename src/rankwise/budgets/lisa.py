"""LISA: every K steps a few random blocks train, the rest is frozen and its moments are freed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from rankwise.allocation import Allocation, sample
from rankwise.budgets.base import Budget, Run, agreed
from rankwise.catalogue import register
from rankwise.errors import OptionError
from rankwise.seeds import generator


@register("budget", "lisa", title="LISA: layerwise importance sampling", paper="arXiv 2403.17919", reference="078")
@dataclasses.dataclass(kw_only=True)
class LISA(Budget):
    """S ~ uniform, |S| = γ of the N blocks, drawn anew every K optimiser steps (also at the first); what lies outside
    the blocks (embedding, final norm, head) always trains.

    With the form ``full`` this is LISA as published; over any adapter it samples whose blocks train.  Frozen tensors have
    no gradient (None, so no weight decay either), and ``state="drop"`` frees their moments: the memory claim, 2·(outside +
    γ blocks) elements of Adam state.  ``"keep"`` leaves them, with ages per tensor.  Under data parallelism the update is
    masked and requires_grad is left alone.

    Source: OptimalScale/LMFlow, lisa_trainer.py, which lets the state creep up to that of full tuning.
    Errors: γ above the number of blocks; a model without blocks.
    """

    example: ClassVar[Mapping[str, Any]] = {"form": "full", "targets": "all", "budget": {"name": "lisa", "blocks": 1, "every": 2}}
    blocks: int = 2
    every: int = 20
    state: str = "drop"

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.every < 1 or self.state not in ("drop", "keep"):
            raise OptionError(
                f"The budget 'lisa' needs blocks ≥ 1, every ≥ 1 and state 'drop' or 'keep'; it got {self.blocks}, {self.every}, {self.state!r}."
            )
        self.allocation: Allocation | None = None

    def start(self, run: Run) -> None:
        self._layer: dict[str, int] = {}
        sites = {n: d.site.spec for n, d in run.adapter.sites.items()}
        for name in run.adapter.named_parameters():
            owner = name.split("::")[0]
            self._layer[name] = sites[owner].layer if owner in sites else -1
        self._blocks = sorted({n for n in self._layer.values() if n >= 0})
        if not self._blocks:
            raise OptionError("The budget 'lisa' samples transformer blocks, but no layer of this adapter lies in one.")
        if self.blocks > len(self._blocks):
            raise OptionError(
                f"The budget 'lisa' trains blocks = {self.blocks} at a time, but the adapter reaches {len(self._blocks)}; lower it."
            )
        self._params = dict(run.adapter.named_parameters())
        if self.allocation is not None:
            self._apply(run)

    def step_begin(self, run: Run) -> None:
        if (run.step - 1) % self.every:
            return
        g = generator(run.seed, "lisa", str(run.step))
        picked = {int(b) for b in sample([str(b) for b in self._blocks], self.blocks, g)}
        live = tuple(n for n, layer in self._layer.items() if layer < 0 or layer in picked)
        self.allocation = agreed(run, Allocation(trainable=live))
        self._apply(run)

    def _apply(self, run: Run) -> None:
        assert self.allocation is not None and self.allocation.trainable is not None
        live = set(self.allocation.trainable)
        frozen = [n for n in self._params if n not in live]
        if run.ddp:
            run.optimizer.frozen = set(frozen)
        else:
            for name, p in self._params.items():
                p.requires_grad_(name in live)
                if name not in live:
                    p.grad = None
        if self.state == "drop":
            run.optimizer.drop(frozen)
        run.logs["trainable"] = float(sum(self._params[n].numel() for n in live))

    def finish(self, run: Run) -> None:
        """Give every tensor back its requires_grad."""
        for p in self._params.values():
            p.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        return {"allocation": None if self.allocation is None else self.allocation.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.allocation = None if state["allocation"] is None else Allocation.from_json(state["allocation"])
