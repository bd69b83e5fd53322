"""One device's pages, and the operators that work on them: adapters held split, and adapters held replicated, in one step.

A page is a page in both stores; an adapter's numbers are written to one and its pages are left out of the other, whose memory
the system then never gives.  Replicated adapters run by any operator on slices (:mod:`rankwise.serve.parallel.experimental.cutting`
says why nothing is sent).  Split ones hold ⌈8/N⌉ of a page's components at column-parallel groups:

    v_n (pairs × m·⌈8/N⌉) → gathered (pairs × m·8)    row-parallel: v_n (pairs × 8) → summed;  then B's slice
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from rankwise.errors import OptionError
from rankwise.serve.ops.bags import Bags
from rankwise.serve.ops.base import WIDTH, DeltaOp, Group, LoraPages, Pairs
from rankwise.serve.ops.registry import make_op
from rankwise.serve.parallel.experimental.cutting import cut_model, cut_pairs, gathered

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter
    from rankwise.serve.batch import TokenPlan
    from rankwise.serve.model.runner import NativeRunner
    from rankwise.serve.parallel.experimental.comm import Communicator
    from rankwise.serve.parallel.experimental.messages import Build
    from rankwise.serve.parallel.experimental.shares import Share

R = TypeVar("R", bound="NativeRunner")

SPLITS = ("auto", "split", "replicate")
SPLIT_FROM = 64  #: rank from which "auto" splits: two collectives a block are paid with time, and below it save too little memory


class SplitBags(Bags):
    """:class:`~rankwise.serve.ops.bags.Bags` on pages whose components and inputs are shared out over the devices."""

    name = "split"

    def __init__(self, pages: LoraPages, share: Share, comm: Communicator):
        super().__init__(pages)
        self.share, self.comm = share, comm

    def shrink(self, group: Group, x: Tensor) -> Any:
        return super().shrink(self.pages.groups[group.name], x)

    def expand(self, group: Group, j: int, v: Any, y: Tensor) -> None:
        super().expand(self.pages.groups[group.name], j, v, self._mine(group, y))

    def apply(self, group: Group, x: Tensor, ys: Sequence[Tensor]) -> None:
        super().apply(self.pages.groups[group.name], x, [self._mine(group, y) for y in ys])

    def _mine(self, group: Group, y: Tensor) -> Tensor:
        """The outputs whose changes are this device's: all of a column-parallel slice, [lo, hi) of a partial sum."""
        if not self.share.row_parallel(group.name):
            return y
        lo, hi = self.share.outputs(group.name)
        return y if y.shape[1] == hi - lo else y[:, lo:hi]

    def _summed(self, group: Group, v: Tensor) -> Tensor:
        if self.share.row_parallel(group.name):
            return self.comm.all_reduce(v, "adapter")
        m = len(group.modules)
        parts = self.comm.all_gather(v, "adapter").unflatten(-1, (m, -1))
        return gathered(parts, WIDTH).reshape(v.shape[0], m * WIDTH)


class Both(DeltaOp):
    """Two operators on two stores, each of which leaves the other's pages alone."""

    name: ClassVar[str] = "parallel"

    def __init__(self, ops: Sequence[DeltaOp]):
        self.ops = ops

    def begin(self, plan: TokenPlan, slots: Mapping[int, Sequence[int]]) -> None:
        for op in self.ops:
            op.begin(plan, slots)

    def shrink(self, group: Group, x: Tensor) -> list[Any]:
        return [op.shrink(group, x) for op in self.ops]

    def expand(self, group: Group, j: int, v: list[Any], y: Tensor) -> None:
        for op, part in zip(self.ops, v, strict=True):
            op.expand(group, j, part, y)

    def apply(self, group: Group, x: Tensor, ys: Sequence[Tensor]) -> None:
        for op in self.ops:
            op.apply(group, x, ys)


