"""Low-rank solvers: QR + small SVD where factors exist, weighted approximation, randomised SVD.  All in fp64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rankwise.errors import OptionError


def thin_svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh) of B·A for B: (…, out, r), A: (…, r, in), fp64; rank ≤ min(r, out, in); never forms out×in."""
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.mT


def randomized_svd(
    M: Tensor, rank: int, *, oversample: int = 8, niter: int = 4, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` of (U, S, Vh) of M in M's dtype, by subspace iteration (Halko et al.), as ``torch.svd_lowrank``.

    Works in fp32 for fp32 input and fp64 for fp64: the subspace, not the last digit, is what is approximated.

    Args:
        M: (out, in).
        rank: how many singular values.
        oversample: columns drawn beside them; the exact SVD is taken where they reach the full rank.
        niter: subspace iterations.
        generator: of the random start, on the CPU; default torch's own.
    """
    work = M if M.dtype == torch.float64 else M.float()
    q = min(rank + oversample, *M.shape)
    if q >= min(M.shape):  # the whole spectrum is asked for
        U, S, Vh = torch.linalg.svd(work, full_matrices=False)
        return U[:, :rank].to(M.dtype), S[:rank].to(M.dtype), Vh[:rank].to(M.dtype)
    Y = work @ torch.randn(M.shape[1], q, generator=generator, dtype=work.dtype).to(work.device)
    for _ in range(niter):
        Y = work @ torch.linalg.qr(work.mT @ torch.linalg.qr(Y)[0])[0]
    Q = torch.linalg.qr(Y)[0]
    U, S, Vh = torch.linalg.svd(Q.mT @ work, full_matrices=False)
    return (Q @ U)[:, :rank].to(M.dtype), S[:rank].to(M.dtype), Vh[:rank].to(M.dtype)


def lowrank_approx(
    E: Tensor,
    r: int,
    left: Tensor | None = None,
    right: Tensor | None = None,
    split: Literal["sqrt", "left", "right"] = "sqrt",
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, A, error) that minimise ‖L·(E − B·A)·R‖_F, all fp64.

    Args:
        E: (out, in).
        r: rank, B: (out, r), A: (r, in).
        left: L, (out,) a diagonal or (out, out); a singular one is inverted on its range only.  None: the identity.
        right: R, (in,) or (in, in).
        split: where the singular values go: √S on each side, all on B ("left") or all on A ("right").
    """
    if not 1 <= r <= min(E.shape):
        raise OptionError(f"rank = {r} for a matrix of {tuple(E.shape)}; it lies in 1…{min(E.shape)}.")
    W = E.double()
    W = _times(left, W, side="left")
    W = _times(right, W, side="right")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    power = {"sqrt": 0.5, "left": 1.0, "right": 0.0}[split]
    B = _times(_inverse(left), U[:, :r] * S[:r] ** power, side="left")
    A = _times(_inverse(right), S[:r, None] ** (1 - power) * Vh[:r], side="right")
    return B, A, S[r:].norm()


def _times(D: Tensor | None, M: Tensor, *, side: str) -> Tensor:
    if D is None:
        return M
    D = D.double()
    if D.dim() == 1:
        return D[:, None] * M if side == "left" else M * D
    return D @ M if side == "left" else M @ D


def _inverse(D: Tensor | None) -> Tensor | None:
    if D is None:
        return None
    D = D.double()
    if D.dim() == 1:
        return torch.where(D.abs() > 1e-12 * D.abs().max(), 1 / D, torch.zeros_like(D))
    return torch.linalg.pinv(D)
