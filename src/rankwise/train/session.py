"""A Session runs the parts of a recipe in one documented order, in anybody's own loop.

Order of one optimiser step, the same in every loop::

    step_begin      budget: allocate, sample, probe
    micro-batch     forward (yours) → penalty(out, batch) → backward (yours)   … `accumulate` times
    step            gradients finite? → grad_extra of the losses → clip → observe (budget) → transforms, update → after_update (budget, resync)
                    → routers' after_step → gradients cleared
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.budgets.base import Budget, Run
from rankwise.errors import OptionError, TrainingError
from rankwise.forms import packed
from rankwise.optim.base import Param
from rankwise.optim.optimizer import TransformOptimizer
from rankwise.recipe import Recipe, build
from rankwise.routers.base import collect_losses, finish_step, recording, routers_in
from rankwise.runtime import fast
from rankwise.train.guard import check_first_backward, first_overflow
from rankwise.train.settings import TrainSettings

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.losses.base import LossTerm


class Session:
    """Owns the optimiser of one adapter, and runs its budget, losses and routers.

    Args:
        model: what is trained; its own parameters stay frozen.
        adapter: attached to it.
        recipe: whose optimiser, budget and losses act; None: the adapter's own.
        betas, eps: of the optimiser; None: its own.
        total_steps: optimiser steps of the whole run; schedules and budgets are laid out over it.
        accumulate: micro-batches an optimiser step.
        lr, schedule, warmup, weight_decay, max_grad_norm, seed: see :class:`~rankwise.train.settings.TrainSettings`.
        check: after the first backward, refuse adapters with no gradient, and sites that took no part.
        ddp: gradients are averaged over processes, so every rank must decide alike (default: where ``model`` is torch's DDP).

    Example:
        >>> import rankwise as rw
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> adapter = rw.attach(model, rw.Recipe(form="lora", r=2))
        >>> s = Session(model, adapter, lr=1e-3, total_steps=2)
        >>> for batch in [{"input": torch.randn(4, 8)}, {"input": torch.randn(4, 8)}]:
        ...     s.step_begin()
        ...     out = model(**batch)
        ...     (out.square().mean() + s.penalty(out, batch)).backward()
        ...     taken = s.step()
        >>> s.t
        2
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        recipe: Recipe | None = None,
        *,
        lr: float,
        total_steps: int,
        accumulate: int = 1,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        schedule: str = "linear",
        warmup: float = 0,
        max_grad_norm: float | None = None,
        seed: int | None = None,
        check: bool = True,
        ddp: bool | None = None,
    ):
        if total_steps < 1 or accumulate < 1:
            raise OptionError(f"total_steps and accumulate are at least 1; they are {total_steps} and {accumulate}.")
        settings = TrainSettings(
            lr=lr,
            steps=total_steps,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )
        self.model, self.adapter = model, adapter
        self.recipe = recipe or adapter.recipe
        self.settings, self.accumulate, self.total_steps = settings, accumulate, total_steps
        seed = self.recipe.seed if seed is None else seed
        method = build("optimizer", self.recipe.optimizer or "adamw")
        self.optimizer = TransformOptimizer(method, params_of(adapter), lr, weight_decay, betas=betas, eps=eps, seed=seed)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.lr_lambda(total_steps))
        self.losses: list[LossTerm] = [build("loss", n) for n in self.recipe.losses]
        self.budget: Budget | None = build("budget", self.recipe.budget) if self.recipe.budget else None
        if ddp is None:
            ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        self.run = Run(adapter, self.optimizer, total_steps, seed, step=0, ddp=ddp)
        self.logs: dict[str, float] = {}
        self.routed = bool(routers_in(adapter.module))
        self._check = check
        self._micro = 0
        self._begun = False
        self._last: Mapping[str, Any] | None = None
        self._recorder: Any = None
        if self.budget is not None:
            self.optimizer.observers.append(lambda ctx, grads: self.budget.observe(self.run))  # type: ignore[union-attr]
            self.optimizer.after.append(lambda ctx: self.budget.after_update(self.run))  # type: ignore[union-attr]
            self.budget.start(self.run)

    @property
    def t(self) -> int:
        """Optimiser steps taken."""
        return self.optimizer.steps

    # --- the events -----------------------------------------------------------------------------------------
    def step_begin(self) -> None:
        """Before a micro-batch's forward; the budget acts before the first of a step."""
        if self._micro == 0 and not self._begun:
            self._begun = True
            self.run.step = self.optimizer.steps + 1
            if self.budget is not None:
                self.budget.step_begin(self.run)
        if self.routed and self._recorder is None:
            self._recorder = recording(self.adapter.module)
            self._recorder.__enter__()

    def penalty(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        """What the recipe's losses and routers add to the task's loss of this micro-batch; 0 where there are none."""
        self._stop_recording()
        self._last = batch
        terms: dict[str, Tensor] = dict(collect_losses(self.adapter.module)) if self.routed else {}
        reference = self.reference(batch) if any(t.needs_reference for t in self.losses) else None
        for loss in self.losses:
            terms |= loss.term(outputs, reference, batch, self.adapter, self.run.step)
        self.logs.update({n: float(v.detach()) for n, v in terms.items()})
        device = next(self.model.parameters()).device
        return torch.stack([v.to(device).float() for v in terms.values()]).sum() if terms else torch.zeros((), device=device)

    def reference(self, batch: Mapping[str, Any]) -> Any:
        """The original model's outputs for a batch: the empty view, no gradient, no dropout; the generators stay as they were."""
        modes = [(m, m.training) for m in self.model.modules() if m.training]
        for m, _ in modes:
            m.training = False
        try:
            with torch.random.fork_rng(devices=[]), self.adapter.reference():
                return self.model(**{k: v for k, v in batch.items() if k != "labels"})
        finally:
            for m, mode in modes:
                m.training = mode

    def step(self) -> bool:
        """After a micro-batch's backward; takes the optimiser step once all have come. True when it did.

        Raises:
            TrainingError: a gradient is not finite (nothing was changed), or the first backward left an adapter without one.
        """
        self._stop_recording()
        self._micro += 1
        if self._micro < self.accumulate:
            return False
        self._micro, self._begun = 0, False
        params = dict(zip(*(itertools.chain(*(g[k] for g in self.optimizer.param_groups)) for k in ("param_names", "params"))))
        norm = self.refuse_nonfinite(params)
        if self._check:
            self._check = False
            self.adapter._registry.check_called([self.adapter.name])
            check_first_backward(self.adapter, self.adapter.named_parameters())
        if self.losses:
            self.add_gradients()
            norm = self.refuse_nonfinite(params)
        if self.settings.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(params.values(), self.settings.max_grad_norm, norm)
            self.logs["grad_norm"] = float(norm)
        self.logs["lr"] = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        if self.routed:
            finish_step(self.adapter.module)
        self.logs.update(self.run.logs)
        self.optimizer.zero_grad(set_to_none=True)
        return True

    @torch.no_grad()
    def add_gradients(self, scale: float = 1.0) -> None:
        """Add what the losses give as ``grad_extra``, after the last backward; ``scale`` is the loss scale, if there is one.

        Raises:
            TrainingError: a name or shape that is no parameter's, or values that are not finite (the step is not taken).
        """
        for loss in self.losses:
            for name, extra in loss.grad_extra(self.adapter, self.run.step).items():
                known = self.optimizer.params.get(name)
                if known is None or known.tensor.shape != extra.shape or not torch.isfinite(extra).all():
                    self.optimizer.zero_grad(set_to_none=True)
                    raise TrainingError(
                        f"The loss {loss.info.name!r} adds to the gradient of {name!r} a tensor of shape {tuple(extra.shape)}; expected finite "
                        f"values, of the shape of a parameter in training. The step was not taken; mend its grad_extra."
                    )
                p = known.tensor
                if p.requires_grad:
                    p.grad = extra.to(p.dtype) * scale if p.grad is None else p.grad.add_(extra, alpha=scale)

    def refuse_nonfinite(self, params: Mapping[str, Tensor]) -> Tensor:
        """Stop before the update where a gradient is NaN or infinite; parameters and state are as before the step.

        Returns:
            The norm of all gradients together (0-d).
        """
        grads = [p.grad for p in params.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if torch.isfinite(norm):
            return norm
        bad = [n for n, p in params.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
        what = f"the gradient of {bad[0]!r} (and {len(bad) - 1} more)" if bad else "the norm of all gradients together"
        self.optimizer.zero_grad(set_to_none=True)
        where = first_overflow(self.model, self._last)
        raise TrainingError(
            f"Step {self.optimizer.steps + 1}: {what} is not finite; the step was not taken. "
            + (f"The forward overflowed first at {where!r}. " if where else "The forward is finite: it arose in the backward. ")
            + "Lower the learning rate, or look at the batch."
        )

    def _stop_recording(self) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(None, None, None)
            self._recorder = None

    def close(self) -> None:
        """Leave nothing switched (recorders, budgets' freezing)."""
        self._stop_recording()
        if self.budget is not None:
            self.budget.finish(self.run)

    # --- resume ---------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything but the adapter's tensors that an exact resume needs; plain data and tensors.

        The position in the data is the loop's own: draw the batches from torch's, NumPy's or Python's generator, whose states
        are in here, or skip what ``t`` steps have used.

        Raises:
            TrainingError: between two micro-batches of one step, for their gradients are not in it.
        """
        if self._micro:
            raise TrainingError(
                f"The step has had {self._micro} of {self.accumulate} micro-batches; save after step() has returned True."
            )
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "budget": self.budget.state_dict() if self.budget is not None else {},
            "rng": rng_state(),
            "products": packed.chosen(),
            "checked": not self._check,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, without any cast."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])
            self.budget.start(self.run)
        set_rng_state(state["rng"])
        packed.choose_again(state.get("products", ()))
        fast.forget(self.model)
        self._check = not state["checked"]


def params_of(adapter: Adapter) -> list[Param]:
    """The adapter's trainable tensors as the optimiser wants them: site, role, scale, component axis."""
    out: list[Param] = []
    for key, tensor in adapter.named_parameters().items():
        owner, name = key.split("::", 1)
        delta = adapter.sites.get(owner)
        if delta is None:
            out.append(Param(key, tensor, owner, "bank"))
            continue
        axis = delta.components.get(name)
        role = delta.roles.get(name, "other")
        scale = float(delta.scale) if role in ("A", "B", "core") else None
        out.append(Param(key, tensor, owner, role, scale, None if axis is None else axis % tensor.dim()))
    return out


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, as plain data."""
    kind, keys, pos, has, cached = np.random.get_state()  # type: ignore[misc]
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(pos), int(has), float(cached)],  # type: ignore[arg-type]
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, pos, has, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
