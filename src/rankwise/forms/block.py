"""Base of forms that wrap a block (an MLP, an attention) where the others change a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from rankwise.forms.base import AdapterLayer

Masks = Callable[[Tensor], Tensor | None]


class BlockDelta(AdapterLayer):
    """``block`` gives what is added to the block's first output, or, where ``replaces`` is true, the output itself."""

    replaces: ClassVar[bool] = False

    def block(self, base: Callable[..., Any], args: Any, kwargs: Any, y: Tensor | None, strength: Tensor, masks: Masks) -> Any:
        """What is added to the block's output, or replaces it.

        Args:
            base: the block's own forward.
            args, kwargs: its inputs.
            y: its first output; None where ``replaces``, which calls ``base`` itself.
            strength: 0-d, the adapter's strength in the current view.
            masks: an output → its row mask or None.  What is added is masked by the caller; what ``replaces`` masks itself,
                since the layers inside have been masked already.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it does to its block.")

    def plain(self, base: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The block without this adapter; what ``replaces`` quietens its own sites inside."""
        return base(*args, **kwargs)
