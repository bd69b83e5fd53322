"""One adapter in training beside serving, as four primitives: forward_backward, optim_step, sample, save.

Each is a :class:`Task`, done in pieces of bounded cost, so that whoever drives them (a job's schedule, or a loop of
one's own, as in reinforcement learning) never holds a serving step up.  The optimiser, its schedule, budgets and checks
are a plain :class:`~rankwise.train.session.Session`'s.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.adapter import attach
from rankwise.errors import OptionError
from rankwise.runtime.view import entered
from rankwise.serve.engine.sampler import SamplerState
from rankwise.serve.engine.sampler import sample as draw
from rankwise.serve.finetune.chunked_backward import ChunkedBackward, Sample
from rankwise.serve.finetune.layerwise import LayerwiseModel, joined
from rankwise.serve.finetune.recipes import refuse_recipe
from rankwise.serve.finetune.windowed_attention import Before
from rankwise.store.atomic import replace_file
from rankwise.train.checkpoint import RUN_STATE, begin, publish, restore_adapter
from rankwise.train.session import Session, rng_state, set_rng_state

if TYPE_CHECKING:
    from rankwise.recipe import Recipe
    from rankwise.serve.types import Sampling


class Task:
    """Work in pieces; ``result`` is filled when the last one is done."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    @property
    def done(self) -> bool:
        return self.result.done()

    def take(self, budget: float) -> float:
        """Do the next piece, of about ``budget`` passes of a token at most; what it cost."""
        raise NotImplementedError(f"{type(self).__name__} must do its work.")


class Training:
    """An adapter on a copy of the served model that shares its tensors, its optimiser, and the view it acts in.

    Args:
        net: of its own: nothing else may be attached there or run there.
        samples: for inits that read statistics.
        options: of the Session (``lr``, ``total_steps``, ``schedule``, …).

    Raises:
        RecipeError: see :func:`~rankwise.serve.finetune.recipes.refuse_recipe`.
    """

    def __init__(self, net: LayerwiseModel, recipe: Recipe, samples: Sequence[Sample] = (), *, most: int = 256, **options: Any):
        refuse_recipe(recipe)
        self.net, self.most = net, most
        with net.plain():
            self.adapter = attach(net.model, recipe, calibration=_batches(samples, net.device) or None, name="job", activate=False)
        self.adapter.module.train()
        self.session = Session(net.model, self.adapter, **options)
        self.view = self.adapter._registry.view({"job": 1.0})

    # --- the primitives -----------------------------------------------------------------------------------------
    def forward_backward(self, samples: Sequence[Sample]) -> Task:
        """Add the gradient of the mean loss over all labels of ``samples``; gives that loss."""
        return _ForwardBackward(self, samples)

    def optim_step(self, lr: float | None = None) -> Task:
        """One step of the optimiser; ``lr`` overrules the schedule's rate from now on.  Gives the Session's logs."""
        return _OptimStep(self, lr)

    def sample(self, prompt: Sequence[int], sampling: Sampling) -> Task:
        """Continue ``prompt`` with the adapter as it is now; gives the token ids."""
        return _Draw(self, prompt, sampling)

    def save(self, folder: Path) -> Path:
        """Write the adapter to ``folder``, atomically; for a thread of its own, while nothing is taken."""
        return self.adapter.save(folder)

    # --- restart ------------------------------------------------------------------------------------------------
    def checkpoint(self, folder: Path, extra: Mapping[str, Any]) -> Path:
        """Adapter, optimiser and ``extra`` (plain data) as ``folder/checkpoint-N``, whole or absent; older ones go.

        Raises:
            TrainingError: between two halves of a step.
        """
        hidden = begin(folder)
        self.adapter.save(hidden)
        buffer = io.BytesIO()
        torch.save({"session": self.session.state_dict(), "extra": dict(extra)}, buffer)
        replace_file(hidden / RUN_STATE, buffer.getvalue())
        final = folder / f"checkpoint-{self.session.t}"
        older = [p for p in folder.glob("checkpoint-*") if p != final]
        publish(hidden, final)
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
        return final

    def restore(self, folder: Path) -> dict[str, Any]:
        """Go on from a checkpoint; what ``extra`` was."""
        restore_adapter(self.adapter, folder)
        state = torch.load(folder / RUN_STATE, weights_only=True)
        kept = rng_state()  # the process is not the run's alone
        try:
            self.session.load_state_dict(state["session"])
        finally:
            set_rng_state(kept)
        return dict(state["extra"])

    def close(self) -> None:
        """Take the adapter out; nothing of it is left on the copy."""
        self.session.close()
        self.session.optimizer.zero_grad(set_to_none=True)
        self.adapter.detach()


