"""Mixtures of adapters by weights: their pairs side by side with the weights in them, so Σ w·Δ exactly."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter, NonLoraChange
from rankwise.serve.adapters.kinds import grouped, measured, pages_for, refuse_nonfinite, tensors_in
from rankwise.serve.adapters.non_lora_changes import Weighted
from rankwise.serve.types import AdapterRefused

if TYPE_CHECKING:
    from rankwise.serve.adapters.layout import Layout


def mix_manifest(parts: Sequence[tuple[AdapterMetadata, float]]) -> AdapterMetadata:
    """The manifest of Σ w·adapter; equal sets of (adapter, weight) have one digest, in whatever order they were named.

    An adapter that is named twice has the sum of its weights; rank and bytes are upper bounds until the mix is made.

    Raises:
        AdapterRefused: nothing to mix, a weight that is no number or zero, two adapters with the same whole parameter.
    """
    if not parts:
        raise AdapterRefused("A mix needs at least one adapter with its weight.")
    weights: dict[str, float] = defaultdict(float)
    by_digest: dict[str, AdapterMetadata] = {}
    for manifest, weight in parts:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise AdapterRefused(f"The weight of {manifest.name!r} in the mix is {str(weight)[:40]!r}; it is a finite number.")
        if manifest.parts:
            raise AdapterRefused(f"{manifest.name!r} is a mix itself; name its adapters instead.")
        weights[manifest.digest] += float(weight)
        by_digest.setdefault(manifest.digest, manifest)
    idle = next((by_digest[d].name for d, w in weights.items() if w == 0), None)
    if idle is not None:
        raise AdapterRefused(f"The weights of {idle!r} in the mix come to 0; leave it out.")
    _refuse_shared_wholes([by_digest[d] for d in weights])
    if len(weights) == 1 and next(iter(weights.values())) == 1.0:
        return next(iter(by_digest.values()))
    ordered = tuple(sorted(weights.items()))
    members = [by_digest[d] for d, _ in ordered]
    rank = sum(m.rank for m in members)
    return AdapterMetadata(
        digest=hashlib.sha256(json.dumps(["rankwise-mix", [[d, w.hex()] for d, w in ordered]]).encode()).hexdigest(),
        name=" + ".join(f"{w:g}·{m.name}" for (_, w), m in zip(ordered, members, strict=True)), source="mix", kind="mix", rank=rank,
        pages=pages_for(rank), nbytes=sum(m.nbytes for m in members), exact=all(m.exact for m in members),
        error=max(m.error for m in members), parts=ordered, meta={"format": "mix"},
    )  # fmt: skip


def _refuse_shared_wholes(members: Sequence[AdapterMetadata]) -> None:
    owners: dict[str, str] = {}
    for m in members:
        for param in m.meta.get("full_params", ()):
            if param in owners:
                raise AdapterRefused(
                    f"{owners[param]!r} and {m.name!r} both have a {param!r} of their own, so they cannot be mixed; merge them into one adapter."
                )
            owners[param] = m.name


def mix_served(manifest: AdapterMetadata, parts: Sequence[tuple[LoadedAdapter, float]], layout: Layout) -> LoadedAdapter:
    """The numbers of a mix from those of its adapters: A = [w₁A₁; w₂A₂ …], B = [B₁, B₂ …]; non-LoRA changes times w.

    A whole parameter T counts as a change of the base's W: W + w·(T − W).
    """
    found: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    non_lora_changes: dict[str, list[NonLoraChange]] = defaultdict(list)
    full_params: dict[str, Tensor] = {}
    for served, w in parts:
        for name, pairs in served.pairs.items():
            for j, pair in enumerate(pairs):
                if pair is not None:
                    found[name, j].append((pair[0] * w, pair[1]))
        for module, changes in served.non_lora_changes.items():
            non_lora_changes[module] += [c if w == 1.0 else Weighted(c, w) for c in changes]
        full_params |= {param: t if w == 1.0 else _between(layout, param, t, w) for param, t in served.full_params.items()}
    made = LoadedAdapter(manifest, grouped(layout, found), {m: tuple(c) for m, c in non_lora_changes.items()}, full_params)
    refuse_nonfinite(tensors_in(made), manifest.name)
    return measured(made, exact=manifest.exact, error=manifest.error)


def _between(layout: Layout, param: str, t: Tensor, w: float) -> Tensor:
    base = layout.called[param.rpartition(".")[0]].param.detach()
    return (base.float() + w * (t.float() - base.float())).to(t.dtype)
