"""Arrow: route each token to the LoRAs whose top singular direction it is most aligned with; nothing is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.errors import Option, OptionError, TargetError
from rankwise.forms.lora import LoraLayer
from rankwise.routers.base import Routed, Router, RouterModule
from rankwise.routers.decision import Decision
from rankwise.runtime.registry import registry_of
from rankwise.store.peft.export import read_peft

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer, Plan
    from rankwise.sites.site import Site


class Prototypes(RouterModule):
    """Weights are softmax over the top-k of |x·v_e| / T.

    Args:
        V: (E, in), unit rows v_e.
        sizes: rank of each expert.
        k: experts per token.
        temperature: T.
    """

    V: Tensor

    def __init__(self, V: Tensor, sizes: list[int], k: int, temperature: float):
        super().__init__()
        self.register_buffer("V", V)
        self.sizes, self.k, self.temperature = sizes, k, temperature

    def route(self, x: Tensor, z: Tensor | None = None) -> Decision:
        top = (x.float() @ self.V.mT).abs().topk(min(self.k, len(self.sizes)), dim=-1)
        return Decision((top.values / self.temperature).softmax(-1), len(self.sizes), index=top.indices, sizes=self.sizes)


class Library(Routed):
    """Frozen experts of different ranks, gated by their prototypes."""

    router: Prototypes

    def __init__(self, inner: AdapterLayer, router: Prototypes):
        super().__init__(inner, router, 1.0)
        for p in inner.parameters():
            p.requires_grad_(False)

    def file_state(self) -> dict[str, Any]:
        return {"sizes": self.router.sizes}

    def restore_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> None:
        sizes = list(state["sizes"])
        self.router.sizes, self.router.V = sizes, torch.zeros(len(sizes), self.site.spec.inp)


@register(
    "router",
    "arrow",
    title="Arrow: training-free routing over a library of adapters",
    paper="arXiv 2405.11157",
    requires=("gate",),
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrow(Router):
    """v_e = top right singular vector of B_e·A_e; score |x·v_e|; top-k; softmax over the chosen / T; Δy = Σ w_e·s_e·B_e·A_e·x.

    Args:
        adapters: folders of PEFT adapters (or native ones that are low-rank); ranks and scales may differ, each site may have
            its own subset.
        general: folders of adapters of general knowledge (GenKnowSub): A_e ← A_e − mean A_g and B_e ← B_e − mean B_g, each
            factor by itself and as stored, before prototypes are taken.  That is no difference of ΔW: other factors of the
            same ΔW (T·A, B·T⁻¹) give another.
        top_k: experts per token.
        temperature: T.

    v_e is exact: QR of B and Aᵀ, SVD of the r×r core, where HF PEFT runs 15 power iterations from a random
    start, which have not converged where σ₁ ≈ σ₂.  x is not normalised (as there), so the temperature acts on its norm.
    N·R memory; PEFT's layer keeps N·E·out.

    Source: HF PEFT, tuners/lora/arrow.py; Ostapenko et al. 2024.  Errors: fewer than one adapter; targets that no adapter has; general
    adapters of another rank, or that leave a target out.
    """

    example: ClassVar[None] = None  # trains nothing and needs adapters; its own tests run the contract
    adapters: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    top_k: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for option in ("adapters", "general"):
            if isinstance(getattr(self, option), str):
                raise OptionError(
                    f"The router 'arrow' takes {option} as a list of folders; it got the one string {getattr(self, option)!r}."
                )
            object.__setattr__(self, option, tuple(getattr(self, option)))
        if self.top_k < 1 or not self.temperature > 0:
            raise OptionError(f"The router 'arrow' needs top_k ≥ 1 and temperature > 0; it got {self.top_k}, {self.temperature}.")

    def check(self, form: Any, part: Any) -> None:
        if not self.adapters:
            raise OptionError(
                "The router 'arrow' routes over adapters you have: give ", Option("adapters", ["folder", "folder", ...]), "."
            )

    def _library(self, model: nn.Module, sites: Sequence[Site]) -> dict[str, list[tuple[Tensor, Tensor]]]:
        tasks, general = ([_read(model, f) for f in folders] for folders in (self.adapters, self.general))
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for s in sites:
            experts = [state[s.name] for state in tasks if s.name in state]
            if not experts:
                have = sorted({n.rpartition(".")[2] for n in tasks[-1]})
                raise TargetError(
                    f"The router 'arrow': no adapter has a change at {s.name!r}; set targets to what they adapt ({', '.join(have[:6])})."
                )
            found[s.name] = [d.factors() for d in (less(experts, general, s.name) if general else experts)]
        return found

    def ranks(self, model: nn.Module, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, int]:
        return {n: sum(A.shape[0] for A, _ in experts) for n, experts in self._library(model, sites).items()}

    def install(
        self, model: nn.Module, sites: Sequence[Site], made: dict[str, AdapterLayer], plan: Plan
    ) -> dict[str, AdapterLayer]:
        restoring = plan.notes.get("restoring", False)
        library = {} if restoring else self._library(model, sites)
        out: dict[str, AdapterLayer] = {}
        for s in sites:
            experts = library.get(s.name, [])
            inner = made[s.name]
            inner.scale = 1.0
            if experts:
                assert isinstance(inner, LoraLayer)  # the one form with the word "gate", which this router needs
                with torch.no_grad():
                    inner.A.copy_(torch.cat([A for A, _ in experts]))
                    inner.B.copy_(torch.cat([B for _, B in experts], dim=1))
            V = torch.stack([dominant(A, B) for A, B in experts]) if experts else torch.zeros(1, s.spec.inp)
            out[s.name] = Library(
                inner, Prototypes(V.to(s.device), [A.shape[0] for A, _ in experts] or [1], self.top_k, self.temperature)
            )
        return out


def dominant(A: Tensor, B: Tensor) -> Tensor:
    """The top right singular vector (in,) of B·A, unit length, fp32; its sign is of no matter."""
    _, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().mT)
    _, _, Vh = torch.linalg.svd(Rb @ Ra.mT)
    return (Qa @ Vh[0]).float()


def _read(model: nn.Module, folder: str) -> Mapping[str, LowRank]:
    return read_peft(folder, registry_of(model).known)[0].sites  # type: ignore[return-value]


def less(experts: Sequence[LowRank], general: Sequence[Mapping[str, LowRank]], name: str) -> list[LowRank]:
    """The experts of site ``name``, each factor minus the mean of the general adapters' (GenKnowSub)."""
    there = [state[name] for state in general if name in state]
    if len(there) < len(general) or any(g.A.shape != e.A.shape for g in there for e in experts):
        ranks = sorted({len(d.A) for d in [*experts, *there]})
        raise OptionError(
            f"The router 'arrow' subtracts the factors of {len(general)} general adapters at {name!r}, where {len(there)} have a change and the "
            f"ranks are {ranks}; it needs all of them there, with the rank of every task's adapter."
        )
    A, B = (torch.stack([getattr(g, t) for g in there]).mean(0) for t in "AB")
    return [LowRank(e.A - A, e.B - B, e.scale) for e in experts]
