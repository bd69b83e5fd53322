"""One bar for a run, with the figures that matter beside it, in place of the dictionaries that transformers' Trainer prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: what the Trainer logs → what stands beside the bar
_SHOWN = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "rewards/accuracies": "pairs right",
    "rewards/margins": "margin",
    "grad_norm": "gradient",
    "learning_rate": "lr",
}


def figures(logs: Mapping[str, Any]) -> dict[str, str]:
    """The logged figures that are shown, by the name they are shown under; nothing of the summary at a run's end."""
    return {name: f"{float(logs[key]):.4g}" for key, name in _SHOWN.items() if key in logs}


def one_bar(trainer: Any, what: str = "training") -> None:
    """Replace the Trainer's own callbacks that print; where its bars are off (``disable_tqdm``), nothing is shown."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description(what)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            shown = figures(logs or {})
            if self.training_bar is not None and shown:
                self.training_bar.set_postfix(shown)

    for printing in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printing)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar)
