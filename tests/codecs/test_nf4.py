"""nf-k: the identities of QLoRA (arXiv 2305.14314, §3), and bitsandbytes as the other opinion."""

from __future__ import annotations

import pytest
import torch

from rankwise.catalogue import find, make
from rankwise.codecs.base import pack_codes, unpack_codes
from rankwise.codecs.intk import IntK
from rankwise.codecs.nf4 import NormalFloat, levels
from rankwise.errors import ArtefactError, OptionError
from rankwise.seeds import generator

PUBLISHED = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0, 0.0795803, 0.1609302, 0.2461123,
        0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]  # fmt: skip


def gaussian(*shape: int, name: str = "") -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, "test", name))


def nbytes(state: dict) -> int:
    return sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor))


def test_levels_are_the_published_ones() -> None:
    assert torch.allclose(levels(4), torch.tensor(PUBLISHED), atol=5e-7, rtol=0)
    for k in range(2, 9):
        table = levels(k)
        assert table.numel() == 2**k and (table.diff() > 0).all()
        assert table[0] == -1 and table[-1] == 1 and table[2 ** (k - 1) - 1] == 0


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 64), (7, 13), (3, 5, 11), (1,)])
def test_idempotent_and_absmax_exact_without_double_quantisation(k: int, shape: tuple[int, ...]) -> None:
    codec, W = NormalFloat(k=k, double_quant=False), gaussian(*shape)
    state = codec.encode(W)
    once = codec.decode(state)
    assert once.shape == W.shape and once.dtype == torch.float32
    again = codec.encode(once)
    assert torch.equal(again["codes"], state["codes"]) and torch.equal(again["scale"], state["scale"])
    for block, decoded in zip(W.reshape(-1).split(64), once.reshape(-1).split(64)):
        at = block.abs().argmax()
        assert decoded[at] == block[at]
        assert (block - decoded).abs().max() <= block[at].abs() * levels(k).diff().max() / 2 * 1.00001


def test_error_bound_is_the_largest_half_gap() -> None:
    assert abs(levels(4).diff().max().item() / 2 - 0.152) < 5e-4


def test_codes_are_the_nearest_levels() -> None:
    W = gaussian(40, 64)
    decoded = NormalFloat(double_quant=False).decode(NormalFloat(double_quant=False).encode(W))
    c = W.abs().amax(1, keepdim=True)
    best = (W[..., None] - c[..., None] * levels(4)).abs().amin(-1)
    assert torch.allclose((W - decoded).abs(), best, atol=1e-6)


