"""Base classes of inits: which statistics they need, the rank of each weight, and the initial values of A and B."""

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
    """Initial values for one site.

    Attributes:
        tensors: name → values, those that the init sets; the form completes the others.
        rule: what happens to W: *keep* it; *subtract* the initial s·B·A (as frozen buffers, so W itself is not written);
            *replace* it by ``weight``.
        weight: (out, in), e.g. LoftQ's quantised W.
    """

    tensors: Mapping[str, Tensor]
    rule: Rule = "keep"
    weight: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
    """Base of all inits; dataclass fields are options."""

    info: ClassVar[MethodInfo]
    #: whether it replaces the base's weight, so that it is refused on a base that others use at the same time
    replaces: ClassVar[bool] = False
    #: what PEFT's LoraConfig calls it, as fields; None: PEFT has no such init
    peft_fields: ClassVar[Mapping[str, Any] | None] = None
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "experts")

    def requests(self, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, Any]:
        """{site: accumulator} to run over the calibration batches; empty where the weights suffice."""
        return {}

    def allocate(self, sites: Sequence[Site], stats: Stats, ranks: Mapping[str, int]) -> dict[str, int]:
        """Ranks of the sites (0 drops one); the sum of ``ranks`` is the budget."""
        return dict(ranks)

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        """Initial values for one site.

        Args:
            site: the weight.
            stats: finished statistics by site name, for what :meth:`requests` asked.
            rank: r.
            scale: s of ΔW = s·B·A.
            g: the generator of this init at this site, on the CPU.
        """
        raise NotImplementedError(f"The init {type(self).__name__} must fill its sites.")

    def check(self, form: Form, part: Part) -> None:
        """Refuse what this init cannot be combined with, beyond what ``requires`` says."""
