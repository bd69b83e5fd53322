"""Streaming, centred PCA of a site's inputs: K components kept, whatever the number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from rankwise.calibration.base import Accumulator
from rankwise.delta.solve import randomized_svd
from rankwise.errors import DataError

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class StreamingPCA(Accumulator):
    """Top-K principal components of rows x: n×in, updated batch by batch.

    A batch is stacked under σ·C (K×in) with the row √(n_old·n_new/n)·(μ_old − μ_new), which carries the shift of the mean;
    a thin SVD of the stack gives the new components, signs fixed by each row's largest entry.  Exact when K = in.
    ``tau``: a component has converged when its cosine with its predecessor is at least that.
    """

    hook: ClassVar[Literal["input", "weight_grad"]] = "input"
    share: ClassVar[bool] = True

    def __init__(self, k: int, tau: float = 0.99, *, exact_below: int = 0):
        self.k, self.tau = k, tau
        self.exact_below = exact_below
        self.n = 0
        self.mean: Tensor | None = None
        self.components: Tensor | None = None  # K×in
        self.sigma: Tensor | None = None  # K
        self.variance = torch.zeros((), dtype=torch.float64)  # Σ_j of the centred second moment, summed over rows
        self.converged = torch.zeros(k, dtype=torch.bool)
        self.wanted = k  # how many components are in use; the pass stops when these have converged
        self.skipped = 0

    def update(self, value: Tensor) -> None:
        if value.shape[0] < self.k:
            self.skipped += 1
            return
        x = value.float()
        n, mean = x.shape[0], x.mean(0)
        centred = x - mean
        rows = [centred]
        total = self.n + n
        own = centred.square().sum(dtype=torch.float64).cpu()
        if self.components is not None:
            assert self.sigma is not None and self.mean is not None
            shift = (self.n * n / total) ** 0.5 * (self.mean - mean)
            rows = [self.sigma[:, None] * self.components, centred, shift[None]]
            own += shift.square().sum(dtype=torch.float64).cpu()
        _, S, Vh = _svd(torch.cat(rows), self.k)
        C, sigma = _fix_signs(Vh[: self.k]), S[: self.k]
        if self.components is not None:
            self.converged = ((C * self.components).sum(-1) >= self.tau).cpu()
        self.mean = mean if self.mean is None else self.mean + (mean - self.mean) * (n / total)
        self.components, self.sigma, self.n = C, sigma, total
        self.variance = self.variance + own

    def merge(self, other: Any) -> None:
        """Add the statistics of other rows; exact up to what both had already truncated."""
        if other.components is None:
            return
        if self.components is None:
            self.n, self.mean, self.components, self.sigma, self.variance = (
                other.n,
                other.mean,
                other.components,
                other.sigma,
                other.variance,
            )
            return
        assert self.mean is not None and self.sigma is not None
        total = self.n + other.n
        shift = (self.n * other.n / total) ** 0.5 * (self.mean - other.mean)
        _, S, Vh = _svd(
            torch.cat([self.sigma[:, None] * self.components, other.sigma[:, None] * other.components, shift[None]]), self.k
        )
        self.mean = self.mean + (other.mean - self.mean) * (other.n / total)
        self.variance = self.variance + other.variance + shift.square().sum(dtype=torch.float64).cpu()
        self.components, self.sigma, self.n = _fix_signs(Vh[: self.k]), S[: self.k], total

    def done(self) -> bool:
        return bool(self.wanted == 0 or self.converged[: self.wanted].all())

    def ratios(self) -> Tensor:
        """Share of the rows' variance that each component explains, (K,) fp64."""
        assert self.sigma is not None
        return (self.sigma.double().cpu().square() / self.variance.clamp_min(1e-30)).clamp_max(1.0)

    def finish(self) -> StreamingPCA:
        if self.components is None:
            raise DataError(
                f"No calibration batch had {self.k} unmasked tokens for the PCA ({self.skipped} were smaller); give longer batches, or turn the label mask off."
            )
        return self

    def memory(self, site: Site) -> int:
        return 4 * (self.k + 2) * site.spec.inp


def _svd(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading k of a thin SVD: randomised with 2k columns and 4 iterations (fixed seed) where that is less work."""
    rows, cols = M.shape
    if 3 * k < min(rows, cols):
        return randomized_svd(M, k, oversample=k, niter=4, generator=torch.Generator().manual_seed(0))
    if rows <= cols:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U, S, Vh
    values, vectors = torch.linalg.eigh((M.T @ M).double())  # a fraction of the SVD's cost for tall stacks
    keep = torch.arange(cols - 1, max(cols - 1 - k, -1), -1)
    return M[:0], values[keep].clamp_min(0).sqrt().to(M.dtype), vectors[:, keep].T.to(M.dtype)


def _fix_signs(C: Tensor) -> Tensor:
    largest = C.abs().argmax(dim=-1, keepdim=True)
    return C * C.gather(-1, largest).sign()
