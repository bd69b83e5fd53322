"""Plans of packed steps, and the paged attention that reads them, against its definition."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.serve.batch import BASE, Role, Segment, Span, TokenPlan, make_plan
from rankwise.serve.model import paged_attention as paged
from rankwise.serve.model.decode_tables import LEAST, RowTables, kv_slots_of


def spans_of(shapes: list[tuple[int, int, int]], page: int) -> list[Span]:
    """(start, tokens, slot) of each request; blocks in a scrambled order."""
    out, free = [], list(range(sum(-(-(s + q) // page) for s, q, _ in shapes)))[::-1]
    free = free[::2] + free[1::2]
    for i, (start, q, slot) in enumerate(shapes):
        blocks = tuple(free.pop() for _ in range(-(-(start + q) // page)))
        role = Role.DECODE if q == 1 and start else Role.PREFILL
        out.append(Span(f"r{i}", tuple(range(10 * i, 10 * i + q)), start, blocks, slot, role, 1))
    return out


def test_spans_of_one_slot_lie_together_and_the_base_first() -> None:
    plan = make_plan(spans_of([(4, 1, 2), (0, 3, 1), (5, 1, BASE), (6, 1, 1)], 2), 2)
    assert [s.slot for s in plan.spans] == [BASE, 1, 1, 2]
    assert plan.segments == (Segment(1, 1, 5), Segment(2, 5, 6))
    assert plan.T == 6 and plan.cu_q == (0, 1, 2, 5, 6)
    assert plan.positions.tolist() == [5, 6, 0, 1, 2, 4]
    assert plan.sample_rows.tolist() == [0, 1, 4, 5]


def naive(query: Tensor, K: Tensor, V: Tensor, plan: TokenPlan, scale: float, window: int | None = None) -> Tensor:
    """(T, heads, d) by the definition, request by request and row by row; the caches already hold this step."""
    out = []
    for s, first in zip(plan.spans, plan.cu_q, strict=False):
        kv_slots = kv_slots_of(s, plan.page)
        for t in range(len(s.tokens)):
            at = s.start + t
            low = 0 if window is None else max(0, at + 1 - window)
            k, v = K[kv_slots[low : at + 1]], V[kv_slots[low : at + 1]]
            k, v = (c.repeat_interleave(query.shape[1] // K.shape[1], 1) for c in (k, v))
            weight = torch.einsum("hd,chd->hc", query[0, :, first + t], k).mul(scale).softmax(-1)
            out.append(torch.einsum("hc,chd->hd", weight, v))
    return torch.stack(out)


def test_kv_slots_follow_the_block_table() -> None:
    plan = make_plan([Span("r", (7, 8, 9), 3, (5, 2, 9), BASE, Role.PREFILL, 0)], 2)
    assert plan.kv_slots.tolist() == [2 * 2 + 1, 9 * 2, 9 * 2 + 1]
    assert plan.sample_rows.numel() == 0


shape = st.tuples(st.integers(0, 9), st.integers(1, 6), st.sampled_from([BASE, 0, 3]))


@settings(max_examples=60, deadline=None)
@given(st.lists(shape, min_size=1, max_size=6), st.sampled_from([1, 2, 4]), st.sampled_from([None, 3]), st.integers(0, 9))
def test_attention_is_its_definition(shapes: list[tuple[int, int, int]], page: int, window: int | None, seed: int) -> None:
    """Any mix of chunks and decoding rows, any pages, windows, grouped heads; KV slots that nobody wrote hold NaN."""
    g = torch.Generator().manual_seed(seed)
    plan = make_plan(spans_of(shapes, page), page)
    heads, kv, d = 4, 2, 8
    store = paged.KvStore(128, page)
    k, v = (torch.randn(1, kv, plan.T, d, generator=g) for _ in range(2))
    q = torch.randn(1, heads, plan.T, d, generator=g)
    K, V = store.of(0, k[0].transpose(0, 1), v[0].transpose(0, 1))
    K.fill_(torch.nan), V.fill_(torch.nan)
    for s in plan.spans:  # what earlier steps would have written
        kv_slots = kv_slots_of(s, page)[: s.start]
        K[kv_slots], V[kv_slots] = (torch.randn(s.start, kv, d, generator=g) for _ in range(2))
    module = torch.nn.Module()
    module.layer_idx = 0
    with paged.attending(paged.AttentionStep(plan), store):
        got, _ = paged.paged_attention(module, q, k, v, None, sliding_window=window)
    want = naive(q, K, V, plan, d**-0.5, window)
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-5)


def test_softcap_is_the_definitions() -> None:
    g = torch.Generator().manual_seed(0)
    plan = make_plan(spans_of([(5, 1, BASE), (2, 3, BASE)], 2), 2)
    store, module = paged.KvStore(16, 2), torch.nn.Module()
    module.layer_idx = 0
    k, v, q = (torch.randn(1, 2, plan.T, 4, generator=g) for _ in range(3))
    K, V = store.of(0, k[0].transpose(0, 1), v[0].transpose(0, 1))
    K.normal_(generator=g), V.normal_(generator=g)
    with paged.attending(paged.AttentionStep(plan), store):
        got, _ = paged.paged_attention(module, q, k, v, None, softcap=0.5)
    kv_slots = kv_slots_of(plan.spans[0], 2)
    scores = torch.einsum("hd,chd->hc", q[0, :, 0], K[kv_slots]) * 4**-0.5
    weights = (torch.tanh(scores / 0.5) * 0.5).softmax(-1)
    torch.testing.assert_close(got[0, 0], torch.einsum("hc,chd->hd", weights, V[kv_slots]), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([None, 5]), st.sampled_from([None, None, 0, 3 * LEAST, 7 * LEAST]))
def test_rows_kept_side_by_side_are_what_a_gather_gives(seed: int, window: int | None, limit: int | None) -> None:
    """Requests come, decode, pause, are put back, go, and outgrow a table; every step equals the definition, within the limit."""
    rnd, g = random.Random(seed), torch.Generator().manual_seed(seed % 1000)
    page, kv, heads, d = 4, 2, 4, 8
    store, tables = paged.KvStore(200, page), RowTables(3, 2 * LEAST, limit)
    module = torch.nn.Module()
    module.layer_idx = 0
    K, V = store.of(0, *(torch.randn(1, kv, d, generator=g) for _ in range(2)))
    K.fill_(torch.nan), V.fill_(torch.nan)
    live: dict[int, int] = {}
    blocks: dict[int, tuple[int, ...]] = {}
    free, serials = list(range(200)), 0
    for _ in range(rnd.randrange(4, 12)):
        while len(live) < 5 and rnd.random() < 0.6:
            length = rnd.choice([1, 7, LEAST - 2, 2 * LEAST - 1])
            blocks[serials] = tuple(free.pop() for _ in range(-(-(length + 14) // page)))
            kv_slots = kv_slots_of(Span("", (0,) * length, 0, blocks[serials]), page)
            K[kv_slots], V[kv_slots] = (torch.randn(length, kv, d, generator=g) for _ in range(2))
            live[serials] = length
            serials += 1
        for gone in [s for s in live if rnd.random() < 0.15]:
            free += blocks.pop(gone)
            del live[gone]
        acting = [s for s in live if rnd.random() < 0.85]
        if not acting:
            continue
        plan = make_plan([Span(f"r{s}", (1,), live[s], blocks[s], rnd.choice([BASE, 1]), Role.DECODE, 1, s) for s in acting], page)
        q, k, v = (torch.randn(1, n, plan.T, d, generator=g) for n in (heads, kv, kv))
        ill = plan.spans[-1].serial if rnd.random() < 0.3 else -1  # its last step makes NaN, which must stay its own
        if ill >= 0:
            k[:, :, -1] = v[:, :, -1] = torch.nan
        with paged.attending(paged.AttentionStep(plan, tables), store):
            got, _ = paged.paged_attention(module, q, k, v, None, sliding_window=window)
        well = plan.T - (ill >= 0)
        assert limit is None or tables.nbytes <= limit * 2 * kv * d * 4
        if rnd.random() < 0.1:
            tables.relieve()
            assert tables.nbytes == 0
        torch.testing.assert_close(got[0, :well], naive(q, K, V, plan, d**-0.5, window)[:well], rtol=1e-5, atol=1e-5)
        if ill >= 0:
            free += blocks.pop(ill)
            del live[ill]
            acting.remove(ill)
        for s in acting:
            live[s] += 1 if rnd.random() < 0.9 else 0  # a row may be computed again, as after a guess that was wrong