class _ForwardBackward(Task):
    def __init__(self, training: Training, samples: Sequence[Sample]):
        super().__init__()
        if not samples:
            raise OptionError("forward_backward got no samples; give one at least.")
        self.training = training
        self.waiting = list(samples)
        self.labels = sum(s.learnt for s in samples)
        self.work: ChunkedBackward | None = None
        self.loss = 0.0

    def take(self, budget: float) -> float:
        t = self.training
        if self.work is None:
            t.session.step_begin()
            self.work = ChunkedBackward(t.net, self.waiting.pop(0), t.view, divisor=self.labels, most=t.most)
        cost = self.work.take(budget).cost
        if self.work.finished:
            self.loss += self.work.loss
            self.work = None
            if not self.waiting:
                self.result.set_result(self.loss)
        return cost


class _OptimStep(Task):
    def __init__(self, training: Training, lr: float | None):
        super().__init__()
        if lr is not None and not (lr > 0 and math.isfinite(lr)):
            raise OptionError(f"lr = {lr}; it is a positive number.")
        self.training, self.lr = training, lr

    def take(self, budget: float) -> float:
        s = self.training.session
        if self.lr is not None:
            s.scheduler.base_lrs = [self.lr] * len(s.optimizer.param_groups)
            for group, factor in zip(s.optimizer.param_groups, s.scheduler.lr_lambdas, strict=True):
                group["lr"] = self.lr * factor(s.t)
        s.step()
        self.result.set_result(dict(s.logs))
        return 0.0


class _Draw(Task):
    def __init__(self, training: Training, prompt: Sequence[int], sampling: Sampling):
        super().__init__()
        if not prompt:
            raise OptionError("The prompt to sample from is empty; give one token at least.")
        self.training, self.prompt, self.sampling = training, list(prompt), sampling
        self.drawn: list[int] = []
        self.at = 0
        self.earlier: list[tuple[Tensor, Tensor] | None] = [None] * len(training.net.layers)
        self.state = SamplerState.of(sampling, 0, "sample")

    @torch.no_grad()
    def take(self, budget: float) -> float:
        net = self.training.net
        tokens = [*self.prompt, *self.drawn]
        end = min(len(tokens), self.at + max(1, int(min(budget, self.training.most))))
        ids = torch.tensor(tokens[self.at : end], device=net.device)
        with entered(self.training.view):
            h, calls = net.enter(ids, self.at)
            for i, call in enumerate(calls):
                before = Before(self.earlier[i])
                h = net.layer(i, h, call, before)
                self.earlier[i] = joined(self.earlier[i], before.own)
            cost, self.at = float(len(ids)), end
            if end == len(tokens):
                cost += net.head_cost
                self._append(net.leave(ids[-1:], end - 1, h[:, -1:])[0].float())
        return cost

    def _append(self, logits: Tensor) -> None:
        token = draw(logits, [self.state])[0].id
        self.drawn.append(token)
        if token in self.sampling.stop_ids or len(self.drawn) >= self.sampling.max_tokens:
            self.earlier = []
            self.result.set_result(self.drawn)


def _batches(samples: Sequence[Sample], device: torch.device, most: int = 16) -> list[dict[str, Tensor]]:
    """The first samples as the batches that calibration reads."""
    return [
        {"input_ids": torch.tensor([s.tokens], device=device), "labels": torch.tensor([s.labels], device=device)}
        for s in samples[:most]
    ]
