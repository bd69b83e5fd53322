"""Tensors of the base and of adapters, by name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rankwise.errors import ArtefactError
from rankwise.store.coded import KIND, decode_file
from rankwise.store.native import is_native, load_native


def base_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The base's own parameters by name, as they were before any adapter moved them."""
    registry = model._modules.get("rankwise")
    out: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if not n.startswith("rankwise.")]
    if registry is None:
        return out
    weight_backups = {**registry.weight_backups, **{k: t for k, (_, t) in registry.replaced_weights.items() if t is not None}}  # type: ignore[union-attr,dict-item,operator]
    kept = {f"{m}.{p}".lstrip("."): t for (m, p), t in weight_backups.items() if isinstance(t, Tensor)}  # type: ignore[misc]
    return [(n, kept.get(n, p)) for n, p in out]


def reference_tensors(model: nn.Module, reference: str | Path) -> dict[str, Tensor]:
    """Every tensor of the adapter in a native folder, or of the attached one of that name.

    Raises:
        ArtefactError: neither; a file that is itself a difference.
    """
    if is_native(reference):
        tensors, head = load_native(reference)
        return decode_file(tensors, head, str(reference))[0] if head["kind"] == KIND else tensors
    registry = model._modules.get("rankwise")
    if registry is not None and str(reference) in registry.records:  # type: ignore[union-attr,operator]
        return registry.records[str(reference)].file_tensors()  # type: ignore[union-attr,index,no-any-return]
    raise ArtefactError(
        f"The reference {str(reference)!r} is neither a native adapter's folder nor an adapter attached to this model."
    )
