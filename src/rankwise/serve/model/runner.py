"""A model that runs packed steps: unmodified transformers modelling code, hooked linears, paged attention."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from rankwise.errors import AttachError
from rankwise.serve.batch import BASE, Role, Segment, Span, TokenPlan, make_plan, planned
from rankwise.serve.model import paged_attention as paged
from rankwise.serve.model.decode_tables import RowTables
from rankwise.serve.model.linear_hooks import NOTHING, Acting, Changes, Finish, hook_model
from rankwise.serve.model.llama_loop import loop_of

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter
    from rankwise.serve.ops.base import DeltaOp, Group, LoraPages

log = logging.getLogger("rankwise.serve")
ROW_CAP = 4096  #: tokens of context up to which decoding rows are kept side by side


class RunnerSlot(Protocol):
    """What a slot holds: its pages, and the adapter whose numbers are in them."""

    @property
    def pages(self) -> tuple[int, ...]: ...

    @property
    def served(self) -> LoadedAdapter: ...


class Runner(Protocol):
    """One step of a plan to the logits of its sample rows."""

    page: int

    def run(self, plan: TokenPlan, slots: Mapping[int, RunnerSlot]) -> Tensor:
        """(S, vocabulary) fp32, in the order of ``plan.sample_rows``."""
        ...


class NativeRunner:
    """Runs a causal language model of transformers on packed rows.

    Args:
        model: in evaluation mode; its linears and attention are taken over for good (load it afresh to use it elsewhere).
        groups: the modules that adapters may change, by shared input.
        pages: their numbers; ``op``, ``head_op``: two operators of one sort on these pages (packed tokens, sample rows).
        blocks, page: size of the key-value cache in blocks of ``page`` tokens.
        rows: rows of a usual step, for the choice of packing; ``pack``: True or False overrules the probe.
        max_rows: decoding rows whose keys and values are kept side by side as well.
        expected: the whole model's logits of the probe (:func:`own_logits`), where ``model`` is one device's part of it;
            ``finish``: see :func:`~rankwise.serve.model.linear_hooks.hook_model`.
        loop: False runs every step through the model's own modules, True asks for :mod:`~rankwise.serve.model.llama_loop`, None takes
            it where it is known to compute what the model does.

    Raises:
        AttachError: a model whose packed steps do not give its own logits (recurrent layers, attention of its own sort).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        pages: LoraPages,
        op: DeltaOp,
        head_op: DeltaOp,
        *,
        blocks: int,
        page: int = 16,
        rows: int = 16,
        max_rows: int = 64,
        pack: bool | None = None,
        loop: bool | None = None,
        expected: Tensor | None = None,
        finish: Mapping[str, Finish] = MappingProxyType({}),
    ):
        self.model = model.eval()
        self.page = page
        self.pages, self.op, self.head_op = pages, op, head_op
        self.groups = {g.name: g for g in groups}
        self.acting = Acting()
        self.loop = None if loop is False else loop_of(model)  # asked before anything is hooked
        if loop and self.loop is None:
            raise AttachError(f"No loop stands for {type(model).__name__}; leave loop out, and it runs through its modules.")
        expected = own_logits(model, blocks, page) if expected is None else expected
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.head_path = next((n for n, m in model.named_modules() if m is head), None)
        if self.head_path is None:
            raise AttachError(
                f"{type(model).__name__} has no output head over a vocabulary; only causal language models are served."
            )
        self.bundles = hook_model(model, groups, self.acting, rows=rows, pack=pack, finish=finish)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.store = paged.KvStore(blocks, page, dtype)
        self.rows = RowTables(max_rows, ROW_CAP)
        paged.install(model)
        self._narrow = "logits_to_keep" in inspect.signature(model.forward).parameters
        if self.loop is not None and self._gap(expected) > self._tolerance(expected):
            log.warning("The loop for %s gives other logits here and is not used.", type(model).__name__)
            self.loop = None
        if self.loop is None and not (gap := self._gap(expected)) <= self._tolerance(expected):
            raise AttachError(
                f"{type(self.model).__name__} computes other logits in packed steps (off by {gap:.1e} of the largest): "
                "some layer of it mixes tokens outside the attention interface, so it cannot be served."
            )

    def _tolerance(self, expected: Tensor) -> float:
        return 1e-3 if expected.dtype == torch.float32 and self.store.dtype == torch.float32 else 5e-2

    def _gap(self, expected: Tensor) -> float:
        """How far two chunks of one probe beside another request are from the model's own logits, as a share of the largest."""
        n, page = expected.shape[0], self.page
        ids = _probe_ids(self.model, n)
        blocks = tuple(range(-(-n // page)))
        other = tuple(range(len(blocks), 2 * len(blocks)))
        cut = n // 2
        first = [Span("p", ids[:cut], 0, blocks, BASE, Role.PREFILL, cut), Span("q", ids, 0, other, BASE, Role.PREFILL, n)]
        one = self.run(make_plan(first, page), {})
        two = self.run(make_plan([Span("p", ids[cut:], cut, blocks, BASE, Role.PREFILL, n - cut)], page), {})
        apart = torch.stack([torch.cat([one[:cut], two]) - expected, one[cut:] - expected])
        return float(apart.abs().max() / expected.abs().max().clamp_min(1e-6))

    @torch.inference_mode()
    def run(self, plan: TokenPlan, slots: Mapping[int, RunnerSlot]) -> Tensor:
        """(S, vocabulary) fp32 logits of the sample rows, in order."""
        used = {s.slot for s in plan.segments}
        self.acting.body = self._changes(plan.segments, plan, slots, self.op, used)
        self.acting.head = self._head_changes(plan, slots, used)
        try:
            with planned(plan), paged.attending(paged.AttentionStep(plan, self.rows), self.store):
                return self._logits(plan).float()
        finally:
            for b in self.bundles:
                b.forget()
            self.acting.body = self.acting.head = NOTHING

    def _logits(self, plan: TokenPlan) -> Tensor:
        if self.loop is not None:
            return self.loop(plan)
        kwargs = {"logits_to_keep": plan.sample_rows} if self._narrow else {}
        out = self.model(input_ids=plan.tokens[None], position_ids=plan.positions[None], use_cache=False, **kwargs).logits[0]
        return out if self._narrow else out[plan.sample_rows]

    def _changes(
        self, segments: Sequence[Segment], plan: TokenPlan, slots: Mapping[int, RunnerSlot], op: DeltaOp, used: set[int]
    ) -> Changes:
        if not used:
            return NOTHING
        groups = frozenset(name for s in used for name in slots[s].served.pairs)
        if groups:
            op.begin(plan, {s: slots[s].pages for s in used})
        non_lora_changes: dict[str, list] = {}  # type: ignore[type-arg]
        full_params: dict[str, list] = {}  # type: ignore[type-arg]
        for seg in segments:
            served = slots[seg.slot].served
            for path, fns in served.non_lora_changes.items():
                non_lora_changes.setdefault(path, []).append((seg, fns))
            for name, t in served.full_params.items():
                full_params.setdefault(name, []).append((seg, t))
        return Changes(op if groups else None, groups, non_lora_changes, full_params)

    def _head_changes(self, plan: TokenPlan, slots: Mapping[int, RunnerSlot], used: set[int]) -> Changes:
        """The same for the head, which sees only the sample rows (all rows where the model cannot narrow them)."""
        if not self._narrow:
            return self.acting.body
        touched = [s for s in used if self._touches_head(slots[s].served)]
        if not touched:
            return NOTHING
        rows = _sample_plan(plan, set(touched))
        return self._changes(rows.segments, rows, slots, self.head_op, {s.slot for s in rows.segments})

    def _touches_head(self, served: LoadedAdapter) -> bool:
        path = self.head_path
        return (
            any(path in self.groups[n].modules for n in served.pairs)
            or path in served.non_lora_changes
            or any(n.rpartition(".")[0] == path for n in served.full_params)
        )


def _sample_plan(plan: TokenPlan, slots: set[int]) -> TokenPlan:
    """The sample rows of ``slots`` as a plan of their own (only what a delta operator reads of it)."""
    segments: list[Segment] = []
    at = 0
    for s in plan.spans:
        if s.slot in slots and s.samples:
            if segments and segments[-1].slot == s.slot and segments[-1].end == at:
                segments[-1] = Segment(s.slot, segments[-1].start, at + s.samples)
            else:
                segments.append(Segment(s.slot, at, at + s.samples))
        at += s.samples
    made = tuple(segments)
    return dataclasses.replace(plan, segments=made, composition=made, cu_q=(0, at))


def _probe_ids(model: nn.Module, n: int) -> tuple[int, ...]:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randint(vocabulary, (n,), generator=g).tolist())


@torch.inference_mode()
def own_logits(model: nn.Module, blocks: int, page: int) -> Tensor:
    """The plain model's logits (n, vocabulary) of a probe that fits half the cache, before anything is hooked."""
    n = max(2, min(40, blocks // 2 * page))
    return model(input_ids=torch.tensor([_probe_ids(model, n)]), use_cache=False).logits[0].float()
