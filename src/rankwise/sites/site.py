"""A site: one weight of a model that can be adapted; the only code that reads or writes a base weight.

``read`` and ``write`` take and give fp32 out×in whatever the storage (transposed, a slice of a fused projection, a
stack of experts, a quantised tensor); ``op`` says how such a matrix acts on the module's input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.codecs.library import find_bridge
from rankwise.delta.geometry import LINEAR, Conv, Embedding, Geometry
from rankwise.errors import AttachError

if TYPE_CHECKING:
    from rankwise.sites.coupling import Axis
    from rankwise.sites.spec import SiteSpec

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Site:
    """One adaptable weight of a live model.

    Args:
        spec: what it is, as plain data.
        module: the module that holds the weight.
        coupled_axes: the axes whose units (attention heads, an MLP's channels) other sites hold parts of.
    """

    def __init__(self, spec: SiteSpec, module: nn.Module, coupled_axes: tuple[Axis, ...] = ()):
        self.spec = spec
        self.module = module
        self.coupled_axes = coupled_axes
        self._op: Geometry | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def param(self) -> nn.Parameter:
        """The stored tensor, as the module holds it (under tensor parallelism or FSDP2: what it holds now)."""
        param = self.module._parameters[self.spec.param]  # past any property of an adapted class
        assert param is not None
        return param

    @property
    def device(self) -> torch.device:
        if self.spec.kind == "block":
            return next((p.device for p in self.module.parameters()), torch.device("cpu"))
        return self.param.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the site computes in: the stored one, or fp32 where codes are stored."""
        dtype = self.param.dtype
        if dtype.is_floating_point and not self.spec.quantised:
            return dtype
        compute = getattr(self.module, "compute_dtype", None)
        return compute if compute is not None else torch.float32 if not dtype.is_floating_point else dtype

    @property
    def bias(self) -> Tensor | None:
        """This site's part of the module's bias, or None."""
        name = "in_proj_bias" if self.spec.param == "in_proj_weight" else "bias"
        bias = self.module._parameters.get(name) if self.spec.bias else None
        rows = self.spec.row_index()
        return bias if bias is None or rows is None else bias[rows.to(bias.device)]

    @property
    def op(self) -> Geometry:
        """How an out×in matrix acts on the module's input."""
        if self._op is None:
            m = self.module
            if self.spec.kind == "conv":
                assert isinstance(m, CONVS)
                self._op = Conv(
                    tuple(m.kernel_size),
                    tuple(m.stride),
                    m.padding,
                    tuple(m.dilation),
                    m.groups,
                    m.padding_mode,
                    len(m.kernel_size),
                )
            elif self.spec.kind == "embedding":
                assert isinstance(m, nn.Embedding)
                self._op = Embedding(padding_idx=m.padding_idx)
            else:
                self._op = LINEAR
        return self._op

    def view(self, weight: Tensor) -> Tensor:
        """The out×in (or E×out×in) view of a tensor stored as this site's module stores it."""
        if self.spec.kind == "conv":
            weight = weight.reshape(weight.shape[0], -1)
        elif self.spec.kind == "plain":
            weight = weight.reshape(self.spec.shape)
        elif self.spec.transposed or self.spec.kind == "embedding":
            weight = weight.transpose(-1, -2)
        rows = self.spec.row_index()
        return weight if rows is None else weight.index_select(-2, rows.to(weight.device))

    def stored(self, W: Tensor, into: Tensor) -> Tensor:
        """Inverse of :meth:`view`: ``into`` (as stored) with this site's rows replaced by ``W``; a new tensor."""
        rows = self.spec.row_index()
        if rows is not None:
            full = into.transpose(-1, -2) if self.spec.transposed else into
            full = full.to(W.dtype).index_copy(-2, rows.to(W.device), W)
            return full.transpose(-1, -2) if self.spec.transposed else full
        if self.spec.kind in ("conv", "plain"):
            return W.reshape(into.shape)
        return W.transpose(-1, -2) if self.spec.transposed or self.spec.kind == "embedding" else W

    def weight(self) -> Tensor:
        """The base weight out×in (E×out×in) in a floating dtype; a view where the storage allows, never a copy."""
        bridge = find_bridge(self.module) if self.spec.quantised else None
        raw = bridge.read(self.module) if bridge else self.param.detach()
        if bridge:
            raw = raw.mT if self.spec.kind == "embedding" else raw
            rows = self.spec.row_index()
            return raw if rows is None else raw[rows]
        return self.view(raw)

    def read(self) -> Tensor:
        """The base weight as fp32 (fp64 stays) out×in: dequantised, not transposed, only this site's rows."""
        W = self.weight()
        return W if W.dtype == torch.float64 else W.float()

    def untouched(self) -> Tensor:
        """What :meth:`read` gave before any adapter was merged into this weight."""
        state = self.module.__dict__.get("_rankwise")
        return self.read() if state is None else state.registry.untouched(self)

    @torch.no_grad()
    def write(self, W: Tensor) -> Tensor:
        """Store ``W`` (out×in); returns the fp32 value *as actually stored* (cast or requantised)."""
        if tuple(W.shape) != self.spec.shape:
            raise AttachError(f"Site {self.name!r} holds {self.spec.shape}, not {tuple(W.shape)}.")
        bridge = find_bridge(self.module) if self.spec.quantised else None
        if bridge:
            rows = self.spec.row_index()
            W = W.mT.contiguous() if self.spec.kind == "embedding" else W
            whole = W if rows is None else bridge.read(self.module).index_copy(0, rows, W.float())
            bridge.write(self.module, whole)
        else:
            p = self.param
            p.data.copy_(self.stored(W, p.data).to(p.dtype))
        self.touched()
        return self.read()

    def touched(self) -> None:
        """Drop the packed copies of the weight, which has just been written."""
        state = self.module.__dict__.get("_rankwise")
        if state is not None:
            state.fast.product.release()

    def snapshot(self) -> Any:
        """What :meth:`restore` needs to give the exact bits back."""
        bridge = find_bridge(self.module) if self.spec.quantised else None
        return bridge.snapshot(self.module) if bridge else self.param.detach().clone()

    @torch.no_grad()
    def restore(self, snapshot: Any) -> None:
        """Put the bits of a :meth:`snapshot` back."""
        bridge = find_bridge(self.module) if self.spec.quantised else None
        if bridge:
            bridge.restore(self.module, snapshot)
        else:
            self.param.data.copy_(snapshot)
        self.touched()

    def base_out(self, x: Tensor) -> Tensor:
        """What the base computes from ``x`` at this site, without bias (a naive reference)."""
        W = self.weight()
        return self.op.linear(x, W if self.spec.kind == "embedding" else W.to(x.dtype))

    def __repr__(self) -> str:
        s = self.spec
        return f"Site({s.name!r}, {s.role}, {'×'.join(map(str, s.shape))}, {s.mode})"
