"""Soups of whole models: candidates are mixed in memory and judged in one model; what is chosen is then merged from the files.

Tensors are those of the loaded models (whatever names the files give them), so any architecture that loads can be
judged.  Floating parameters and buffers are mixed in fp32; integers are the first model's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rankwise._renamed import renamed_argument
from rankwise.errors import MergeError
from rankwise.merge.judge.functional import evaluating

if TYPE_CHECKING:
    from rankwise.merge.judge.evaluator import Batch, Evaluator

Values = dict[str, Tensor]


class Models:
    """Fine-tunes of one start, by folder, and the model in which their mixtures are judged.

    Args:
        evaluator: of the model loaded from the first folder, whose weights are overwritten; its scores and batches judge.
        folders: of the sources.
        load: folder → its model, in fp32.
    """

    @renamed_argument("oracle", "evaluator")
    def __init__(self, evaluator: Evaluator, folders: Sequence[str | Path], load: Callable[[str], nn.Module]):
        self.evaluator, self.folders, self._load = evaluator, [str(f) for f in folders], load
        self.model = evaluator.model
        self.scores: dict[int, float] = {}  # of each source alone, as far as asked
        self._members: list[int] = []  # whose mean is in the model
        self._kept: tuple[list[int], Values] = ([], {})  # a mean that the next candidate starts from

    @property
    def names(self) -> list[str]:
        """Of parameters, one for each tied storage."""
        return [n for n, _ in self.model.named_parameters()]

    def values(self, t: int) -> Values:
        """The floating tensors of source ``t``.

        Raises:
            MergeError: it has other tensors than the first.
        """
        return self._values_of(self._load(self.folders[t]), self.folders[t])

    def _values_of(self, model: nn.Module, folder: str) -> Values:
        found = _floats(model)
        mine = _floats(self.model)
        odd = next((n for n in {**mine, **found} if n not in mine or n not in found or mine[n].shape != found[n].shape), None)
        if odd is not None:
            raise MergeError(
                f"{folder} and {self.folders[0]} differ in {odd!r}; the ingredients of a soup are fine-tunes of one model."
            )
        return found

    # --- greedy -----------------------------------------------------------------------------------------------
    def key(self, t: int) -> tuple[float, str]:
        """(cost, digest) of source ``t`` alone."""
        values = self.values(t)
        self._write(values, [t])
        self.scores[t] = self._score()
        h = hashlib.sha256()
        for n in sorted(values):
            h.update(values[n].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return self._cost(self.scores[t]), h.hexdigest()

    def cost_of_mean(self, members: list[int]) -> float:
        """The cost of the mean of some sources; from the mean of all but the last where that was judged just before."""
        before, last = members[:-1], members[-1]
        if self._members == before:
            self._kept = before, {n: t.clone() for n, t in _floats(self.model).items()}
        elif self._kept[0] != before:
            self._kept = before, self._mean_of(before)
        share, values = 1 / len(members), self.values(last)
        self._write({n: (1 - share) * m + share * values[n] for n, m in self._kept[1].items()}, members)
        return self._cost(self._score())

    def _mean_of(self, members: list[int]) -> Values:
        mean: Values = {}
        for t in members:
            values = self.values(t)
            mean = {n: mean.get(n, 0) + v / len(members) for n, v in values.items()}
        return mean

    @torch.no_grad()
    def _write(self, values: Values, members: list[int]) -> None:
        for n, t in _floats(self.model).items():
            t.copy_(values[n])
        self._members = members

    def scores_of(self, folder: str | Path) -> dict[str, float]:
        """The score on each split of a model in another folder."""
        self._write(self._values_of(self._load(str(folder)), str(folder)), [])
        return {split: self._score(split) for split in self.evaluator.scores}

    def _score(self, split: str | None = None) -> float:
        with evaluating(self.model), torch.no_grad():
            value = float(self.evaluator.scores[self.evaluator._split(split)](self.model))
        if math.isnan(value):
            raise MergeError("The score of a candidate is not a number; a source may have diverged. Leave it out.")
        return value

    def _cost(self, score: float) -> float:
        return -score if self.evaluator.higher_is_better else score

    # --- learned ----------------------------------------------------------------------------------------------
    def mixture(self, by_tensor: Sequence[str]) -> Callable[[Tensor, Batch, Tensor | None], Tensor]:
        """The loss of f(x; Σ_t α_t·θ_t) as a function of α: (1, T), or a row for each parameter in ``by_tensor``; all T are held.

        Buffers are mixed evenly where each parameter has a row of its own.
        """
        held = [self.values(t) for t in range(len(self.folders))]
        stacked = {n: torch.stack([v[n] for v in held]) for n in held[0]}
        del held
        row = {n: i for i, n in enumerate(by_tensor)}
        even = torch.full((len(self.folders),), 1 / len(self.folders))

        def loss(alpha: Tensor, batch: Batch, beta: Tensor | None) -> Tensor:
            mixed = {n: torch.tensordot(alpha[row.get(n, 0)] if n in row or not row else even, x, 1) for n, x in stacked.items()}
            with evaluating(self.model):
                return self.evaluator.of(functional_call(self.model, mixed, (), dict(batch)), batch, beta)

        return loss

    # --- the result ---------------------------------------------------------------------------------------------
    def told(self, written: str | Path) -> dict[str, Any]:
        """The scores of each source and of what was written."""
        for t in range(len(self.folders)):
            if t not in self.scores:
                self.key(t)
        merged = next(iter(self.scores_of(written).values()))
        return {"merged": merged, "sources": {f: self.scores[t] for t, f in enumerate(self.folders)}}


def _floats(model: nn.Module) -> Values:
    """Floating parameters and saved buffers, one for each tied storage."""
    saved = set(model.state_dict(keep_vars=True))
    found = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach() for n, t in found if n in saved and t.is_floating_point()}