@pytest.mark.parametrize("blocksize", [64, 128])
def test_bitsandbytes_decodes_to_the_same(blocksize: int) -> None:
    F = pytest.importorskip("bitsandbytes.functional")
    W = gaussian(128, 100)
    codec = NormalFloat(block=blocksize, double_quant=False)
    data, state = F.quantize_4bit(W, blocksize=blocksize, quant_type="nf4", compress_statistics=False)
    assert torch.allclose(codec.decode(codec.encode(W)), F.dequantize_4bit(data, state), atol=2e-6, rtol=0)
    assert codec.encode(W)["codes"].numel() == data.numel()
    data, state = F.quantize_4bit(W, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    ours = (NormalFloat(block=blocksize).decode(NormalFloat(block=blocksize).encode(W)) - W).square().mean()
    theirs = (F.dequantize_4bit(data, state) - W).square().mean()
    assert abs(ours / theirs - 1) < 0.02


def test_ledger_is_the_formula_and_what_the_state_holds() -> None:
    assert NormalFloat().bits((4096, 4096)) == pytest.approx(4.127, abs=1e-3)
    assert NormalFloat(double_quant=False).bits((4096, 4096)) == 4.5
    lq = NormalFloat(k=3, scale_bits=4, scale_block=16, block=32, scale_dtype="bfloat16", scale_offset="min")
    assert lq.bits((4096, 4096)) == pytest.approx(3 + 4 / 32 + 16 / (32 * 16), abs=1e-4)
    for codec in (NormalFloat(), NormalFloat(k=3, double_quant=False), lq):
        for shape in ((48, 64), (7, 13), (130, 129)):
            W = gaussian(*shape)
            assert codec.bits(shape) == 8 * nbytes(codec.encode(W)) / W.numel()


def test_gaussian_error_below_int4_and_falling_with_bits() -> None:
    W = gaussian(256, 256)
    mse = [(c.decode(c.encode(W)) - W).square().mean() for c in (NormalFloat(k=k) for k in (2, 3, 4))]
    int4 = IntK(k=4)
    assert mse[2] < (int4.decode(int4.encode(W)) - W).square().mean()
    assert mse[0] > 4 * mse[1] > 16 * mse[2]
    assert NormalFloat(double_quant=False).bits(W.shape) == int4.bits(W.shape) == 4.5


@pytest.mark.parametrize("offset", ["mean", "min"])
def test_double_quantisation_costs_little_and_keeps_zero_rows(offset: str) -> None:
    W = gaussian(256, 256)
    W[3] = 0.0
    plain, double = NormalFloat(double_quant=False), NormalFloat(scale_offset=offset)
    a, b = plain.decode(plain.encode(W)), double.decode(double.encode(W))
    assert (b[3] == 0).all() and (a[3] == 0).all()
    assert (b - W).square().mean() < 1.01 * (a - W).square().mean()
    assert (double.decode(double.encode(torch.zeros(5, 7))) == 0).all()


@pytest.mark.parametrize("offset", ["mean", "min"])
def test_scales_are_quantised_to_half_a_step(offset: str) -> None:
    """c − o in blocks of 16: the largest is exact, the others within half a step of the block's own."""
    W = gaussian(96, 64)
    codec, c = NormalFloat(scale_offset=offset, scale_block=16), W.abs().amax(1)
    decoded, o = codec._decode_scales(codec.encode(W), 96), c.mean() if offset == "mean" else c.min()
    for truth, got in zip((c - o).split(16), (decoded - o).split(16)):
        top = truth.abs().max()
        step = top / (127 if offset == "mean" else 255)
        assert ((truth - got).abs() <= step * 0.501).all()
        assert got[truth.abs().argmax()].abs() == pytest.approx(top.item(), rel=1e-5)


def test_min_offset_keeps_scales_positive() -> None:
    W = gaussian(64, 64) * torch.logspace(-6, 0, 64)[:, None]
    codec = NormalFloat(scale_offset="min", scale_bits=2)
    assert (codec._decode_scales(codec.encode(W), 64) >= 0).all()


@pytest.mark.parametrize("k", range(1, 9))
def test_packing_is_lossless_and_checked(k: int) -> None:
    codes = torch.randint(0, 2**k, (1001,), generator=generator(0, "test", "codes"))
    packed = pack_codes(codes, k)
    assert packed.numel() == -(-1001 * k // 8)
    assert torch.equal(unpack_codes(packed, k, 1001).long(), codes)
    with pytest.raises(ArtefactError):
        unpack_codes(packed[:-1], k, 1001)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},
        {"k": 9},
        {"k": 4.0},
        {"block": 0},
        {"scale_bits": 1},
        {"scale_block": 0},
        {"scale_dtype": "int8"},
        {"scale_offset": "max"},
    ],
)
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        make("codec", "nf4", **options)


@pytest.mark.parametrize("W", [torch.ones(2, dtype=torch.int64), torch.ones(0), torch.tensor([1.0, float("nan")])])
def test_wrong_weights_are_refused(W: torch.Tensor) -> None:
    with pytest.raises(OptionError):
        NormalFloat().encode(W)


def test_small_scale_dtype_overflow_is_refused() -> None:
    with pytest.raises(OptionError, match="float16"):
        NormalFloat(scale_dtype="float16").encode(torch.tensor([[1e6] * 64, [1.0] * 64]))


def test_catalogue_entry() -> None:
    assert find("codec", "nf4").reference == "180" and not NormalFloat.differentiable
    assert make("codec", "nf4", k=3).name == "nf4"
