"""Outputs of one product recognised as its columns; anything else is not."""

from __future__ import annotations

import torch

from rankwise.host import keep_freed_memory
from rankwise.serve.ops.step import joined


def test_slices_of_one_product_are_joined() -> None:
    whole = torch.randn(5, 12)
    together = joined(whole[:, 1:].split([4, 2, 5], 1))
    assert together is not None
    assert torch.equal(together, whole[:, 1:])
    assert together.data_ptr() == whole[:, 1:].data_ptr()


def test_others_are_not() -> None:
    whole = torch.randn(5, 12)
    a, b, c = whole.split(4, 1)
    assert joined([a, c]) is None  # a gap
    assert joined([b, a]) is None  # another order
    assert joined([torch.randn(5, 4), torch.randn(5, 4)]) is None  # two tensors
    assert joined([a, b[:, :2], c.double()]) is None
    assert joined(list(torch.randn(12, 5).t().split(4, 1))) is None  # columns that are rows in memory
    alone = torch.randn(5, 4)
    assert joined([alone]) is alone


def test_the_c_library_is_told_to_keep_memory(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """What the environment says stands; else glibc takes both settings."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    assert keep_freed_memory() == hasattr(__import__("ctypes").CDLL(None), "mallopt")
