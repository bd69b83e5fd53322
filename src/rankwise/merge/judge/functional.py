"""A forward with tensors of your own in an adapter's place: gradients flow to whatever produced them.

The tensors may be non-leaf: a mixture of adapters, a hypernetwork's output, a sample, one virtual step.  Nothing is
written in place, neither to the adapter's own tensors nor to the base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from rankwise.errors import OptionError, ViewError, unknown
from rankwise.runtime.registry import AdapterRegistry, registry_of
from rankwise.runtime.view import current


def call(model: nn.Module, tensors: Mapping[str, Tensor], batch: Mapping[str, Any], *, name: str | None = None) -> Any:
    """``model(**batch)`` with ``tensors`` standing for those of an attached adapter, in the view in force.

    Args:
        tensors: by the names of ``adapter.tensors()`` (``<site>::A`` …), each of its own's shape, any floating dtype; those
            not given are the adapter's own.
        name: which adapter; default the only one that acts.

    A model that recomputes (gradient checkpointing, not re-entrant) recomputes with the same tensors, also in a backward
    after this call; torch's own ``functional_call`` on the whole model would recompute with the adapter's.

    Raises:
        ViewError: no adapter or several act and none is named; the adapter is merged into the weights.
        UnknownName, OptionError: a name or a shape that the adapter does not have, a base weight in training.
    """
    registry = registry_of(model)
    names = list(current(registry).strengths) if name is None else [name]
    if len(names) != 1:
        raise ViewError(f"{len(names)} adapters act here ({', '.join(names) or 'none'}); say name=… whose tensors these are.")
    swapped = _paths(registry, names[0], tensors)
    body = _Body(registry)

    def run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return functional_call(body, swapped, (fn, args, kwargs))

    with _recomputing(registry, run):
        return run(model, **batch)


class _Body(nn.Module):
    """Calls a function while torch holds other tensors in the roster's place."""

    def __init__(self, registry: AdapterRegistry):
        super().__init__()
        self.registry = registry

    def forward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)


def _paths(registry: AdapterRegistry, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given tensors by their paths below :class:`_Body`."""
    registry.check_view({name: 1.0})
    if registry.records[name].merged:
        raise ViewError(f"Adapter {name!r} is merged into the weights, so its tensors do not act; unmerge() it first.")
    home = [*registry.named_parameters(remove_duplicate=False), *registry.named_buffers(remove_duplicate=False)]
    where = {id(t): path for path, t in home}
    mine = registry.records[name].tensors()
    out = {}
    for key, t in tensors.items():
        if key not in mine:
            raise unknown(f"tensor of adapter {name!r}", key, mine)
        if t.shape != mine[key].shape:
            raise OptionError(f"{key!r} is {tuple(t.shape)}, but adapter {name!r} holds {tuple(mine[key].shape)} there.")
        if id(mine[key]) not in where:
            raise OptionError(
                f"{key!r} is a base weight that adapter {name!r} trains in place; only an adapter's own tensors can be given."
            )
        out[f"registry.{where[id(mine[key])]}"] = t
    return out


@contextlib.contextmanager
def _recomputing(registry: AdapterRegistry, run: Callable[..., Any]) -> Iterator[None]:
    """Inside, the model's checkpointing functions take note of ``run`` for their recompute, whenever that comes."""
    registry.hooks.carry_view()
    before = [(m, m._gradient_checkpointing_func) for m in registry.hooks.checkpointed()]
    for m, fn in before:
        m._gradient_checkpointing_func = _holding(fn, run)
    try:
        yield
    finally:
        for m, fn in before:
            m._gradient_checkpointing_func = fn


def _holding(fn: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(inner: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(lambda *a, **k: run(inner, *a, **k), *args, **kwargs)

    checkpointed.keeps_view = True  # type: ignore[attr-defined]
    return checkpointed


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, each module back in its own after."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