class DevicePages:
    """The adapters' pages of one device.

    Args:
        split: ``split``, ``replicate``, or ``auto``: by each adapter's rank.
        op: how replicated adapters are computed.  Split ones are always computed by bags.

    Raises:
        OptionError: no such way; an operator that reads pages that were left out.
    """

    def __init__(
        self,
        share: Share,
        comm: Communicator,
        count: int,
        dtype: torch.dtype,
        split: str,
        op: str = "auto",
        native: bool | None = None,
    ):
        if split not in SPLITS:
            raise OptionError(f"Adapters are split 'auto', 'split' or 'replicate'; {split!r} came.")
        if op == "triton":
            raise OptionError("With several devices the Triton operator is not served; give --op auto.")
        self.share, self.comm, self.count, self.way, self._op, self._native = share, comm, count, split, op, native
        self.stores: dict[bool, LoraPages] = {}
        if split != "split":
            self.stores[False] = LoraPages(share.groups, count, dtype)
        if split != "replicate":
            across = {g.name: WIDTH if share.row_parallel(g.name) else -(-WIDTH // share.size) for g in share.groups}
            self.stores[True] = LoraPages([self._slice(g) for g in share.groups], count, dtype, across=across)

    def _slice(self, g: Group) -> Group:
        lo, hi = self.share.outputs(g.name) if self.share.row_parallel(g.name) else (0, 0)
        return dataclasses.replace(g, outs=(hi - lo,)) if hi else g

    @property
    def page_bytes(self) -> int:
        """Of a page in the larger way of holding it."""
        return max(s.page_bytes for s in self.stores.values())

    def operator(self) -> DeltaOp:
        ops: list[DeltaOp] = [
            SplitBags(store, self.share, self.comm) if split else make_op(self._op, store, self._native)
            for split, store in self.stores.items()
        ]
        return ops[0] if len(ops) == 1 else Both(ops)

    def splits(self, pairs: Mapping[str, Pairs]) -> bool:
        """Whether an adapter is held split."""
        rank = max((p[0].shape[0] for those in pairs.values() for p in those if p is not None), default=0)
        return self.way == "split" or (self.way == "auto" and rank >= SPLIT_FROM)

    def write(self, pages: Sequence[int], split: bool, pairs: Mapping[str, Pairs]) -> None:
        """``pairs``: this device's, by :func:`slices`."""
        self.stores[split].write(pages, pairs)
        for way, store in self.stores.items():
            if way is not split:
                store.leave(pages)


def slices(pairs: Mapping[str, Pairs], share: Share, split: bool) -> dict[str, Pairs]:
    """A whole adapter's pairs as the device of ``share`` holds them in its pages."""
    return {name: cut_pairs(those, name, share, split, WIDTH) for name, those in pairs.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class SlotCopy:
    """A slot as a follower knows it."""

    pages: tuple[int, ...]
    served: LoadedAdapter


def device_of(
    model: nn.Module, share: Share, comm: Communicator, build: Build, runner: Callable[..., R], expected: Tensor
) -> tuple[DevicePages, R]:
    """One device's pages and its runner.

    Args:
        model, share: the whole base, which stays as it is, and this device's slices of it.
        comm: this device's end of the collectives.
        build: sizes and choices, the same on all devices.
        runner: makes a :class:`~rankwise.serve.model.runner.NativeRunner`.
        expected: the whole model's logits of the probe.

    Raises:
        AttachError, OptionError: as the runner and the operators say.
    """
    local = cut_model(model, share)
    dtype = next(p.dtype for p in local.parameters() if p.is_floating_point())
    pages = DevicePages(share, comm, build.lora_pages, dtype, build.split, build.op, build.native)
    finish = {g.name: comm.all_reduce for g in share.groups if share.row_parallel(g.name)}
    first: LoraPages = next(iter(pages.stores.values()))
    made = runner(
        local, share.groups, first, pages.operator(), pages.operator(), blocks=build.blocks, page=build.page,
        max_rows=build.max_rows, pack=build.pack, loop=build.loop, expected=expected, finish=finish,
    )  # fmt: skip
    made.rows.limit = build.row_tokens
    return pages, made
