"""What a merge may ask of a model: how good is this value (a number), and how does a loss move with it (a gradient).

Both attach the value for the call and take it off again; the base, the other adapters and what acts by default are as
they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import MergeError, OptionError
from rankwise.merge.engine.files import attach_state
from rankwise.merge.judge.functional import call, evaluating
from rankwise.merge.judge.state_values import digest, factors, plain
from rankwise.runtime.switch import view

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.delta.state import AdapterState

Batch = Mapping[str, Any]
Score = Callable[[nn.Module], float]
#: (logits, batch) → scalar
Loss = Callable[[Tensor, Batch], Tensor]
NAME = "__evaluator"


class Evaluator:
    """Scores and losses of adapter values on one model.

    Args:
        model: anything an adapter can be attached to; called as ``model(**batch)``.  :meth:`score` puts it in eval mode and
            back; :meth:`loss` leaves its mode alone.
        score: a function of the model as it stands, or {split: function}, whose first split is the default.  Its
            selection data must not be what results are reported on.
        loss: of logits and a batch; default the model's own (``outputs.loss``).
        batches: what gradients are taken on (a learned soup's 2 % of the training set).
        higher_is_better: for accuracies; bits a byte, perplexities and losses are better when lower.

    Attributes:
        evaluations: how many scores were computed; those asked again come from a cache by content, which assumes that
            the base does not change.
    """

    def __init__(
        self,
        model: nn.Module,
        score: Score | Mapping[str, Score] | None = None,
        loss: Loss | None = None,
        *,
        batches: Sequence[Batch] = (),
        higher_is_better: bool = False,
    ):
        self.model = model
        self.scores: dict[str, Score] = dict(score) if isinstance(score, Mapping) else {} if score is None else {"held out": score}
        self.batches = list(batches)
        self.higher_is_better = higher_is_better
        self.evaluations = 0
        self._loss = loss
        self._own_loss_is_known = False
        self._cache: dict[tuple[str, str], float] = {}
        self._held: Adapter | None = None

    # --- a number ---------------------------------------------------------------------------------------------
    def score(self, state: AdapterState, split: str | None = None) -> float:
        """The score of the base with ``state`` alone (an empty state: of the base).

        Raises:
            OptionError: no such split, or no score at all; a change that is not exactly low-rank.
            MergeError: the score is not a number; the state holds whole tensors.
        """
        split = self._split(split)
        key = split, digest(state)
        if key not in self._cache:
            with self.attached(state), evaluating(self.model), torch.no_grad():
                value = float(self.scores[split](self.model))
            if math.isnan(value):
                raise MergeError(f"The score on {split!r} is not a number; a source may have diverged. Leave it out.")
            self.evaluations += 1
            self._cache[key] = value
        return self._cache[key]

    def cost(self, state: AdapterState, split: str | None = None) -> float:
        """The score with its sign turned where higher is better: the lower the better, always."""
        return -self.score(state, split) if self.higher_is_better else self.score(state, split)

    def _split(self, split: str | None) -> str:
        if not self.scores:
            raise OptionError("This evaluator has no score; give Evaluator(model, score=…).")
        if split is not None and split not in self.scores:
            raise OptionError(f"This evaluator scores on {', '.join(map(repr, self.scores))}; it was asked for {split!r}.")
        return next(iter(self.scores)) if split is None else split

    # --- a gradient -------------------------------------------------------------------------------------------
    def loss(self, tensors: AdapterState, batch: Batch, *, temperature: Tensor | float | None = None) -> Tensor:
        """The loss of the base with a value whose tensors may carry a graph; gradients flow into it.

        Args:
            tensors: low-rank changes (their A and B·scale are what is differentiated).
            temperature: β of the loss of β·logits; needs ``loss`` where the model's own is not the cross-entropy of its
                logits with the labels (shifted for a causal language model).

        Within ``with evaluator.attached(state)`` a value of the same sites and ranks is not attached anew; a model that
        recomputes needs that, for its backward comes later.
        """
        state = plain(tensors)
        held = self._held if self._held is not None and _fits(self._held, state) else None
        with contextlib.nullcontext(held) if held is not None else self.attached(state) as adapter:
            given = {} if adapter is None else factors(state)
            out = call(self.model, given, batch, name=adapter.name) if adapter is not None else self.model(**batch)
            return self.of(out, batch, temperature)

    def of(self, outputs: Any, batch: Batch, temperature: Tensor | float | None = None) -> Tensor:
        """The loss of a call's outputs."""
        if self._loss is not None:
            logits = outputs.logits if hasattr(outputs, "logits") else outputs
            return self._loss(logits if temperature is None else logits * temperature, batch)
        own = getattr(outputs, "loss", None)
        if own is None:
            raise OptionError(
                "The model gives no loss of its own for this batch; put labels in it, or give Evaluator(model, loss=…)."
            )
        if temperature is None:
            return own
        if not self._own_loss_is_known and not torch.allclose(
            cross_entropy(outputs.logits, batch).detach(), own.detach(), rtol=1e-3
        ):
            raise OptionError(
                "A temperature needs the loss as a function of logits, and this model's own loss is not their cross-entropy "
                "with the labels; give Evaluator(model, loss=…)."
            )
        self._own_loss_is_known = True
        return cross_entropy(outputs.logits * temperature, batch)

    @contextlib.contextmanager
    def attached(self, state: AdapterState) -> Iterator[Adapter | None]:
        """In this block ``state`` acts, alone; after it everything is as it was.  None for an empty state."""
        state = plain(state)
        if not state.sites:
            with self._alone({}):
                yield None
            return
        name = NAME if self._held is None else f"{NAME} {id(state)}"
        adapter = attach_state(self.model, state.detach(), name=name, activate=False)
        before, self._held = self._held, adapter
        try:
            with self._alone({name: 1.0}):
                yield adapter
        finally:
            self._held = before
            adapter.detach()

    def _alone(self, strengths: dict[str, float]) -> Any:
        return view(self.model, strengths) if "rankwise" in self.model._modules else contextlib.nullcontext()


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy with the labels: of classes (N, C), or of next tokens (N, T, V), −100 left out."""
    labels = batch["labels"]
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def _fits(adapter: Adapter, state: AdapterState) -> bool:
    mine = {n: d.component_count() for n, d in adapter.sites.items()}
    return mine == {n: d.exact_rank for n, d in state.sites.items()}
