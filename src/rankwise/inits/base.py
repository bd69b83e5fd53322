"""The seam of inits: which statistics are needed, how ranks are given out, and the first values of a site's tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankwise.calibration.base import Stats
    from rankwise.catalogue import MethodInfo
    from rankwise.forms.base import Form
    from rankwise.recipe import Part
    from rankwise.sites.site import Site

Rule = Literal["keep", "subtract", "replace"]


@dataclasses.dataclass(frozen=True)
class Fill:
    """First values of one site.

    ``tensors`` are those the init is about; the form completes the rest.  ``rule`` says what becomes of W:
    *keep* it; *subtract* s·B·A (the core carries −s₀·B₀A₀ beside W, so W keeps its bits); *replace* it by
    ``weight`` (out×in, e.g. a quantised W).
    """

    tensors: Mapping[str, Tensor]
    rule: Rule = "keep"
    weight: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """Base of all inits; dataclass fields are options."""

    info: ClassVar[MethodInfo]
    #: whether it has the base's weight replaced, so that a base others use at the same time is no place for it
    replaces: ClassVar[bool] = False
    #: what PEFT's LoraConfig calls it, as fields; None: PEFT has no such init
    peft_fields: ClassVar[Mapping[str, Any] | None] = None
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "experts")

    def requests(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, Any]:
        """{site: accumulator} to run over the calibration batches; empty where weights suffice."""
        return {}

    def allocate(self, sites: Sequence[Site], stats: Stats, ranks: Mapping[str, int]) -> dict[str, int]:
        """Ranks of the sites (0 drops one); the sum of ``ranks`` is the budget."""
        return dict(ranks)

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        """First values for ``site`` at ``rank`` and scale s."""
        raise NotImplementedError(f"The init {type(self).__name__} must fill its sites.")

    def check(self, form: Form, part: Part) -> None:
        """Refuse what this init cannot live with beyond its declared needs."""
