"""Which adapters act: ``rw.view`` for the calls of a block, ``rw.activate`` by default.  There is no other "active adapter" state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from rankwise.runtime.registry import registry_of
from rankwise.runtime.view import Rows, View, entered


def activate_adapters(model: nn.Module, names: str | Iterable[str] | None) -> None:
    """Set the default view: which attached adapters act, each at strength 1 (several sum; None is the base)."""
    registry = registry_of(model)
    wanted = [names] if isinstance(names, str) else list(names or ())
    wanted = [*wanted, *(m for m in registry.merged if m not in wanted)]
    registry.default = registry.view(dict.fromkeys(wanted, 1.0))


@contextlib.contextmanager
def view(
    model: nn.Module,
    strengths: Mapping[str, float | Tensor] | str | Sequence[str] = (),
    *,
    rows: Rows | None = None,
    tokens: Mapping[str, Tensor] | None = None,
) -> Iterator[View]:
    """This block's calls of ``model`` run with these adapters; ``{}`` is the base.

    Args:
        model: one with adapters attached.
        strengths: {name: strength}, or a name or names at strength 1.
        rows: one adapter name (or None for the base) for each batch row, or {name: mask (B,)}.
        tokens: {name: mask (B, T)}.

    Raises:
        ViewError: unknown adapter, a merged adapter left out, masks that cannot reach a site.
    """
    registry = registry_of(model)
    if isinstance(strengths, str):
        strengths = [strengths]
    if not isinstance(strengths, Mapping):
        strengths = dict.fromkeys(strengths, 1.0)
    registry.hooks.carry_view()
    with entered(registry.view(strengths, rows, tokens)) as v:
        yield v
