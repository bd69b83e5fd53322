"""Model soups: uniform_soup averages fine-tunes of one base, greedy_soup those that help, learned_soup weighs them by gradients.

The soup of merged models is W₀ + Σ w_t·ΔW_t: low-rank of Σ r_t, exact.  Averaging A and B apart is another, lossy
method (``linear``).  Greedy and learned soups ask an :class:`~rankwise.merge.judge.evaluator.Evaluator`; of whole models they are
judged in :mod:`rankwise.merge.judge.model_soups`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from rankwise._renamed import renamed_argument
from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.delta.state import AdapterState
from rankwise.errors import OptionError
from rankwise.merge.engine.base import Merge, Source, factors_of, merge_states, one_of, state_of
from rankwise.merge.engine.result import Merged
from rankwise.merge.judge.state_values import digest
from rankwise.merge.methods.weighings import row

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import Stack
    from rankwise.merge.judge.evaluator import Batch, Evaluator
    from rankwise.merge.judge.model_soups import Models

row(
    "uniform_soup",
    "Uniform soup: the mean of fine-tunes",
    lambda rule, gram, w: torch.full_like(w, 1 / len(w)),
    paper="arXiv 2203.05482",
    reference="217",
    works_on="weights",
    uses_weights=False,
    doc="""(1/T)·Σ θ_t of T fine-tunes of one start, as whole models or as adapters (exact, of rank Σ r_t).  Order does not matter.  Fine-tunes of
    different starts do not mix: their mean is no model.  ``average`` is the same with weights.  Source: mlfoundations/model-soups.""",
)


def uniform(sources: Sequence[Source]) -> AdapterState:
    """(1/T)·Σ ΔW_t."""
    return merge_states(sources, None, "uniform_soup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soup(Merge):
    """Base: a method finds weights that sum to one; the sum itself is exact."""

    finds_weights: ClassVar[bool] = True
    works_on: ClassVar[str] = "weights"

    def combine(self, stack: Stack, seed: int) -> Merged:
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
    does not matter.  T scores of singles and T − 1 of means; of whole models three are held at a time.

    Source: mlfoundations/model-soups, main.py.
    """

    strict: bool = False

    def weigh(self, sources: Sequence[Source], evaluator: Any) -> Tensor:
        """1/|S| for members of S, 0 for the others: (T,), fp64."""
        values = [state_of(s) for s in sources]
        keys = [(evaluator.cost(v), digest(v)) for v in values]
        return self.chosen(keys, lambda members: evaluator.cost(uniform([values[t] for t in members])))

    def weigh_models(self, models: Models) -> Tensor:
        return self.chosen([models.key(t) for t in range(len(models.folders))], models.cost_of_mean)

    def chosen(self, keys: Sequence[tuple[float, str]], cost_of_mean: Callable[[list[int]], float]) -> Tensor:
        """From each source's (cost, name by content) and the cost of a mean of some, in the order they joined."""
        order = sorted(range(len(keys)), key=keys.__getitem__)
        kept, best = order[:1], keys[order[0]][0]
        for t in order[1:]:
            cost = cost_of_mean([*kept, t])
            if cost < best or (cost == best and not self.strict):
                kept, best = [*kept, t], cost
        weights = torch.zeros(len(keys), dtype=torch.float64)
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
    """min over α, β of loss(β·f(x; W₀ + Σ_t α_t·ΔW_t)) on the evaluator's batches, α = softmax(a), a = 1 at the start (the uniform soup).

    ``per="model"``: T numbers; "site": T a site (of whole models: a tensor).  AdamW at ``lr`` without weight decay, ``epochs`` passes; β is a scalar
    temperature, 1 at the start, learnt along and then dropped (``temperature=False`` leaves it at 1).  The base and the
    sources are frozen.  Of adapters only factors are held; of whole models, as in the released code, all T.

    Source: mlfoundations/model-soups, learned_bylayer.py.  Errors: an evaluator without batches.

    Args:
        per: "model" or "site".
        lr: of AdamW.
        epochs: passes over the batches.
        temperature: learn β along.
    """

    per: Literal["model", "site"] = "model"
    lr: float = 0.05
    epochs: int = 5
    temperature: bool = True

    def __post_init__(self) -> None:
        one_of("learned_soup", "per", self.per, ("model", "site"))
        if not self.lr > 0 or self.epochs < 0:
            raise OptionError(f"The merge 'learned_soup' needs lr > 0 and epochs ≥ 0; it got {self.lr} and {self.epochs}.")

    def weigh(self, sources: Sequence[Source], evaluator: Any) -> Tensor | dict[str, Tensor]:
        """(T,), or a (T,) each site."""
        return self.learn(sources, evaluator).weights

    @renamed_argument("oracle", "evaluator")
    def learn(
        self, sources: Sequence[Source], evaluator: Evaluator, progress: Callable[[int, float], None] = lambda n, loss: None
    ) -> Learned:
        """The weights with β and each step's loss."""
        mixture = Mixture(sources)
        rows = len(mixture.names) if self.per == "site" else 1

        def loss(alpha: Tensor, batch: Batch, beta: Tensor | None) -> Tensor:
            return evaluator.loss(mixture.at(alpha), batch, temperature=beta)

        with evaluator.attached(mixture.at(torch.full((rows, len(sources)), 1 / len(sources)))):
            alpha, beta, losses = self.descend(rows, len(sources), evaluator.batches, loss, progress)
        weights = dict(zip(mixture.names, alpha, strict=True)) if self.per == "site" else alpha[0]
        return Learned(weights, beta, losses)

    def weigh_models(self, models: Models) -> Tensor | dict[str, Tensor]:
        names = models.names if self.per == "site" else []
        mixed = models.mixture(names)
        alpha, _, _ = self.descend(len(names) or 1, len(models.folders), models.evaluator.batches, mixed)
        return dict(zip(names, alpha, strict=True)) if names else alpha[0]

    def descend(
        self,
        rows: int,
        count: int,
        batches: Sequence[Batch],
        loss: Callable[[Tensor, Batch, Tensor | None], Tensor],
        progress: Callable[[int, float], None] = lambda n, loss: None,
    ) -> tuple[Tensor, float, list[float]]:
        """α (rows, count) in fp64, β and each step's loss, from ``loss(α, batch, β or None)``.

        Args:
            rows: of α.
            count: of sources.
            batches: of one pass.
            loss: of (α, batch, β or None).
            progress: called with each step's number and loss.
        """
        if not batches:
            raise OptionError("The merge 'learned_soup' takes gradients on batches; give Evaluator(model, batches=…).")
        raw = torch.ones(rows, count, requires_grad=True)
        beta = torch.ones((), requires_grad=self.temperature)
        steps = torch.optim.AdamW([p for p in (raw, beta) if p.requires_grad], lr=self.lr, weight_decay=0.0)
        losses: list[float] = []
        for batch in [b for _ in range(self.epochs) for b in batches]:
            found = loss(raw.softmax(-1), batch, beta if self.temperature else None)
            grads = torch.autograd.grad(found, steps.param_groups[0]["params"])
            for p, g in zip(steps.param_groups[0]["params"], grads, strict=True):
                p.grad = g
            steps.step()
            losses.append(float(found.detach()))
            progress(len(losses), losses[-1])
        return raw.detach().double().softmax(-1), float(beta.detach()), losses


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
            pairs = [(t, p) for t, s in enumerate(sources) if (p := factors_of(s.sites.get(n), n)) is not None]
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
