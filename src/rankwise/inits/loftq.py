"""LoftQ: choose the quantised base and the low-rank part together, so that their sum is close to W."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from rankwise import catalogue
from rankwise.catalogue import register
from rankwise.delta.solve import lowrank_approx
from rankwise.errors import OptionError
from rankwise.inits.base import Fill, Init

if TYPE_CHECKING:
    from rankwise.calibration.base import Stats
    from rankwise.sites.site import Site


@register(
    "init",
    "loftq",
    title="LoftQ: a quantised base and the low-rank part that mends it",
    paper="arXiv 2310.08659",
    requires=("fill:A", "fill:B"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoftQ(Init):
    """Alternate Q ← quantise(W − B·A) and (B, A) ← rank-r SVD of W − deq(Q), √S on each side; W is replaced by deq(Q).

    s·B·A with the factors divided by √s, so any α gives the same start (published code is right at α = r only).  The best
    iterate is kept, not the last: the alternation is not monotone.  ``start="svd"`` begins at the other end (QPiSSA).
    The codec is any of ours (``nf4``, ``intk`` …).  On a base that is itself quantised, W is what is stored there, so only
    the codec's own error is mended; give the float base instead.

    ‖W − deq(Q) − B·A‖ ≤ ‖W − deq(Q)‖, with the tail of the spectrum as the gap.  Source: yxli2123/LoftQ.
    """

    replaces: ClassVar[bool] = True
    start_gap: ClassVar[float] = 0.05  # the base itself is replaced by its quantised twin
    codec: str = "nf4"
    iterations: int = 1
    start: Literal["quantise", "svd"] = "quantise"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.start not in ("quantise", "svd"):
            raise OptionError(
                f"The init 'loftq' needs iterations ≥ 1 and start 'quantise' or 'svd'; it got {self.iterations}, {self.start!r}."
            )

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        if site.spec.quantised:
            raise OptionError(
                f"{site.name!r} is already stored as {site.spec.quantised}; LoftQ needs the float weight. Load the base unquantised."
            )
        codec = catalogue.make("codec", self.codec)
        W = site.read()
        flat = W.reshape(-1, *W.shape[-2:])
        parts = [self.alternate(w, codec, rank) for w in flat]
        Q, A, B = (torch.stack(t).reshape(*W.shape[:-2], *t[0].shape) for t in zip(*parts, strict=True))
        return Fill({"A": A / scale**0.5, "B": B / scale**0.5}, "replace", Q)

    def alternate(self, W: Tensor, codec: object, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(Q, A, B) of the best iterate."""
        A, B = torch.zeros(rank, W.shape[1]), torch.zeros(W.shape[0], rank)
        if self.start == "svd":
            B, A, _ = lowrank_approx(W, rank)
        best: tuple[float, Tensor, Tensor, Tensor] | None = None
        for _ in range(self.iterations):
            Q = codec.decode(codec.encode((W - B.float() @ A.float()).contiguous())).float()  # type: ignore[attr-defined]
            B, A, _ = lowrank_approx(W - Q, rank)
            error = float((W - Q - B.float() @ A.float()).norm())
            if best is None or error < best[0]:
                best = (error, Q, A.float(), B.float())
        assert best is not None
        return best[1:]
