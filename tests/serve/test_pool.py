"""The block pool: conservation under any sequence of calls, floors, references, copies on write."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rankwise.errors import OptionError, UnknownName
from rankwise.serve.cache.block_pool import ADAPTER, KV, BlockPool, PoolUnit
from rankwise.serve.ops.base import Group, LoraPages
from rankwise.serve.simulate.pool import SharedBlockPool, split

TRAIN = "train"  # any third tag
UNITS = {KV: PoolUnit(16, 12), ADAPTER: PoolUnit(40, 5), TRAIN: PoolUnit(24, 6)}
FLOORS = {ADAPTER: 80, TRAIN: 30}
BUDGET = 300
TAGS = st.sampled_from(sorted(UNITS))
OWNERS = st.sampled_from(["a", "b", "c", ""])


class PoolMachine(RuleBasedStateMachine):
    """Beside the pool a plain multiset of who holds what."""

    @initialize(floors=st.booleans(), shuffled=st.booleans())
    def start(self, floors: bool, shuffled: bool) -> None:
        self.floors = FLOORS if floors else {}
        self.pool = SharedBlockPool(UNITS, BUDGET, self.floors, random.Random(0) if shuffled else None)
        self.held: Counter[tuple[str, str, int]] = Counter()

    def units(self, tag: str) -> set[int]:
        return {i for o, t, i in self.held if t == tag}

    def bytes(self, tag: str) -> int:
        return len(self.units(tag)) * UNITS[tag].bytes

    @rule(n=st.integers(0, 6), tag=TAGS, owner=OWNERS)
    def allocate(self, n: int, tag: str, owner: str) -> None:
        reserved = sum(max(self.bytes(t), self.floors.get(t, 0)) for t in UNITS if t != tag)
        fits = len(self.units(tag)) + n <= UNITS[tag].count and (
            n == 0 or reserved + self.bytes(tag) + n * UNITS[tag].bytes <= BUDGET
        )
        ids = self.pool.allocate(n, tag, owner)
        assert (ids is not None) == fits
        if ids is not None:
            assert len(set(ids)) == n and not self.units(tag) & set(ids)  # nobody else's
            self.held.update((owner, tag, i) for i in ids)

    @rule(data=st.data(), owner=OWNERS)
    def share(self, data: st.DataObject, owner: str) -> None:
        if self.held:
            _, tag, i = data.draw(st.sampled_from(sorted(self.held)))
            self.pool.share([i], tag, owner)
            self.held[owner, tag, i] += 1

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.held:
            owner, tag, i = key = data.draw(st.sampled_from(sorted(self.held)))
            self.held[key] -= 1
            self.held = +self.held
            assert self.pool.free([i], tag, owner) == (() if i in self.units(tag) else (i,))

    @rule(data=st.data())
    def own(self, data: st.DataObject) -> None:
        if self.held:
            owner, tag, i = key = data.draw(st.sampled_from(sorted(self.held)))
            alone = sum(n for (o, t, j), n in self.held.items() if (t, j) == (tag, i)) == 1
            assert self.pool.writable(i, tag) == alone
            got = self.pool.own(i, tag, owner)
            if alone:
                assert got == i
            elif got is not None:
                assert got not in self.units(tag)
                self.held[key] -= 1
                self.held[owner, tag, got] += 1
                self.held = +self.held

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        self.pool.release(owner)
        self.held = Counter({k: n for k, n in self.held.items() if k[0] != owner})

    @rule(data=st.data(), owner=OWNERS)
    def wrong_gift(self, data: st.DataObject, owner: str) -> None:
        """What is not held is not taken back, and nothing changes."""
        tag = data.draw(TAGS)
        i = data.draw(st.integers(0, UNITS[tag].count - 1))
        if not self.held[owner, tag, i]:
            with pytest.raises(OptionError, match="gives back"):
                self.pool.free([i], tag, owner)

    @invariant()
    def conserved(self) -> None:
        pool = self.pool
        for tag, unit in UNITS.items():
            assert pool.used(tag) == len(self.units(tag))
            assert pool.room(tag) <= unit.count - pool.used(tag)
            for i in range(unit.count):
                assert pool.references(i, tag) == sum(n for (_, t, j), n in self.held.items() if (t, j) == (tag, i))
        assert pool.used_bytes == sum(map(self.bytes, UNITS)) <= BUDGET
        for owner in ("a", "b", "c", ""):
            mine = {
                t: sorted(Counter({i: n for (o, u, i), n in self.held.items() if (o, u) == (owner, t)}).elements()) for t in UNITS
            }
            assert {t: pool.count(owner, t) for t in UNITS} == {t: len(ids) for t, ids in mine.items()}
            assert {t: sorted(ids) for t, ids in pool.held(owner).items()} == {t: ids for t, ids in mine.items() if ids}

    @invariant()
    def floors_are_kept(self) -> None:
        for tag, floor in self.floors.items():
            assert (self.pool.used(tag) + self.pool.room(tag)) * UNITS[tag].bytes > floor - UNITS[tag].bytes

    def teardown(self) -> None:
        for owner in ("a", "b", "c", ""):
            self.pool.release(owner)
        assert self.pool.used_bytes == 0
        assert all(len(set(self.pool.allocate(self.pool.room(t), t) or ())) for t in UNITS)


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestPool = PoolMachine.TestCase


def test_owners_are_named() -> None:
    pool = SharedBlockPool({KV: PoolUnit(1, 3)})
    (i,) = pool.allocate(1, KV, "request") or ()
    pool.share([i], KV, "index")
    assert set(pool.owners(i, KV)) == {"request", "index"}
    assert pool.stats() == {"tags": {KV: {"used": 1, "room": 2, "count": 3}}, "bytes": 1, "budget": 3, "peak": 1}


def test_a_unified_pool_holds_what_a_split_one_cannot() -> None:
    units = {KV: PoolUnit(10, 100), ADAPTER: PoolUnit(10, 100)}
    unified, halves = SharedBlockPool(units, 1000), split(units, {KV: 0.5, ADAPTER: 0.5}, 1000)
    assert unified.allocate(80, KV) is not None and halves.allocate(80, KV) is None
    assert halves.allocate(50, KV) is not None and halves.room(ADAPTER) == 50
    assert unified.room(ADAPTER) == 20


def test_adapters_read_back_bit_for_bit_wherever_their_pages_lie() -> None:
    group = Group("qkv", ("q", "k"), 6, (5, 3))
    for seed in range(5):
        rng = random.Random(seed)
        pages = LoraPages([group], 12)
        pool = SharedBlockPool({ADAPTER: PoolUnit(pages.page_bytes, 12)}, shuffle=rng)
        written: dict[str, tuple[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        for n in range(60):
            if written and rng.random() < 0.4:
                gone = rng.choice(sorted(written))
                pool.release(gone)
                del written[gone]
            r = rng.choice([8, 16, 24])
            ids = pool.allocate(r // 8, ADAPTER, f"a{n}")
            if ids is not None:
                pairs = [(torch.randn(r, 6), torch.randn(out, r)) for out in group.outs]
                pages.write(ids, {"qkv": pairs})
                written[f"a{n}"] = (ids, pairs)
            for ids, pairs in written.values():
                for j, (A, B) in enumerate(pairs):
                    a, b = pages.read(ids, "qkv", j)
                    assert torch.equal(a, A) and torch.equal(b, B)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: PoolUnit(0, 3), OptionError, "at least 1 byte"),
        (lambda: SharedBlockPool(UNITS, 100, {KV: 90, ADAPTER: 80}), OptionError, "170 bytes, more than the budget of 100"),
        (lambda: SharedBlockPool(UNITS, 1000, {KV: 1000}), OptionError, "12 units are 192"),
        (lambda: SharedBlockPool(UNITS, 1000, {"kw": 1}), UnknownName, "did you mean 'kv'"),
        (lambda: SharedBlockPool(UNITS).allocate(1, "adaptor"), UnknownName, "did you mean 'adapter'"),
        (lambda: SharedBlockPool(UNITS).allocate(-1, KV), OptionError, "0 or more"),
        (lambda: SharedBlockPool(UNITS).share([0], KV), OptionError, "held by nobody"),
        (lambda: split(UNITS, {KV: 1.0}, 100), OptionError, "add up to 1"),
    ],
)
def test_wrong_input_is_one_sentence(make, error, says) -> None:
    with pytest.raises(error, match=says):
        make()


def test_the_pool_of_a_server_takes_back_what_it_gave_and_nothing_else() -> None:
    """It counts no references: an id is taken or free."""
    pool = BlockPool({KV: PoolUnit(8, 4), ADAPTER: PoolUnit(8, 4)}, 40)
    ids = pool.allocate(3, KV)
    assert ids == (0, 1, 2) and pool.room(ADAPTER) == 2 and pool.allocate(2, KV) is None
    for wrong in ([3], [0, 0]):
        with pytest.raises(OptionError, match="gives back kv"):
            pool.free(wrong, KV)
    assert pool.used(KV) == 3
    pool.free(ids[::-1], KV)
    assert pool.used_bytes == 0 and pool.room(KV) == 4 and pool.peak == 24
