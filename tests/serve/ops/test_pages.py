"""Pages: what is written is read, tails are zero, and what does not fit is refused before anything is touched."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import OptionError, UnknownName
from rankwise.serve.ops.base import WIDTH, Group, LoraPages
from rankwise.serve.ops.registry import make_op
from tests.serve.ops.steps import GROUPS, adapter


@pytest.mark.parametrize("rank", [1, 8, 11])
def test_read_gives_back_what_was_written(rank: int) -> None:
    pages, one = LoraPages(GROUPS, 5), adapter(rank)
    held = [3, 0][: -(-rank // WIDTH)]
    pages.write(held, one)
    for g in GROUPS:
        for j, (A, B) in enumerate(one[g.name]):  # type: ignore[misc]
            a, b = pages.read(held, g.name, j)
            assert torch.equal(a[:rank], A.float())
            assert torch.equal(b[:, :rank], B.float())
            assert not a[rank:].any()
            assert not b[:, rank:].any()


def test_bytes_of_a_page_are_those_of_the_tensors() -> None:
    pages = LoraPages(GROUPS, 6, torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in (*pages.shrink.values(), *pages.packed.values()))
    assert pages.page_bytes * 6 == held


def test_chunks() -> None:
    """All modules of a group share one chunk, wide where it can be; odd outputs are padded."""
    assert Group("g", ("a", "b", "c"), 1, (512, 256, 256)).chunk == 256
    assert Group("g", ("a", "b"), 1, (1408, 1408)).chunk == 176
    assert Group("g", ("a",), 1, (1000,)).chunk == 250
    odd = Group("g", ("a", "b"), 1, (101, 64))
    assert (odd.chunk, odd.chunks) == (64, (2, 1))


def test_wrong_writes_are_refused_and_change_nothing() -> None:
    pages, good = LoraPages(GROUPS, 3), adapter(8)
    pages.write([1], good)
    before = {k: t.clone() for k, t in pages.shrink.items()}
    A, B = good["o"][0]  # type: ignore[misc]
    wrong: list[tuple[list[int], dict, type[Exception], str]] = [
        ([1], {"qvk": good["qkv"]}, UnknownName, "'qkv'"),
        ([1], dict(adapter(9)), OptionError, "rank of 9 does not fit 1 pages"),
        ([1], {"o": [(A, B.t())]}, OptionError, "o takes A r×33 and B 40×r"),
        ([1], {"qkv": good["qkv"][:2]}, OptionError, "3 modules, but 2 pairs"),
        ([3], dict(good), OptionError, "Page 3"),
    ]
    for held, pairs, kind, says in wrong:
        with pytest.raises(kind, match=says):
            pages.write(held, pairs)
    assert all(torch.equal(pages.shrink[k][g.inp : 2 * g.inp], before[k][g.inp : 2 * g.inp]) for k, g in pages.groups.items())


def test_unknown_operator() -> None:
    with pytest.raises(UnknownName, match="'bags'"):
        make_op("bag", LoraPages(GROUPS, 1))


def test_pages_that_were_left_act_nowhere_until_they_are_written_again() -> None:
    pages = LoraPages(GROUPS, 2)
    pages.write([0, 1], adapter(16))
    before = pages.version
    assert all(pages.used(g.name, (0, 1)) == (0, 1) for g in GROUPS)
    pages.leave([1])
    assert all(pages.used(g.name, (0, 1)) == (0,) for g in GROUPS) and pages.version > before
    pages.write([1], adapter(8))
    assert all(pages.used(g.name, (0, 1)) == (0, 1) for g in GROUPS)
