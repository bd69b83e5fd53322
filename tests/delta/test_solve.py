"""The solvers against a dense SVD and against the optimality of what they minimise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.delta import LowRank
from rankwise.delta.solve import lowrank_approx, randomized_svd, thin_svd_of_product
from rankwise.errors import OptionError

F64 = torch.float64


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize(("out", "r", "inp"), [(9, 3, 7), (4, 6, 5), (3, 4, 20), (1, 1, 5)])
def test_svd_of_a_product_is_that_of_the_matrix(out: int, r: int, inp: int) -> None:
    B, A = rand(2, out, r), rand(2, r, inp)
    U, S, Vh = thin_svd_of_product(B, A)
    want = torch.linalg.svdvals(B @ A)
    k = min(r, out, inp)
    assert S.shape == (2, k) and torch.allclose(S, want[:, :k], atol=1e-10)
    assert torch.allclose(U * S[:, None] @ Vh, B @ A, atol=1e-10)
    eye = torch.eye(k, dtype=F64)
    assert torch.allclose(U.mT @ U, eye.expand(2, k, k), atol=1e-10) and torch.allclose(Vh @ Vh.mT, eye.expand(2, k, k), atol=1e-10)


@pytest.mark.parametrize("form", ["none", "diagonal", "full", "semi-definite"])
@pytest.mark.parametrize("split", ["sqrt", "left", "right"])
def test_weighted_approximation_is_optimal(form: str, split: str) -> None:
    E = rand(6, 8)
    X, thin = rand(8, 8), rand(8, 4)
    left, right = {
        "none": (None, None),
        "diagonal": (rand(6).abs() + 0.1, rand(8).abs() + 0.1),
        "full": (rand(6, 6) + 3 * torch.eye(6, dtype=F64), X @ X.T),
        "semi-definite": (torch.tensor([1.0, 2, 0, 3, 1, 0.5], dtype=F64), thin @ thin.T),
    }[form]
    L = torch.eye(6, dtype=F64) if left is None else left.diag() if left.dim() == 1 else left
    R = torch.eye(8, dtype=F64) if right is None else right.diag() if right.dim() == 1 else right
    B, A, residual = lowrank_approx(E, 2, left, right, split=split)
    tail = torch.linalg.svdvals(L @ E @ R)[2:].norm()
    scale = max(1.0, float(tail))
    assert B.shape == (6, 2) and A.shape == (2, 8)
    assert residual.item() == pytest.approx(tail.item(), abs=1e-9 * scale)
    assert (L @ (E - B @ A) @ R).norm().item() == pytest.approx(tail.item(), abs=1e-8 * scale)
    if form == "none":
        S = torch.linalg.svdvals(E)[:2]
        want = {"sqrt": S.sqrt(), "left": S, "right": torch.ones_like(S)}[split]
        assert torch.allclose(B.norm(dim=0), want, atol=1e-9)


def test_randomised_svd_finds_a_decaying_spectrum_and_repeats() -> None:
    M = rand(40, 30) @ torch.diag(0.5 ** torch.arange(30, dtype=F64)) @ rand(30, 50)
    runs = [randomized_svd(M, 4, oversample=8, niter=4, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    U, S, Vh = runs[0]
    assert torch.allclose(S, torch.linalg.svdvals(M)[:4], rtol=1e-8)
    tail = torch.linalg.svdvals(M)[4:].norm()
    assert (M - U * S @ Vh).norm().item() == pytest.approx(tail.item(), rel=1e-6)


def test_an_idle_expert_does_not_raise_the_rank_of_its_stack() -> None:
    B = rand(2, 12, 4)
    B[0, :, 1:] = 0
    B[1] = 0
    low, error = LowRank(rand(2, 4, 8), B).truncate(energy=0.9)
    assert low.r == 1 and error < 1e-9


def test_the_error_is_that_of_the_stored_value_in_16_bits() -> None:
    """The scale is folded in fp64: a spectrum of rounded factors would be off by 1e-3."""
    d = LowRank(torch.randn(8, 64).bfloat16(), torch.randn(64, 8).bfloat16(), 0.3)
    whole = 0.3 * d.B.double() @ d.A.double()
    assert torch.allclose(d.singular_values(), torch.linalg.svdvals(whole)[:8], rtol=1e-9)
    assert d.norm().item() == pytest.approx(whole.norm().item(), rel=1e-9)
    both = d + LowRank(torch.randn(2, 64).bfloat16(), torch.randn(64, 2).bfloat16(), 0.3)
    assert both.scale == 0.3 and torch.equal(both.B[:, :8], d.B), "equal scales are kept, so nothing is rounded"
    assert (d + LowRank(torch.randn(1, 64), torch.randn(64, 1))).dtype == torch.float32, "the wider dtype wins"


@pytest.mark.parametrize("options", [{}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_a_cut_takes_one_sensible_option(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="rank|energy"):
        LowRank.from_svd(*torch.linalg.svd(rand(4, 4)), **options)  # type: ignore[arg-type]
