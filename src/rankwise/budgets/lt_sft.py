"""LT-SFT: train all of W, keep the k entries that moved most, rewind, and train only those; sparse changes that add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rankwise.budgets.base import Budget, Run
from rankwise.catalogue import register
from rankwise.delta.sparse import Entries
from rankwise.delta.state import AdapterState
from rankwise.errors import MergeError, Option, OptionError, RecipeError
from rankwise.recipe import preset

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.delta.base import Delta


PAPER = "ACL 2022, 2110.07560"


@register("budget", "lt_sft", title="LT-SFT: lottery-ticket sparse fine-tuning", paper=PAPER, reference="177", requires=("weight",))
@dataclasses.dataclass(kw_only=True)
class LTSFT(Budget):
    """M = the k entries with the largest |θ_F − θ_0| over all weights of the form ``full`` together; then θ ← θ_0 and

        θ ← θ_0 + M ⊙ (θ_step − θ_0)      after every update, so momentum and weight decay cannot move what M leaves out.

    ``k``: entries, or a share of them below 1.  Exactly k, also where moves are equal (the first in the order of names
    then win).  ``full``: share of each round's steps that train everything.  ``rounds``: each adds k/rounds new entries
    to M and rewinds all of them.  The optimiser starts anew at every change of phase; other parts of the recipe (heads
    saved whole) train throughout and rewind too.  Leave norms and heads out by ``targets`` and ``exclude``.  What M
    leaves out has bits equal to θ_0; the value is :func:`sparse`.  Needs Σ numel of scratch at each choice.

    Source: cambridgeltl/composable-sft, sft/lt_sft.py, which masks gradients only and keeps ties.  Gradients of 32-bit
    weights are masked as well, but after ``max_grad_norm``, whose norm is that of the whole gradient.  The paper's L1
    term is not part of this.  Errors: k beyond the weights; a run too short; ``keep="none"``; sharded parameters (FSDP2).
    """

    example: ClassVar[Mapping[str, Any]] = {"form": "full", "targets": "all", "budget": {"name": "lt_sft", "k": 0.1}}
    k: float = 0.01
    full: float = 0.5
    rounds: int = 1

    def __post_init__(self) -> None:
        whole = self.k < 1 or float(self.k).is_integer()
        if not (self.k > 0 and whole and 0 < self.full < 1 and self.rounds >= 1):
            raise OptionError(
                "The budget 'lt_sft' needs k a share in (0, 1) or a whole number of entries, full in (0, 1) and rounds ≥ 1; "
                f"it got {self.k}, {self.full} and {self.rounds}."
            )
        self._kept: dict[str, Tensor] = {}  # flat int64 indices into the stored weight, sorted
        self._sparse = False  # whether M acts now
        self._others: dict[str, Tensor] = {}  # first values of what is not masked

    # --- the run ------------------------------------------------------------------------------------------------
    def start(self, run: Run) -> None:
        params = run.adapter.named_parameters()
        sharded = next((n for n, p in params.items() if hasattr(p, "placements")), None)
        if sharded is not None:
            raise RecipeError(
                f"The budget 'lt_sft' compares whole tensors, but {sharded!r} is sharded (DTensor); train it under DDP, or without a budget."
            )
        self._theta0 = originals(run.adapter)
        self._params = {n: p for n, p in params.items() if n in self._theta0}
        self._rest = {n: p for n, p in params.items() if n not in self._theta0}
        if not self._others:
            self._others = {n: p.detach().clone() for n, p in self._rest.items()}
        total = sum(p.numel() for p in self._params.values())
        self._k = max(1, round(self.k * total)) if self.k < 1 else int(self.k)
        if not self.rounds <= self._k <= total:
            raise OptionError(
                f"The budget 'lt_sft' keeps k = {self._k:,} of {total:,} entries in {self.rounds} rounds; k lies between rounds and {total:,}."
            )
        self._phases = self._plan(run.total_steps)
        self._masks = {n: _mask(i, self._params[n]) for n, i in self._kept.items()}

    def _plan(self, steps: int) -> dict[int, int]:
        """Step at which a phase begins → entries kept from there on (0: all train)."""
        out: dict[int, int] = {}
        for j in range(self.rounds):
            first, after = j * steps // self.rounds, (j + 1) * steps // self.rounds
            switch = first + max(1, round(self.full * (after - first)))
            if switch >= after:
                raise OptionError(
                    f"The budget 'lt_sft' needs a step of each phase in each of {self.rounds} rounds; the run has {steps} steps, with full = {self.full}."
                )
            out |= {first + 1: 0, switch + 1: (j + 1) * self._k // self.rounds}
        return out

    @torch.no_grad()
    def step_begin(self, run: Run) -> None:
        count = self._phases.get(run.step)
        if count is None or run.step == 1:
            return
        self._sparse = count > 0
        if self._sparse:
            self._choose(run, count)
            for n, p in self._params.items():
                p.copy_(self._theta0[n])
            for n, p in self._rest.items():
                p.copy_(self._others[n])
        run.optimizer.drop([*self._params, *self._rest])
        run.logs["entries"] = float(count or sum(p.numel() for p in self._params.values()))

    def _choose(self, run: Run, count: int) -> None:
        """Widen M to ``count`` entries by the largest moves of those not in it yet; rank 0's choice on every rank."""
        names = sorted(self._params)
        moves = [(self._params[n].float() - self._theta0[n].float()).abs().flatten() for n in names]
        for n, move in zip(names, moves, strict=True):
            if n in self._kept:
                move[self._kept[n].to(move.device)] = torch.inf  # stays
        chosen = largest(torch.cat(moves), count).cpu()
        if run.ddp and torch.distributed.is_available() and torch.distributed.is_initialized():
            sent = [chosen]
            torch.distributed.broadcast_object_list(sent, src=0)
            chosen = sent[0]
        at = 0
        for n, move in zip(names, moves, strict=True):
            self._kept[n] = chosen[(chosen >= at) & (chosen < at + len(move))] - at
            at += len(move)
        self._masks = {n: _mask(i, self._params[n]) for n, i in self._kept.items()}

    @torch.no_grad()
    def observe(self, run: Run) -> None:
        for n, p in self._params.items() if self._sparse else ():
            if p.grad is not None:
                p.grad.mul_(self._masks[n])

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        for n, p in self._params.items() if self._sparse else ():
            p.copy_(torch.where(self._masks[n], p, self._theta0[n]))

    # --- resume -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"kept": self._kept, "sparse": self._sparse, "others": self._others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept, self._sparse, self._others = dict(state["kept"]), bool(state["sparse"]), dict(state["others"])


