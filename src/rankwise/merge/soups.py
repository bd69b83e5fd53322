"""Model soups: average fine-tunes of one base, chosen by a held-out score (greedy) or weighed by gradients (learned).

The soup of merged models is W₀ + Σ w_t·ΔW_t: low-rank of Σ r_t, exact.  Averaging A and B apart is another, lossy
method (``linear``).  The uniform soup is the merge ``average`` with equal weights; the catalogue's two here need an
:class:`~rankwise.merge.oracle.Oracle`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import OptionError
from rankwise.merge.base import Merge, Merged, Source, _factors, merge_states, one_of
from rankwise.merge.oracle import Oracle, digest
from rankwise.merge.stack import FactorStack, Stack


def uniform(sources: Sequence[Source]) -> AdapterState:
    """(1/T)·Σ ΔW_t."""
    return merge_states(sources, None, "average")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soup(Merge):
    """Base: a method finds weights that sum to one; the sum itself is exact."""

    needs_oracle: ClassVar[bool] = True
    checkpoints: ClassVar[bool] = False

    def combine(self, stack: Stack, seed: int) -> Merged:
        assert isinstance(stack, FactorStack)
        return Merged(stack.total())


@register(
    "merge",
    "greedy_soup",
    title="Greedy soup: add what does not hurt",
    paper="arXiv 2203.05482",
    reference="217",
    exports_to_peft=True,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GreedySoup(Soup):
    """Sources by their score, best first; S = {best}; each next joins where mean(S ∪ {t}) scores no worse than mean(S).

    Never below the best single source on the selection split.  ``strict``: it joins only where the score improves, as the
    released code has it (the paper: not worse).  Equal scores are taken in order of content, so the sources' order
    does not matter.  T scores of singles and T − 1 of means.

    Source: mlfoundations/model-soups, main.py.
    """

    strict: bool = False

    def weigh(self, sources: Sequence[Source], oracle: Any) -> Tensor:
        """1/|S| for members of S, 0 for the others: (T,), fp64."""
        values = [_value(s) for s in sources]
        order = sorted(range(len(values)), key=lambda t: (oracle.cost(values[t]), digest(values[t])))
        kept, best = order[:1], oracle.cost(values[order[0]])
        for t in order[1:]:
            cost = oracle.cost(uniform([values[u] for u in [*kept, t]]))
            if cost < best or (cost == best and not self.strict):
                kept, best = [*kept, t], cost
        weights = torch.zeros(len(values), dtype=torch.float64)
        weights[kept] = 1 / len(kept)
        return weights


@register(
    "merge",
    "learned_soup",
    title="Learned soup: weights by gradient on held-out data",
    paper="arXiv 2203.05482",
    reference="217",
    exports_to_peft=True,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedSoup(Soup):
    """min over α, β of loss(β·f(x; W₀ + Σ_t α_t·ΔW_t)) on the oracle's batches, α = softmax(a), a = 1 at the start (the uniform soup).

    ``per="model"``: T numbers; "site": T a site.  AdamW at ``lr`` without weight decay, ``epochs`` passes; β is a scalar
    temperature, 1 at the start, learnt along and then dropped (``temperature=False`` leaves it at 1).  The base and the
    sources are frozen.  The released code keeps every whole model in memory; here only factors.

    Source: mlfoundations/model-soups, learned_bylayer.py.  Errors: an oracle without batches.
    """

    per: Literal["model", "site"] = "model"
    lr: float = 0.05
    epochs: int = 5
    temperature: bool = True

    def __post_init__(self) -> None:
        one_of("learned_soup", "per", self.per, ("model", "site"))
        if not self.lr > 0 or self.epochs < 0:
            raise OptionError(f"The merge 'learned_soup' needs lr > 0 and epochs ≥ 0; it got {self.lr} and {self.epochs}.")

    def weigh(self, sources: Sequence[Source], oracle: Any) -> Tensor | dict[str, Tensor]:
        """(T,), or a (T,) each site."""
        return self.learn(sources, oracle).weights

    def learn(
        self, sources: Sequence[Source], oracle: Oracle, progress: Callable[[int, float], None] = lambda n, loss: None
    ) -> Learned:
        """The weights with β and each step's loss."""
        if not oracle.batches:
            raise OptionError("The merge 'learned_soup' takes gradients on batches; give Oracle(model, batches=…).")
        mixture = Mixture(sources)
        rows = len(mixture.names) if self.per == "site" else 1
        raw = torch.ones(rows, len(sources), requires_grad=True)
        beta = torch.ones((), requires_grad=self.temperature)
        steps = torch.optim.AdamW([p for p in (raw, beta) if p.requires_grad], lr=self.lr, weight_decay=0.0)
        losses: list[float] = []
        with oracle.attached(mixture.at(raw.softmax(-1).detach())):
            for batch in [b for _ in range(self.epochs) for b in oracle.batches]:
                loss = oracle.loss(mixture.at(raw.softmax(-1)), batch, temperature=beta if self.temperature else None)
                grads = torch.autograd.grad(loss, steps.param_groups[0]["params"])
                for p, g in zip(steps.param_groups[0]["params"], grads, strict=True):
                    p.grad = g
                steps.step()
                losses.append(float(loss.detach()))
                progress(len(losses), losses[-1])
        alpha = raw.detach().double().softmax(-1)
        weights = dict(zip(mixture.names, alpha, strict=True)) if self.per == "site" else alpha[0]
        return Learned(weights, float(beta.detach()), losses)


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """``weights``: (T,) or by site; ``beta``: the temperature; ``losses``: one a step, the first of the uniform soup."""

    weights: Tensor | dict[str, Tensor]
    beta: float
    losses: list[float]


class Mixture:
    """W₀ + Σ_t α_t·ΔW_t as a differentiable function of α: Â = stack(A_t), B̂ = [α_t·s_t·B_t]."""

    def __init__(self, sources: Sequence[Source]):
        self.names = sorted({n for s in sources for n in s.sites})
        self._parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for n in self.names:
            pairs = [(t, p) for t, s in enumerate(sources) if (p := _factors(s.sites.get(n), n)) is not None]
            owner = torch.tensor([t for t, p in pairs for _ in range(p[0].shape[0])])
            A, B = torch.cat([p[0] for _, p in pairs]), torch.cat([p[1] for _, p in pairs], dim=1)
            self._parts[n] = A.float(), B.float(), owner

    def at(self, alpha: Tensor) -> AdapterState:
        """α: (T,), (1, T) or (sites, T) → a value that carries α's graph, in α's dtype."""
        rows = alpha.reshape(-1, alpha.shape[-1]).expand(len(self.names), -1)
        sites = {}
        for n, a in zip(self.names, rows, strict=True):
            A, B, owner = self._parts[n]
            sites[n] = LowRank(A.to(a.dtype), B.to(a.dtype) * a[owner])
        return AdapterState(sites)


def _value(source: Source) -> AdapterState:
    return source if isinstance(source, AdapterState) else AdapterState(dict(source.sites.items()), dict(source.full or {}))
