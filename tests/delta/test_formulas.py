"""Each kind against its formula written out entry by entry, with nothing shared with the code under test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.delta import BlockAffine, Dense, Entries, Gated, Hadamard, Kron, LowRank, Replace, Scale, Sum, Tile
from rankwise.errors import MergeError


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_block_affine_is_w_times_its_block_plus_the_block() -> None:
    W, blocks = rand(6, 8), rand(3, 2, 2)
    want = torch.zeros(6, 8, dtype=torch.float64)
    for a in range(3):
        for b in range(4):
            old = W[2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
            want[2 * a : 2 * a + 2, 2 * b : 2 * b + 2] = old @ blocks[a] + blocks[a]
    assert torch.allclose(BlockAffine(blocks, 8).dense(W), want, atol=1e-12)
    flat = BlockAffine(blocks, 8).dense(torch.zeros(6, 8, dtype=torch.float64))
    assert torch.equal(flat[:, :2], flat[:, 6:]), "with W = 0 every column block is the same"


def test_kron_is_torchs() -> None:
    P, Q = rand(3, 2), rand(2, 4)
    assert torch.allclose(Kron(P, Q, 0.3).dense(), 0.3 * torch.kron(P, Q))
    low = Kron(P, Q, 0.3).to_lowrank()[0]
    assert low.r == 4 and torch.allclose(low.dense(), 0.3 * torch.kron(P, Q))


def test_tile_repeats_its_columns() -> None:
    D = rand(3, 5)
    want = torch.stack([D[j % 3] for j in range(8)], dim=1)
    assert torch.equal(Tile(D, 8).dense(), want)
    x = torch.tensor([1.0, -2, 3, -1, 2, -3, 0, 0], dtype=torch.float64)
    assert torch.allclose(Tile(D, 8).apply(x), torch.zeros(5, dtype=torch.float64)), "chunks that sum to zero are not seen"


def test_gains_and_replacements() -> None:
    W, out, inp, new = rand(6, 8), rand(6), rand(8), rand(6, 8)
    assert torch.allclose(W + Scale(out).dense(W), torch.diag(out) @ W)
    assert torch.allclose(W + Scale(inp, axis="in").dense(W), W @ torch.diag(inp))
    assert torch.allclose(W + Replace(new).dense(W), new)


def test_hadamard_is_elementwise() -> None:
    p, q = (LowRank(rand(2, 8), rand(6, 2), s) for s in (0.5, 3.0))
    want = (0.5 * p.B @ p.A) * (3.0 * q.B @ q.A)
    assert torch.allclose(Hadamard(p, q).dense(), want) and torch.allclose(Hadamard(p, q).to_lowrank()[0].dense(), want)


def test_entries_of_a_stack_meet_a_pair() -> None:
    index = torch.tensor([3, 60, 100, 143])
    some, pair = Entries(index, rand(4), (3, 6, 8)), LowRank(rand(3, 2, 8), rand(3, 6, 2), 0.4)
    want = (some.dense() * pair.dense()).sum().item()
    assert some.inner(pair).item() == pytest.approx(want, abs=1e-12) == pair.inner(some).item()


def test_a_dense_change_beside_a_gate_stays_a_sum() -> None:
    gate = Gated(LowRank(rand(2, 8), rand(6, 2)))
    total = Dense(rand(6, 8)) + Sum((LowRank(rand(1, 8), rand(6, 1)), gate))
    assert total.kind == "sum" and not total.constant
    with pytest.raises(MergeError, match="collapse"):
        total.dense()
