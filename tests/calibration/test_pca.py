"""Streaming PCA against the batch one; summaries merge."""

from __future__ import annotations

import pytest
import torch

from rankwise.calibration.pca import StreamingPCA


def test_streaming_pca_equals_the_batch_one_when_nothing_is_cut() -> None:
    X = torch.randn(300, 8) @ torch.diag(torch.arange(1.0, 9)) + 5
    pca = StreamingPCA(8)
    for part in X.split(37):
        pca.update(part)
    centred = X[: pca.n] - X[: pca.n].mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(pca.sigma, S, rtol=1e-3)
    assert torch.allclose((pca.components * Vh).sum(1).abs(), torch.ones(8), atol=1e-3)
    assert pca.ratios().sum() == pytest.approx(1.0, abs=1e-4)


def test_pca_summaries_merge() -> None:
    X = torch.randn(200, 6) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5])) + 2
    whole, left, right = StreamingPCA(6), StreamingPCA(6), StreamingPCA(6)
    whole.update(X)
    left.update(X[:80])
    right.update(X[80:])
    left.merge(right)
    assert torch.allclose(left.sigma, whole.sigma, rtol=1e-3) and torch.allclose(left.mean, whole.mean, atol=1e-4)
