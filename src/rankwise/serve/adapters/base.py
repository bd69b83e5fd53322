"""What is known of an adapter before its numbers are read, and what the engine holds of it once they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from rankwise.serve.ops.base import Pairs

#: Δy of one segment at one module from the module's input x: n×in and the base's output y without bias: n×out
NonLoraChange = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterMetadata:
    """An adapter or a mix, resolved: enough to queue, price and identify it.

    Attributes:
        digest: SHA-256 of what decides its outputs (content, weights of a mix); the identity everywhere else.
        name: how it was asked for; several names may have one digest.
        rank: of the widest module; ``pages``: ⌈rank/8⌉.
        nbytes: host bytes once prepared.
        exact: False where it was lowered; ``error`` is then the largest relative error of a module.
        parts: of a mix, (digest, weight) in order.
    """

    digest: str
    name: str
    source: str
    kind: str
    rank: int
    pages: int
    nbytes: int
    exact: bool = True
    error: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter's numbers, ready for a slot.

    Attributes:
        pairs: group → per module (A with the scale in it, B), for :class:`~rankwise.serve.ops.base.LoraPages`.
        non_lora_changes: module → changes that are no pair (columns, scales, gated mixtures …), in the order in which they add up.
        full_params: parameter → tensor that stands in for the base's on this adapter's rows (a head, an embedding).
    """

    manifest: AdapterMetadata
    pairs: Mapping[str, Pairs]
    non_lora_changes: Mapping[str, tuple[NonLoraChange, ...]] = dataclasses.field(default_factory=dict)
    full_params: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """One name in a listing.

    Attributes:
        manifest: None until it was first resolved.
        tier: ``host`` or ``disk``; ``pins``: who holds it.
        loaded: at run time.
    """

    name: str
    manifest: AdapterMetadata | None
    tier: str
    pins: int
    loaded: bool


class AdapterSource(Protocol):
    """Where adapters come from (a folder of folders, a hub, an object store, memory)."""

    def names(self) -> list[str]:
        """Every name it can resolve now."""
        ...

    def resolve(self, name: str) -> AdapterMetadata:
        """Read the header only.

        Raises:
            UnknownAdapter, AdapterRefused: no such adapter; one that this base cannot serve.
        """
        ...

    def fetch(self, manifest: AdapterMetadata) -> LoadedAdapter:
        """Read and prepare the numbers; every value finite, every tensor mapped.

        Raises:
            AdapterRefused: damaged since it was resolved, or not servable.
        """
        ...
