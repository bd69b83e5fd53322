"""int-k: exact ends, exact zero, idempotence, ledger."""

from __future__ import annotations

import pytest
import torch

from rankwise.catalogue import make
from rankwise.codecs.intk import IntK
from rankwise.errors import OptionError
from rankwise.seeds import generator


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, "test", "intk"))


def naive(W: torch.Tensor, k: int, group: int, symmetric: bool) -> torch.Tensor:
    """One group at a time, as the formula reads."""
    out = torch.empty_like(W)
    for i, row in enumerate(W):
        for start in range(0, len(row), group):
            w = row[start : start + group]
            if symmetric:
                m, c = 2 ** (k - 1) - 1, w.abs().max()
                out[i, start : start + group] = torch.round(w / c * m) / m * c if c > 0 else 0.0
            else:
                low, high = min(0.0, w.min().item()), max(0.0, w.max().item())
                s = (high - low) / (2**k - 1)
                z = round(-low / s)
                out[i, start : start + group] = s * (torch.clamp(torch.round(w / s) + z, 0, 2**k - 1) - z)
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "shape", "group"), [(4, (8, 128), 64), (2, (5, 70), 32), (3, (6, 13), 64), (8, (4, 33), 0)])
def test_formula_groupwise_with_tails(k: int, shape: tuple[int, int], group: int, symmetric: bool) -> None:
    codec, W = IntK(k=k, group=group, symmetric=symmetric), gaussian(*shape)
    for sign in (0, 1, -1):  # as it is, all positive, all negative
        V = W if sign == 0 else sign * (W.abs() + 1)
        assert torch.allclose(codec.decode(codec.encode(V)), naive(V, k, group or shape[1], symmetric), atol=1e-5)


@pytest.mark.parametrize("k", range(2, 9))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_symmetric_is_idempotent_with_exact_ends(k: int, dtype: str) -> None:
    codec, W = IntK(k=k, group=16, scale_dtype=dtype), gaussian(7, 40)
    state = codec.encode(W)
    once = codec.decode(state)
    again = codec.encode(once)
    assert all(torch.equal(again[key], state[key]) for key in ("codes", "scale"))
    for block, decoded in zip(W[:, :16], once[:, :16]):
        at = block.abs().argmax()
        assert decoded[at] == block[at].to(getattr(torch, dtype)).float()


@pytest.mark.parametrize("k", range(2, 9))
def test_affine_codes_are_idempotent_and_zero_exact(k: int) -> None:
    codec, W = IntK(k=k, group=16, symmetric=False), gaussian(7, 40) + 0.3
    W[:, ::5] = 0.0
    state = codec.encode(W)
    once = codec.decode(state)
    assert (once[:, ::5] == 0).all()
    again = codec.encode(once)
    assert torch.equal(again["codes"], state["codes"]) and torch.equal(again["zero"], state["zero"])
    assert torch.allclose(codec.decode(again), once, rtol=1e-5)
    assert (once - W).abs().max() <= state["scale"].max() * 1.0001


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_stay_zero(symmetric: bool) -> None:
    W = gaussian(4, 64)
    W[2] = 0.0
    codec = IntK(symmetric=symmetric, scale_dtype="float16")
    once = codec.decode(codec.encode(W))
    assert (once[2] == 0).all() and torch.isfinite(once).all()


def test_ledger_is_what_the_state_holds() -> None:
    assert IntK(k=4).bits((4096, 4096)) == 4.5
    assert IntK(k=4, scale_dtype="bfloat16", symmetric=False).bits((4096, 4096)) == 4 + 16 / 64 + 4 / 64
    assert IntK(k=8, group=0).bits((64, 256)) == 8 + 32 / 256
    for codec in (IntK(k=3), IntK(k=5, symmetric=False, scale_dtype="float16"), IntK(group=0)):
        for shape in ((48, 64), (7, 130), (2, 3, 11)):
            W = gaussian(*shape)
            held = sum(t.numel() * t.element_size() for t in codec.encode(W).values() if isinstance(t, torch.Tensor))
            assert codec.bits(shape) == 8 * held / W.numel()
            assert codec.decode(codec.encode(W)).shape == W.shape


def test_scales_that_overflow_and_wrong_options_are_refused() -> None:
    with pytest.raises(OptionError, match="float16"):
        IntK(scale_dtype="float16").encode(torch.full((1, 64), 1e6))
    for options in ({"k": 1}, {"k": 9}, {"group": -1}, {"symmetric": 1}, {"scale_dtype": "half"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            make("codec", "intk", **options)
    with pytest.raises(OptionError, match="axis"):
        IntK().encode(torch.tensor(1.0))
