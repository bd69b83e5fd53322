"""The mean gradient of a weight over batches, one site at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from rankwise.calibration.base import Accumulator
from rankwise.errors import DataError

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class MeanGradient(Accumulator):
    """Ḡ = (1/n)·Σ ∂L/∂W over n batches: fp32, out×in (E×out×in); merging adds sums and counts; finishing empties it."""

    hook: ClassVar[Literal["input", "weight_grad"]] = "weight_grad"

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.n = 0

    def update(self, value: Tensor) -> None:
        if self.sum is None:  # a view would keep the whole gradient it looks into
            self.sum = value.clone() if value._is_view() else value
        else:
            self.sum.add_(value)
        self.n += 1

    def merge(self, other: Any) -> None:
        if other.sum is not None:
            self.sum = other.sum.clone() if self.sum is None else self.sum.add_(other.sum)
            self.n += other.n

    def finish(self) -> Tensor:
        if self.sum is None:
            raise DataError(
                "A weight got no gradient in calibration: its output does not reach the loss, or its module was not called."
            )
        mean, self.sum = self.sum.div_(self.n), None  # in place: a second copy of every gradient would double the peak
        return mean

    def memory(self, site: Site) -> int:
        return 4 * site.spec.out * site.spec.inp * max(site.spec.stack, 1)
