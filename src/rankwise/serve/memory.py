"""When the computer's memory runs out: how it is told, and how much smaller the next steps are.

What is reserved (cache blocks, LoRA pages) is the scheduler's to share out and never runs out unforeseen.  What a
step allocates beside it may: then idle adapters go, the younger requests wait, and a request that finds no memory even alone is
told to come back.  Steps grow again as they go well.
"""

from __future__ import annotations

import torch


def no_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: Python's, an accelerator's, or the plain RuntimeError of torch's CPU allocator."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
