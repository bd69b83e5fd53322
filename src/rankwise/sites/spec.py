"""What a site is, as plain data: enough to plan, count, save and export without the model at hand."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

Kind = Literal["linear", "conv", "embedding", "experts", "plain", "block"]
Mode = Literal["called", "read", "plain", "block"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """One adaptable weight.

    Attributes:
        name: unique in the model and stable: the module path, with ``[q]`` appended for a part of a fused projection,
            or ``.parameter`` where a bare parameter is adapted.
        module: path of the module that holds the weight (``""`` is the model itself).
        param: name of the weight in that module (``weight``, ``gate_up_proj``, ``in_proj_weight`` …).
        kind: linear, conv, embedding, experts (a stack, leading axis E), plain (any parameter, for `full`)
            or block (a module that is wrapped, not a weight).
        mode: *called* (Δy is added to the module's output), *read* (another forward uses the weight: it reads W + ΔW),
            *plain* (a parameter that is no matrix: norms, biases) or *block*.
        role: q, k, v, o, gate, up, down, qkv parts, fc, embed, head, router, conv … or "other".
        out, inp: the 2-D view out×in of the weight (a conv's ``inp`` is in/groups·k·k).
        stack: number of experts E, or 0.
        rows: (start, stop) rows of the stored out×in weight that belong to this site, for a part of a fused
            projection; None is the full weight.
        repeat: (count, period): the rows come again ``count`` times, ``period`` rows apart (GPT-NeoX keeps
            q, k and v of each head together).
        transposed: stored in×out (GPT-2's Conv1D, some expert stacks).
        kernel: a conv's kernel size, else ().
        groups: a conv's groups.
        layer: index of the transformer block, or -1.
        dtype: the stored dtype's name, e.g. "float32"; "nf4", "int8" … where a codec holds it.
        quantised: the codec bridge's name, or "".
        bias: whether the module has one.
        tie_group: sites with the same non-empty value are tied: one parameter, several modules.
        input_group: sites with the same non-empty value take the very same tensor as input.
        routed: rows of this site's input are a selection of the batch's rows (experts called one by one).
        parent: class name of the module that holds the weight, for messages and `inspect`.
        refusal: why no adapter can be here (a weight stored in a way that is not known); "" where one can.
    """

    name: str
    module: str
    param: str = "weight"
    kind: Kind = "linear"
    mode: Mode = "called"
    role: str = "other"
    out: int
    inp: int
    stack: int = 0
    rows: tuple[int, int] | None = None
    repeat: tuple[int, int] = (1, 0)
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    groups: int = 1
    layer: int = -1
    dtype: str = "float32"
    quantised: str = ""
    bias: bool = False
    tie_group: str = ""
    input_group: str = ""
    routed: bool = False
    parent: str = ""
    refusal: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in), or (E, out, in) for a stack."""
        return (self.stack, self.out, self.inp) if self.stack else (self.out, self.inp)

    @property
    def max_rank(self) -> int:
        """The largest rank a change of this weight can have (per expert)."""
        return min(self.out, self.inp)

    def row_index(self) -> torch.Tensor | None:
        """int64 rows of the stored out×in weight that are this site's, in order; None for the full weight."""
        if self.rows is None:
            return None
        count, period = self.repeat
        starts = torch.arange(count)[:, None] * period
        return (starts + torch.arange(*self.rows)[None]).reshape(-1)

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults, JSON-able."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SiteSpec:
        """Inverse of :meth:`to_json`; unknown keys raise TypeError."""
        kwargs = dict(data)
        if kwargs.get("rows") is not None:
            kwargs["rows"] = tuple(kwargs["rows"])
        for key in ("kernel", "repeat"):
            if key in kwargs:
                kwargs[key] = tuple(kwargs[key])
        return cls(**kwargs)
