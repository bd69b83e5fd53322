"""What stands behind the scheduler, as it sees it: adapters, and what the runner keeps beside the pages."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter
    from rankwise.serve.model.runner import RunnerSlot


class Residency(Protocol):
    """Adapters as the engine sees them: read in the background, put in slots between steps."""

    @property
    def slots(self) -> Mapping[int, RunnerSlot]: ...

    def fetch(self, digest: str) -> Future[LoadedAdapter]:
        """Pin the adapter and begin to read it; every call is answered by one :meth:`release`."""
        ...

    def enter(self, digest: str, served: LoadedAdapter) -> int | None:
        """Its slot, held once more until :meth:`leave`; None where there is no room now."""
        ...

    def leave(self, slot: int) -> None: ...

    def release(self, digest: str) -> None: ...

    def resident(self, digest: str) -> bool: ...

    def lora_pages(self, digest: str) -> int: ...

    def most_blocks(self, digest: str | None) -> int:
        """Cache blocks that a request of this adapter could have if it were alone."""
        ...

    def free_lora_pages(self) -> int: ...

    def lora_pages_held(self) -> tuple[int, int]:
        """(LoRA pages that adapters hold, LoRA pages there are)."""
        ...

    def shrink(self) -> bool:
        """Give up one idle slot; False where there is none."""
        ...

    def relieve(self) -> None:
        """Memory has run out: let go of every adapter that nobody uses."""
        ...


class Copies(Protocol):
    """Keys and values that the runner keeps a second time, which it can do without."""

    @property
    def nbytes(self) -> int: ...

    def relieve(self) -> None:
        """Memory has run out: let go of them, and keep fewer from now on."""
        ...