def originals(adapter: Adapter) -> dict[str, Tensor]:
    """θ_0 of every weight that the form ``full`` trains, by the parameter's name in the adapter.

    Raises:
        OptionError: a weight trained without a copy of the base.
    """
    out: dict[str, Tensor] = {}
    for name, d in adapter.sites.items():
        if d.in_place:
            if d.original is None:
                raise OptionError(
                    f"{name!r} is trained without a copy of the base (",
                    Option("keep", "none"),
                    "), so nothing can rewind it; use ",
                    Option("keep", "copy"),
                    ".",
                )
            out[f"{name}::weight"] = d.original.detach()  # type: ignore[operator]
    return out


def largest(moves: Tensor, k: int) -> Tensor:
    """Sorted indices of exactly the ``k`` largest of a vector; of equal ones the first."""
    edge = moves.topk(k).values[-1]
    above, equal = (moves > edge).nonzero().flatten(), (moves == edge).nonzero().flatten()
    return torch.cat([above, equal[: k - len(above)]]).sort().values


def _mask(index: Tensor, like: Tensor) -> Tensor:
    flat = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    flat[index.to(like.device)] = True
    return flat.view(like.shape)


# --- the value -------------------------------------------------------------------------------------------------
@torch.no_grad()
def sparse(adapter: Adapter, *, tolerance: float = 1e-7) -> AdapterState:
    """φ = θ − θ_0 of an adapter of form ``full`` as ``Entries`` (fp32) at each site that moved; |φ| < ``tolerance`` is dropped.

    Values of tasks and languages compose by ``+`` and attach by ``rankwise.merge.attach_state``.

    Raises:
        MergeError: a part of the adapter is of another form, whose change is no set of entries.
    """
    sites: dict[str, Delta] = {}
    for name, d in adapter.sites.items():
        if not d.in_place:
            raise MergeError(f"The change at {name!r} is of another form than 'full', so it is no set of entries; save it apart.")
        flat = d.delta().dense().flatten()
        index = (flat.abs() >= max(tolerance, torch.finfo(torch.float32).tiny)).nonzero().flatten()
        if len(index):
            sites[name] = Entries(index, flat[index].clone(), tuple(d.site.spec.shape))
    return AdapterState(sites)


def overlap(states: Sequence[AdapterState]) -> dict[str, int]:
    """Site → number of entries that more than one of the sparse values changes (0 where none is shared).

    Raises:
        MergeError: a change that is no ``Entries``.
    """
    out: dict[str, int] = {}
    for name in sorted({n for s in states for n in s.sites}):
        found = [s.sites[name] for s in states if name in s.sites]
        odd = next((d for d in found if not isinstance(d, Entries)), None)
        if odd is not None:
            raise MergeError(f"The change at {name!r} is {odd.kind}; overlap counts the entries of sparse values ('entries').")
        times = torch.cat([d.index for d in found]).unique(return_counts=True)[1]  # type: ignore[attr-defined]
        out[name] = int((times > 1).sum())
    return out


preset("lt_sft", "LT-SFT: full fine-tuning of the k entries that move most", form="full", budget="lt_sft")
