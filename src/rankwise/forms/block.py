"""Bottleneck adapters: a small two-layer network behind (or beside) a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from rankwise.forms.base import AdapterLayer

Masks = Callable[[Tensor], Tensor | None]


class BlockDelta(AdapterLayer):
    """A form of block scope: ``block`` gives what is added to the block's first output (or stands in its place)."""

    replaces: ClassVar[bool] = False

    def block(self, base: Callable[..., Any], args: Any, kwargs: Any, y: Tensor | None, strength: Tensor, masks: Masks) -> Any:
        """The change of ``y`` for the block's inputs; ``base`` is the plain block.

        The core masks what is added; what ``replaces`` asks ``masks`` (an output → its row mask or None) itself, for inside
        it the sites have masked already.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it does to its block.")

    def plain(self, base: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The block without this adapter; what ``replaces`` quietens its own sites inside."""
        return base(*args, **kwargs)
