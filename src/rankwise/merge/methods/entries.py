"""Entry-wise merges: magnitude_prune, ties, dare_linear, dare_ties, della, della_linear, breadcrumbs, breadcrumbs_ties.

Sparsify each source, then combine what meets at an entry.  A named method is a row of a table.  For kept values v_t (T, rows, in) and weights w_t:

    sum       Σ w_t·v_t                                            (÷ Σ w_t with normalize)
    elected   Σ w_t·v_t·[sign v_t = ε] / n,   ε = sign of Σ v_t ("total"), Σ sign v_t ("frequency") or Σ w_t·v_t ("weighted");
              n = max(1, #agreeing) with divide="count", Σ of agreeing w_t with "weights", 1 with "none"

λ (``lam``) multiplies the result.  An adapter's result is out×in and cut to ``rank`` (default: the largest source rank),
with what that loses reported; a whole checkpoint's stays as it is.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.errors import Option, OptionError
from rankwise.merge.engine.base import Merge, at_least_one, draws, one_of, share
from rankwise.merge.methods.sparsify import RESCALES, Bernoulli, Middle, Ranked, Sparsifier, Top

if TYPE_CHECKING:
    from rankwise.merge.engine.result import Merged
    from rankwise.merge.engine.stack import Stack

ELECT = ("total", "frequency", "weighted")
DIVIDE = ("count", "weights", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrywise(Merge):
    """Base: options ``rank`` and ``lam``; a method gives its sparsifier and how the kept values join."""

    rank: int | None = None
    lam: float = 1.0

    def __post_init__(self) -> None:
        name = self.info.name
        at_least_one(name, self.rank)
        for option, check in (("density", None), ("rescale", RESCALES), ("elect", ELECT), ("divide", DIVIDE)):
            if hasattr(self, option):
                value = getattr(self, option)
                share(name, option, value) if check is None else one_of(name, option, value, check)
        if hasattr(self, "gamma"):
            share(name, "gamma", self.gamma, zero=True)
        p, e = getattr(self, "density", 1.0), getattr(self, "epsilon", None)
        if e is not None and p < 1 and not 0 < p - e <= p + e < 1:
            raise OptionError(f"The merge {name!r} keeps entries with chances density ± epsilon inside (0, 1); it got {p} ± {e}.")

    def sparsifier(self) -> Sparsifier:
        return Sparsifier()

    def join(self, kept: Tensor, w: Tensor) -> Tensor:
        """(T, rows, in), which it may write into, and (T, 1, 1) → (rows, in)."""
        raise NotImplementedError

    def combine(self, stack: Stack, seed: int) -> Merged:
        made = self.lam * self.entries(stack, seed)
        return stack.lowered(made, self.rank, draws(self, stack, seed))

    def entries(self, stack: Stack, seed: int) -> Tensor:
        """The merged out×in tensor, made block by block."""
        keep = [self.sparsifier().keep(stack, t, seed) for t in range(len(stack.weights))]
        made = torch.empty(stack.shape, dtype=stack.dtype)
        w, room = stack.column(), None
        for rows in stack.blocks():
            size = (len(keep), rows.stop - rows.start, stack.shape[1])
            room = torch.empty(size, dtype=stack.dtype) if room is None else room[:, : size[1]]
            for t, k in enumerate(keep):
                room[t] = k(stack.block(t, rows), rows.start)
            made[rows] = self.join(room, w)
        return made


def summed(rule: Any, kept: Tensor, w: Tensor) -> Tensor:
    total = torch.tensordot(w.flatten(), kept, 1)
    return total / _nonzero(w.sum(), rule) if rule.normalize else total


def elected(rule: Any, kept: Tensor, w: Tensor) -> Tensor:
    """The disjoint mean of those that agree with the elected sign (+ where the vote is even, which matters only to ties).

    In place: each source is turned by the elected sign, so that what agrees is what is above zero.
    """
    if rule.elect == "weighted":  # a source with a negative weight votes, and agrees, with its sign turned
        kept.mul_(w)
    vote = kept.sign().sum(0) if rule.elect == "frequency" else kept.sum(0)
    sign = torch.where(vote >= 0, 1.0, -1.0).to(kept.dtype)
    kept.mul_(sign).clamp_(min=0)
    one, flat = torch.ones_like(w.flatten()), w.flatten()
    total = torch.tensordot(one if rule.elect == "weighted" else flat, kept, 1) * sign
    if rule.divide == "none":
        return total
    agree = kept.sign_()
    if rule.divide == "count":
        return total / torch.tensordot(one, agree, 1).clamp_min(1)
    size = torch.tensordot(flat, agree, 1)
    return torch.where(size.abs() > 1e-8, total / size, torch.zeros_like(total))


def _nonzero(total: Tensor, rule: Any) -> Tensor:
    if abs(float(total)) < 1e-8:
        raise OptionError(
            f"The merge {rule.info.name!r} divides by the sum of the weights, which is {float(total):.1e}; give ",
            Option("normalize", False),
            ".",
        )
    return total


Rescale = Literal["none", "1/p", "l1", "l2", "linf"]
JOINS = {"sum": summed, "elected": elected}
SPARSIFIERS = {
    "none": lambda m: Sparsifier(),
    "top": lambda m: Top(m.density, getattr(m, "rescale", "none")),
    "bernoulli": lambda m: Bernoulli(m.density, m.rescale),
    "ranked": lambda m: Ranked(m.density, m.rescale, m.epsilon),
    "middle": lambda m: Middle(m.density, "none", m.gamma),
}


def row(
    name: str,
    title: str,
    *,
    sparsify: str,
    join: str,
    doc: str,
    paper: str | None = None,
    reference: str | None = None,
    breaks: tuple[str, ...] = (),
    **options: Any,
) -> type[Entrywise]:
    """A row of the table, registered: its sparsifier, how it joins, and its options with their defaults.

    Args:
        name: of the merge.
        title: one line for the list of methods.
        sparsify: which entries go on, a key of ``SPARSIFIERS``.
        join: how they combine, a key of ``JOINS``.
        doc: the method's docstring.
        paper: where it is from.
        reference: its number in the method reference.
        breaks: laws that do not hold for it.
        options: with their defaults.
    """
    body = {
        "__doc__": doc,
        "__module__": sys._getframe(1).f_globals["__name__"],  # whose row it is, so that no other file takes its name
        "sparsifier": lambda self: SPARSIFIERS[sparsify](self),
        "join": lambda self, kept, w: JOINS[join](self, kept, w),
        "breaks": frozenset(breaks),
        "__annotations__": {"breaks": ClassVar[frozenset[str]]},
    }
    fields = [(k, type(v), dataclasses.field(default=v)) for k, v in options.items()]
    made = dataclasses.make_dataclass(
        name.title().replace("_", ""), fields, bases=(Entrywise,), namespace=body, frozen=True, kw_only=True
    )
    return register("merge", name, title=title, paper=paper, reference=reference, exports_to_peft=True)(made)


_ELECTED: dict[str, Any] = {"elect": "total", "divide": "weights"}
row(
    "magnitude_prune",
    "Weighted sum of each source's largest entries",
    sparsify="top",
    join="sum",
    density=0.5,
    normalize=False,
    doc="Top ``density`` of each source by magnitude, then Σ w_t·v_t.  Source: HF PEFT, ``magnitude_prune``.",
)
row(
    "ties",
    "TIES: trim, elect sign, disjoint mean",
    sparsify="top",
    join="elected",
    density=0.2,
    **_ELECTED,
    paper="arXiv 2306.01708",
    doc="""Keep the top ``density`` of each source, elect a sign at each entry, take the weighted mean of those that agree.

    With equal weights it is the paper's.  mergekit elects with elect="weighted" at density 1; HF PEFT divides with divide="count", so
    that weights below 1 shrink the result.  Works on ΔW = B·A, not on A and B apart as PEFT's ``ties`` (its ``ties_svd`` is this one):
    products of trimmed factors are not trimmed products.  Source: prateeky2806/ties-merging.""",
)
row(
    "dare_linear",
    "DARE: drop at random, rescale, sum",
    sparsify="bernoulli",
    join="sum",
    density=0.5,
    rescale="1/p",
    normalize=False,
    paper="arXiv 2311.03099",
    doc="""Each entry stays with chance ``density`` and is divided by it, so that the mean over draws is the source; then Σ w_t·v_t.
    mergekit rescales to the source's l1 norm instead (rescale="l1").  Draws follow (seed, tensor, source).""",
)
row(
    "dare_ties",
    "DARE with elected signs",
    sparsify="bernoulli",
    join="elected",
    density=0.5,
    rescale="1/p",
    **_ELECTED,
    paper="arXiv 2311.03099",
    doc="Drop at random and rescale as ``dare_linear``, then elect signs and average those that agree as ``ties``.  Source: yule-BUAA/MergeLM; mergekit.",
)
row(
    "della",
    "DELLA: drop by chance that falls with magnitude",
    sparsify="ranked",
    join="elected",
    density=0.5,
    epsilon=0.15,
    rescale="l1",
    elect="weighted",
    divide="weights",
    paper="arXiv 2406.11617",
    doc="""In each row an entry stays with a chance that rises with its magnitude's rank from density − ε to density + ε; what stays is
    rescaled to the source's l1 norm; signs are elected as in ``ties``.  Source: mergekit.  Errors: density ± ε outside (0, 1).""",
)
row(
    "della_linear",
    "DELLA without the vote",
    sparsify="ranked",
    join="sum",
    density=0.5,
    epsilon=0.15,
    rescale="l1",
    normalize=True,
    paper="arXiv 2406.11617",
    doc="Keeps as ``della``, then Σ w_t·v_t / Σ w_t.  Source: mergekit.",
)
row(
    "breadcrumbs",
    "Model breadcrumbs: neither outliers nor dust",
    sparsify="middle",
    join="sum",
    density=0.9,
    gamma=0.01,
    normalize=False,
    paper="arXiv 2312.06795",
    doc="""Drop the γ largest entries of each source and the smallest, so that ``density`` of them remain; then Σ w_t·v_t.  Where γ·numel < 1 no
    outlier is dropped (the reference code then drops the whole tensor).  Source: mergekit.""",
)
row(
    "breadcrumbs_ties",
    "Breadcrumbs with elected signs",
    sparsify="middle",
    join="elected",
    density=0.9,
    gamma=0.01,
    elect="weighted",
    divide="weights",
    paper="arXiv 2312.06795",
    doc="Keeps as ``breadcrumbs``, then votes as ``ties``.  Source: mergekit.",
)
