"""Orthogonality: zero only for orthonormal factors, else the formula."""

from __future__ import annotations

import pytest
import torch

from tests.forms.helpers import one


def test_orthogonality_is_zero_only_for_orthonormal_factors() -> None:
    from rankwise.losses.orthogonality import Orthogonality

    _, adapter, d = one({"form": "svd"})
    with torch.no_grad():
        d.A.copy_(torch.linalg.qr(torch.randn(12, 3))[0].T)
        d.B.copy_(torch.linalg.qr(torch.randn(10, 3))[0])
    term = Orthogonality(gamma=1.0)
    assert term.term(None, None, {}, adapter, 1)["orthogonality"] < 1e-5
    with torch.no_grad():
        d.A.mul_(2)
    want = 0.5 * ((d.A @ d.A.T - torch.eye(3)).norm() + (d.B.T @ d.B - torch.eye(3)).norm())
    assert term.term(None, None, {}, adapter, 1)["orthogonality"].item() == pytest.approx(want.item(), abs=1e-5)
