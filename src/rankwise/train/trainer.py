"""The bridge to transformers' Trainer, and to any trainer built on it (TRL's): ``bridge(Trainer)``.

The Trainer keeps its loop; the Session's events hang in it: ``step_begin`` on the callback of that name, the penalty in
``compute_loss``, the checks after the first backward, everything else inside the one optimiser's ``step``.  A checkpoint
holds the adapter, the optimiser's and the parts' state, never the base.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import TrainingError, need
from rankwise.routers.base import finish_step, recording
from rankwise.store.atomic import replace_file
from rankwise.train.checkpoint import RUN_STATE, UNFINISHED, begin, check_saves, publish, restore_adapter, whole_checkpoint
from rankwise.train.guard import check_first_backward, first_overflow
from rankwise.train.session import Session
from rankwise.train.settings import TrainSettings

if TYPE_CHECKING:
    from rankwise.adapter import Adapter

#: what the mixins stand before in a bridged class: a class derived from transformers' Trainer
_Trainer: Any = object


class SessionEvents:
    """The Session's events, on the callbacks of the Trainer's loop."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the adapter and read it back, before the first step.

        Args:
            args, state, control, kwargs: as transformers calls a TrainerCallback.
        """
        if state.global_step == 0 and args.should_save and args.save_strategy != "no":
            check_saves(self.trainer.adapter, args.output_dir)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Session's step begins.

        Args:
            args, state, control, kwargs: as transformers calls a TrainerCallback.
        """
        session = self.trainer.session
        session._begun = session.routed = False  # the Trainer counts micro-batches itself
        session.routed = self.trainer._routed
        session.step_begin()
        session._stop_recording()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing stays switched.

        Args:
            args, state, control, kwargs: as transformers calls a TrainerCallback.
        """
        self.trainer.session.close()


class SessionMixin(_Trainer):
    """The optimiser, the losses and the checks of a Session, in the Trainer's loop."""

    def __init__(self, *args: Any, adapter: Adapter, **kwargs: Any):
        from transformers import PrinterCallback

        self.adapter = adapter
        model: Any = adapter.model  # the mark is transformers', not nn.Module's
        vouched = getattr(model, "_hf_peft_config_loaded", None)
        if getattr(model, "is_quantized", False):
            model._hf_peft_config_loaded = True  # an adapter is attached, so a quantised base may be trained on
        try:
            super().__init__(*args, **kwargs)
        finally:
            if getattr(model, "is_quantized", False):
                model._hf_peft_config_loaded = vouched
        self.add_callback(_callback_class()(self))
        self.remove_callback(PrinterCallback)  # our log is a file, and standard output the caller's
        self.session: Session | None = None
        self._pending: Mapping[str, Any] | None = None
        self._checked = False
        self._hidden: Path | None = None  # where a checkpoint is filled before it gets its name
        self._unpushed = False

    # --- the optimiser is the Session's ---------------------------------------------------------------
    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        settings, ddp = trainer_settings(self.args), self.args.parallel_mode.value == "distributed"
        options = settings.for_session(max(num_training_steps, 1))
        self.session = Session(self.adapter.model, self.adapter, check=False, ddp=ddp, **options)
        self._routed = self.session.routed
        self.session.optimizer.observers.insert(0, lambda ctx, grads: self._refuse_nonfinite(grads))
        if self._routed:
            self.session.optimizer.after.append(lambda ctx: finish_step(self.adapter.module))
        self.optimizer = self.session.optimizer
        self.create_scheduler(num_training_steps=num_training_steps, optimizer=self.optimizer)
        if self._pending is not None:
            self._restore_run(self._pending)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.create_optimizer_and_scheduler(max(int(self.args.max_steps), 1))
        return self.optimizer

    def _refuse_nonfinite(self, grads: Mapping[str, Tensor]) -> None:
        assert self.session is not None
        self.session.refuse_nonfinite({n: self.session.optimizer.params[n].tensor for n in grads})

    # --- loss, penalty and checks -----------------------------------------------------------------------
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The task's loss and what the recipe's losses and routers add; refused where it is not finite.

        Args:
            model, inputs, args, kwargs: as of transformers' Trainer.
        """
        session = self.session
        if session is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        want = kwargs.pop("return_outputs", False)
        plain = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        with recording(self.adapter.module) if session.routed else contextlib.nullcontext():
            loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **kwargs)
        if not torch.isfinite(loss):
            where = first_overflow(self.adapter.model, plain)
            raise TrainingError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}"
                + (f"; the forward overflowed first at {where!r}" if where else "")
                + ". Nothing was updated; the last checkpoint is good. Lower the learning rate, or look at the batch."
            )
        session.run.step = session.optimizer.steps + 1
        if session.losses or session.routed:
            penalty = session.penalty(outputs, plain)
            if self._scaled_already(kwargs.get("num_items_in_batch")):
                penalty = penalty / max(getattr(self, "current_gradient_accumulation_steps", 1), 1)
            loss = loss + penalty.to(loss.device)
        session._last = plain
        return (loss, outputs) if want else loss

    def _scaled_already(self, items: Any) -> bool:
        """Whether the loss is normalised over all micro-batches, so that the Trainer will not divide it (nor a penalty)."""
        says = getattr(self, "loss_is_scaled_for_ga", None)
        if says is not None:
            return bool(says)
        return (bool(self.model_accepts_loss_kwargs) and items is not None) or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.session is not None and "loss" in logs:  # the parts' own figures beside the loss
            parts = {**self.session.logs, **self.session.run.logs}
            logs = {**{k: float(v) for k, v in parts.items() if isinstance(v, (int, float))}, **logs}
        super().log(logs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if not self._checked:
            self._checked = True
            self.adapter._registry.check_called([self.adapter.name])
            check_first_backward(self.adapter, self.adapter.named_parameters())
        if self.session is not None and self.session.losses and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.session.add_gradients(1.0 if scaler is None else scaler.get_scale())
        return loss


class CheckpointMixin(_Trainer):
    """Checkpoints that hold the adapter and the run's state, never the base, and are whole or absent."""

    adapter: Adapter
    session: Session | None
    _pending: Mapping[str, Any] | None
    _checked: bool
    _hidden: Path | None
    _unpushed: bool

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        self.adapter.save(folder)
        if getattr(self, "processing_class", None) is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._hidden) if self._hidden is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._unpushed = self._hidden is not None  # later, under its final name
        if self._hidden is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        home = Path(self._get_output_dir(trial))
        final = home / f"checkpoint-{self.state.global_step}"
        hidden = home / UNFINISHED
        if self.args.should_save:
            begin(home)
        self._together()
        self._hidden = hidden
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._hidden = None
        self._together()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == hidden:
            self.state.best_model_checkpoint = str(home / Path(best).name)
        if self.args.should_save:
            self._finish_checkpoint(hidden / final.name)
            publish(hidden / final.name, final)
            shutil.rmtree(hidden, ignore_errors=True)
            rotate_checkpoints(str(home), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
            if self._unpushed:
                self._push_from_checkpoint(str(final))
        self._together()

    def _finish_checkpoint(self, folder: Path) -> None:
        """What the Trainer does not know of, and its state with the final names."""
        assert self.session is not None
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if not self.args.save_only_model:
            state = {"budget": self.session.state_dict()["budget"], "steps": self.session.t, "checked": self._checked}
            buffer = io.BytesIO()
            torch.save(state, buffer)
            replace_file(folder / RUN_STATE, buffer.getvalue())

    def _together(self) -> None:
        if self.args.parallel_mode.value == "distributed":
            torch.distributed.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(self.adapter, resume_from_checkpoint)
        state = torch.load(os.path.join(resume_from_checkpoint, RUN_STATE), weights_only=True)
        if self.session is None:
            self._pending = state
        else:
            self._restore_run(state)

    def _restore_run(self, state: Mapping[str, Any]) -> None:
        assert self.session is not None
        self._checked = bool(state["checked"])
        if self.session.budget is not None:
            self.session.budget.load_state_dict(state["budget"])
            self.session.budget.start(self.session.run)

    def _load_best_model(self) -> None:
        restore_adapter(self.adapter, self.state.best_model_checkpoint)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            resume_from_checkpoint = whole_checkpoint(self.args.output_dir, resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def trainer_settings(args: Any) -> TrainSettings:
    """A Session's settings from TrainingArguments; schedule and clipping stay the Trainer's own."""
    return TrainSettings(lr=args.learning_rate, schedule="constant", weight_decay=args.weight_decay, seed=args.seed)


def bridge(base: type) -> type:
    """A subclass of a Trainer class that trains an attached adapter.

    The class takes one more argument, ``adapter``; ``weight_decay``, ``learning_rate`` and the schedule are those of its
    TrainingArguments.
    """
    return _bridge(base)


@functools.cache
def _bridge(base: type) -> type:
    name = f"Rankwise{base.__name__}"
    return type(name, (SessionMixin, CheckpointMixin, base), {"__qualname__": name, "__module__": __name__})


@functools.cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    return type("RankwiseCallback", (SessionEvents, TrainerCallback), {"__module__": __name__})


def trainer_class() -> type:
    """``bridge(transformers.Trainer)``."""
    try:
        from transformers import Trainer
    except ImportError as error:
        raise need("transformers", "hf", "The Trainer") from error
    return bridge(Trainer)


class ReferenceModel(nn.Module):
    """The original model as a module of its own: the same weights, under the empty view, without gradient.

    What TRL takes as ``ref_model``; its attributes are the model's, it holds no parameter, and its ``forward`` may be
    replaced without touching the model's.
    """

    def __init__(self, adapter: Adapter):
        super().__init__()
        self.__dict__["adapter"] = adapter
        self.__dict__["inner"] = adapter.model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.adapter.reference():  # around whatever forward TRL has put in this one's place
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Any:
        return iter(())
