"""What must hold before a run may go on: gradients arrive everywhere, and numbers are finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import TrainingError

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


def check_first_backward(adapter: Adapter, params: Mapping[str, Tensor]) -> None:
    """Refuse a run in which a layer got no gradient at all (a starved layer, a dead start).

    A factor whose partner starts at zero has a zero gradient at first and is fine; a layer where every tensor's gradient
    is missing or zero is not.
    """
    by_site: dict[str, list[Tensor]] = {}
    for key, p in params.items():
        if p.requires_grad:
            by_site.setdefault(key.split("::")[0], []).append(p)
    missing = [s for s, ps in by_site.items() if all(p.grad is None for p in ps)]
    zero = [s for s, ps in by_site.items() if s not in missing and not any(p.grad is not None and p.grad.any() for p in ps)]
    if missing or zero:
        found = [
            f"{len(names)} of {len(by_site)} layers have {what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for what, names in (("no gradient", missing), ("a zero gradient", zero))
            if names
        ]
        raise TrainingError(
            f"After the first backward {'; '.join(found)}. "
            "They would never learn: exclude them, or mend what cuts them off the loss (a re-entrant checkpoint, a frozen input, a zero factor)."
        )


@torch.no_grad()
def first_overflow(model: nn.Module, batch: Mapping[str, Any] | None) -> str | None:
    """The first module, in order of execution, whose output is not finite for ``batch``; None if all are (or no batch)."""
    if batch is None:
        return None
    found: list[str] = []

    def watch(name: str) -> Any:
        def seen(module: nn.Module, args: Any, out: Any) -> None:
            t = out[0] if isinstance(out, tuple) and out else out
            if not found and isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all():
                found.append(name)

        return seen

    leaves = [(n, m) for n, m in model.named_modules() if n and not n.startswith("rankwise") and not list(m.children())]
    handles = [m.register_forward_hook(watch(n)) for n, m in leaves]
    try:
        model(**{k: v for k, v in batch.items() if isinstance(k, str)})
    except Exception:
        return found[0] if found else None  # the probe of a broken forward may itself break; the caller raises the real error
    finally:
        for h in handles:
            h.remove()
    return found[0] if found else None
