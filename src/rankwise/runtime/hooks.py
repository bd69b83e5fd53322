"""Hooks on the root model: which batch its forward sees, and a view that checkpointing carries into the recompute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.runtime.context import forward_context, keep_view
from rankwise.runtime.view import Owner, current


class RootHooks:
    """The hooks of one root model.

    Args:
        model: the root, whose forward's batch is told to the adapted modules inside.
        owner: the model's registry, whose current view a recompute must see.
    """

    def __init__(self, model: nn.Module, owner: Owner):
        self._model, self._owner = (model,), owner
        self._handles: list[Any] = []

    def install(self) -> None:
        """Hook the root's forward, once."""
        if not self._handles:
            model = self._model[0]
            self._handles = [
                model.register_forward_pre_hook(self._enter, with_kwargs=True),
                model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def carry_view(self) -> None:
        """Make the model's checkpointing functions carry the view in force into the recompute."""
        for module in self.checkpointed():
            fn = module._gradient_checkpointing_func
            if not getattr(fn, "keeps_view", False):
                module._gradient_checkpointing_func = _carrying(self._owner, fn)

    def checkpointed(self) -> list[Any]:
        """The modules that hold a checkpointing function."""
        model = self._model[0]
        parts = [model, *(m for child in model.children() if child is not self._owner for m in child.modules())]
        return [m for m in parts if "_gradient_checkpointing_func" in m.__dict__]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and module.training:
            self.carry_view()
        x = _main_input(module, args, kwargs)
        if x is not None:
            forward_context.batch = (x.shape[0], x.shape[1] if x.dim() > 1 else 1)
        forward_context.padding = _real(kwargs, forward_context.batch)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if not torch.compiler.is_compiling():
            forward_context.batch = forward_context.padding = None


def _main_input(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor whose rows are the batch's: the model's main input by name, embeddings in its place, else the one with most rows."""
    for name in (getattr(model, "main_input_name", None), "input_ids", "inputs_embeds"):
        if isinstance(found := kwargs.get(name), Tensor) and found.dim():  # type: ignore[arg-type]
            return found
    given = [t for t in args if isinstance(t, Tensor) and t.dim()][:1]
    given = given or [t for t in kwargs.values() if isinstance(t, Tensor) and t.dim()]
    return max(given, key=lambda t: t.shape[0], default=None)


def _real(kwargs: Mapping[str, Any], shape: tuple[int, int] | None) -> Tensor | None:
    """(B, T): which tokens are no padding, by the attention mask, or in packed rows by positions; None where neither tells.

    The collator gives each token of padding position 0, as a document of its own; a document that has but one is taken for padding.
    """
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask
    if isinstance(position, Tensor) and position.shape == shape:
        return (position > 0) | (nn.functional.pad(position[:, 1:], (0, 1)) == 1)
    return None


def _carrying(registry: Owner, fn: Any) -> Any:
    def checkpointed(inner: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(keep_view(inner, current(registry)), *args, **kwargs)

    checkpointed.keeps_view = True  # type: ignore[attr-defined]
    return checkpointed
