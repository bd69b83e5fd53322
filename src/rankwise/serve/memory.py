"""How an error says that memory ran out: Python's, an accelerator's, torch's."""

from __future__ import annotations

import torch


def no_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: Python's, an accelerator's, or the plain RuntimeError of torch's CPU allocator."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
