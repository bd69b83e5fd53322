"""Slots: no page with two owners, only what is pinned survives, everything is free after a drain, and pages hold the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.errors import OptionError
from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
from rankwise.serve.adapters.slots import SlotTable
from rankwise.serve.ops.base import Group, LoraPages
from rankwise.serve.types import AdapterRefused

GROUPS = (Group("qkv", ("q", "k"), 6, (6, 4)), Group("o", ("o",), 6, (6,)))


class Pool:
    """The plainest allocator; it checks what it is told."""

    def __init__(self, count: int):
        self.free = list(range(count))
        self.count = count

    def take(self, n: int) -> list[int] | None:
        if n > len(self.free):
            return None
        taken, self.free = self.free[:n], self.free[n:]
        return taken

    def give(self, ids: Sequence[int]) -> None:
        assert not set(ids) & set(self.free), "given back twice"
        self.free += ids


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def adapter(rank: int, seed: int) -> LoadedAdapter:
    g = torch.Generator().manual_seed(seed)
    pair = lambda out: (torch.randn(rank, 6, generator=g), torch.randn(out, rank, generator=g)) if rank else None
    pairs: dict[str, Any] = {"qkv": (pair(6), None), "o": (pair(6),)}
    return LoadedAdapter(
        AdapterMetadata(f"d{seed}", f"a{seed}", "", "lora", rank, -(-rank // 8), 1), pairs, {"q": (lambda x, y: y,)}, {}
    )


def table(count: int = 6) -> tuple[SlotTable, Pool, LoraPages]:
    pages, pool = LoraPages(GROUPS, count), Pool(count)
    return SlotTable(pages, pool, clock=Clock()), pool, pages


def holds(pages: LoraPages, ids: Sequence[int], served: LoadedAdapter) -> None:
    for name, pairs in served.pairs.items():
        for j, pair in enumerate(pairs):
            if ids:
                A, B = pages.read(ids, name, j)
                want = 0 if pair is None else pair[1] @ pair[0]
                assert torch.allclose(B @ A, torch.as_tensor(want).float().expand_as(B @ A), atol=1e-5)


OPS = st.lists(st.tuples(st.sampled_from(["ensure", "pin", "unpin", "drop", "outside"]), st.integers(0, 7)), max_size=60)


@given(OPS)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_invariants(ops: list[tuple[str, int]]) -> None:
    slots, pool, pages = table()
    adapters = [adapter(r, i) for i, r in enumerate([0, 1, 8, 9, 16, 20, 24, 48])]
    pins: dict[str, int] = {}
    outside: list[int] = []
    ever: set[int] = set()
    for op, k in ops:
        served, digest = adapters[k], adapters[k].manifest.digest
        before = {d for d in pins if pins[d]}
        if op == "ensure":
            resident = slots.find(digest)
            number = slots.ensure(digest, served)
            if number is not None:
                assert slots[number].digest == digest and slots[number].non_lora_changes == served.non_lora_changes
                assert number == resident if resident is not None else number not in ever, "a number came back"
                ever.add(number)
                holds(pages, slots.pages[number], served)
        elif op == "pin" and slots.find(digest) is not None:
            slots.pin(slots.find(digest))  # type: ignore[arg-type]
            pins[digest] = pins.get(digest, 0) + 1
        elif op == "unpin" and pins.get(digest):
            slots.unpin(slots.find(digest))  # type: ignore[arg-type]
            pins[digest] -= 1
        elif op == "drop":
            assert slots.drop(digest) == (not pins.get(digest))
        elif op == "outside":  # the pool's other tenant takes a page, or gives its pages back
            outside = (pool.give(outside), [])[1] if outside else (pool.take(1) or [])
        assert all(slots.find(d) is not None for d in before if pins[d]), "a pinned slot went"
        owned = [c for n in range(1000) if n in slots.pages for c in slots.pages[n]]
        assert sorted([*owned, *outside, *pool.free]) == list(range(pool.count)), "a page is lost or has two owners"
        for d in before:
            if pins[d]:
                holds(pages, slots.pages[slots.find(d)], adapters[int(d[1:])])  # type: ignore[index]
    for served in adapters:
        d = served.manifest.digest
        while pins.get(d):
            slots.unpin(slots.find(d))  # type: ignore[arg-type]
            pins[d] -= 1
        assert slots.drop(d)
    assert len(slots) == 0 and sorted([*pool.free, *outside]) == list(range(pool.count)) and slots.nbytes == 0


def test_the_longest_out_of_use_for_its_pages_goes_first() -> None:
    slots, pool, _ = table(4)
    for i, rank in enumerate((16, 8, 8)):
        slots.ensure(f"d{i}", adapter(rank, i))
    slots.ensure("d0", adapter(16, 0))
    assert slots.ensure("d3", adapter(8, 3)) is not None
    assert [d for d in ("d0", "d1", "d2", "d3") if slots.find(d) is not None] == ["d0", "d2", "d3"]
    assert slots.evictions == {"room": 1}


def test_what_cannot_fit_and_what_cannot_fit_now() -> None:
    slots, pool, _ = table(2)
    with pytest.raises(AdapterRefused, match="needs 3 pages"):
        slots.ensure("big", adapter(20, 1))
    first = slots.ensure("a", adapter(16, 2))
    assert first is not None
    slots.pin(first)
    assert slots.ensure("b", adapter(1, 3)) is None and slots.find("a") == first
    assert slots.ensure("loose", adapter(0, 4)) is not None, "an adapter without pairs needs no page"
    with pytest.raises(OptionError, match="more often than it was pinned"):
        slots.unpin(first), slots.unpin(first)
    with pytest.raises(OptionError, match="There is no slot 99"):
        slots.pin(99)


def test_pages_come_back_when_writing_fails() -> None:
    slots, pool, _ = table(2)
    bad = LoadedAdapter(adapter(8, 1).manifest, {"qkv": ((torch.randn(8, 5), torch.randn(6, 8)), None)})
    with pytest.raises(OptionError, match="q takes A"):
        slots.ensure("bad", bad)
    assert sorted(pool.free) == [0, 1] and len(slots) == 0


def test_what_takes_no_page_goes_with_its_last_user() -> None:
    """Nothing would ask for its place, so its numbers would stay for ever."""
    slots, pool, _ = table()
    for n in range(5):
        number = slots.ensure(f"d{n}", adapter(0, n))
        assert number is not None
        slots.pin(number), slots.pin(number)
        slots.unpin(number)
        assert slots.find(f"d{n}") == number
        slots.unpin(number)
    assert len(slots) == 0 and slots.evictions["idle"] == 5
    assert slots.ensure("d0", adapter(0, 0)) is not None
    with_pages = slots.ensure("d9", adapter(3, 9))
    assert with_pages is not None
    slots.pin(with_pages), slots.unpin(with_pages)
    assert slots.find("d9") == with_pages and len(pool.free) == 5
