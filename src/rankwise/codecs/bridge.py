"""What every bridge to a library's quantised weight can do: read, write, snapshot, restore."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import TargetError


class Bridge(ABC):
    """Reads and writes the quantised ``weight`` of a module; stateless, so one instance serves all modules.

    Attributes:
        name: of the format, for messages and the site's spec.
        writable: whether :meth:`write` works; where it does not, it raises TargetError.
    """

    name: str
    writable: bool = True

    def keep(self, module: nn.Module) -> None:  # noqa: B027 - most formats have nothing to keep
        """Keep the module's own forward from changing what is stored; TargetError where it has done so already."""

    @abstractmethod
    def read(self, module: nn.Module) -> Tensor:
        """The weight as codes and constants say, a fresh fp32 tensor, out×in (an embedding: num×dim).

        The module's own forward may round it further, to its compute dtype.
        """

    def write(self, module: nn.Module, W: Tensor) -> Tensor:
        """Requantise ``W`` (the shape :meth:`read` gives) in the module's own format; returns what is now stored.

        The Parameter stays the same object, so ties and optimisers hold.  Raises TargetError for a wrong shape
        or entries that are not finite, before anything is changed.
        """
        now = self.read(module)
        if W.shape != now.shape or not W.is_floating_point() or not torch.isfinite(W).all():
            raise TargetError(
                f"A {self.name} weight of shape {tuple(now.shape)} was to be overwritten by a {W.dtype} tensor of "
                f"shape {tuple(W.shape)}; give finite floating values of the same shape."
            )
        with torch.no_grad():
            self.put(module, W.detach().to(now.device, torch.float32))
        return self.read(module)

    @abstractmethod
    def put(self, module: nn.Module, W: Tensor) -> None:
        """Quantise and store ``W``: fp32, checked, on the weight's device."""

    @abstractmethod
    def snapshot(self, module: nn.Module) -> Any:
        """A copy of the stored codes and constants, for :meth:`restore` only."""

    @abstractmethod
    def restore(self, module: nn.Module, snapshot: Any) -> None:
        """Put a snapshot back bit for bit; it may be restored again."""

    def settle(self, module: nn.Module) -> None:  # noqa: B027 - most formats have one form
        """Put the weight back into the form that its library saves rightly, where a forward has changed that; same values."""


def weight_of(module: nn.Module) -> Tensor:
    """The stored weight itself, also where an attached adapter makes ``module.weight`` a property."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise TargetError(f"A {type(module).__name__} has no parameter called weight; it has no bridge.")
    return weight
