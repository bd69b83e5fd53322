"""ComPEFT (arXiv 2311.13171): its identities, a table of sizes, and two thousand damaged streams."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rankwise.catalogue import find, make
from rankwise.codecs import stream
from rankwise.codecs.bits import BitWriter
from rankwise.codecs.compeft import ComPEFT
from rankwise.codecs.ternary import Planes, Ternary
from rankwise.errors import ArtefactError, OptionError
from rankwise.seeds import generator

CODECS = [ComPEFT, Ternary]


def adapter(scale: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two LoRA pairs of unlike scale, an empty and a scalar tensor, out of order."""
    g = generator(0, "test", "adapter")
    shapes = {"q.B": (32 * scale, 8), "q.A": (8, 24 * scale), "gate": (), "none": (0, 3), "v.A": (8, 24 * scale)}
    return {n: (torch.randn(s, generator=g) * (0.01 if n.endswith("A") else 1.0)).to(dtype) for n, s in shapes.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[n].double().reshape(-1) for n in sorted(tensors)])


def coded(codec: ComPEFT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return codec.decode_tensors(codec.encode_tensors(tensors))


def signed(data: bytes) -> bytes:
    """The stream with its checksum made true again, as a hostile writer would."""
    return data[:5] + struct.pack("<I", zlib.crc32(data[9:])) + data[9:]


@pytest.mark.parametrize("cls", CODECS)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest_entries_signs_and_one_magnitude(cls: type[ComPEFT], density: float, dtype: torch.dtype) -> None:
    tensors = adapter(dtype=dtype)
    out = coded(cls(density=density, alpha=2.0), tensors)
    assert list(out) == sorted(tensors)
    assert all(out[n].shape == t.shape and out[n].dtype == t.dtype for n, t in tensors.items())
    tau, got = flat(tensors), flat(out)
    kept, keep = got.nonzero().reshape(-1), int(density * tau.numel())
    assert kept.numel() == keep
    assert torch.equal(got[kept].sign(), tau[kept].sign())
    threshold = tau.abs().sort(descending=True).values[keep - 1]
    assert (tau[kept].abs() >= threshold).all()
    gamma = got[kept].abs()
    assert gamma.unique().numel() == 1
    assert gamma[0].item() == pytest.approx(2 * tau.std(correction=0).item(), rel=2**-8)


@pytest.mark.parametrize("cls", CODECS)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_idempotent(cls: type[ComPEFT], per_tensor: bool, dtype: torch.dtype) -> None:
    tensors = adapter(dtype=dtype)
    if per_tensor:
        tensors.pop("gate")
    tensors["zero.B"] = torch.zeros(8, 4, dtype=torch.float32)
    codec = cls(density=0.3, per_tensor=per_tensor)
    data = codec.encode_tensors(tensors)
    assert codec.encode_tensors(codec.decode_tensors(data)) == data
    assert codec.encode_tensors(dict(reversed(tensors.items()))) == data


@pytest.mark.parametrize(
    ("density", "bits", "factor"),
    [(0.05, 0.339, 47), (0.1, 0.576, 27.8), (0.2, 0.939, 17.0), (0.3, 1.188, 13.5), (0.5, 1.5, 10.7)],
)
def test_measured_bits_are_the_formulas(density: float, bits: float, factor: float) -> None:
    n = 400_000
    data = ComPEFT(density=density).encode_tensors({"x": torch.randn(n, generator=generator(0, "test", "bits"))})
    assert 8 * len(data) / n == pytest.approx(bits, rel=0.01)
    assert ComPEFT(density=density).bits() == pytest.approx(bits, abs=6e-4)
    assert 16 / ComPEFT(density=density).bits() == pytest.approx(factor, rel=0.01)
    entropy = -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)
    assert entropy <= ComPEFT(density=density).bits() < 1.03 * entropy
    assert ComPEFT(density=density).bits(1600) == ComPEFT(density=density).bits() + 0.01


def test_density_one_with_matched_alpha_is_sign_compression() -> None:
    tensors = {"x": torch.randn(1000, generator=generator(0, "test", "sign"))}
    tau = tensors["x"].double()
    alpha = (tau.abs().mean() / tau.std(correction=0)).item()
    out = ComPEFT(density=1.0, alpha=alpha).decode_tensors(ComPEFT(density=1.0, alpha=alpha).encode_tensors(tensors))["x"]
    assert torch.allclose(out.double(), tau.abs().mean() * tau.sign(), rtol=2**-8)


def test_per_tensor_has_a_magnitude_and_a_count_each() -> None:
    tensors = {n: t for n, t in adapter().items() if t.numel() > 1}
    out = coded(ComPEFT(per_tensor=True), tensors)
    for name, tensor in tensors.items():
        kept = out[name][out[name] != 0].abs()
        assert kept.numel() == int(0.2 * tensor.numel()) and kept.unique().numel() == 1
        assert kept[0].item() == pytest.approx(tensor.std(correction=0).item(), rel=2**-8)
    assert (coded(ComPEFT(), tensors)["q.A"] == 0).all()  # a shared threshold drops A


def test_ties_go_to_the_first_and_zeros_are_never_kept() -> None:
    out = ComPEFT(density=0.5).decode_tensors(ComPEFT(density=0.5).encode_tensors({"x": torch.tensor([1.0, -3, 3, 3, 3, 0, 0, 1])}))
    assert out["x"].sign().tolist() == [0, -1, 1, 1, 1, 0, 0, 0]
    out = ComPEFT(density=0.5).decode_tensors(ComPEFT(density=0.5).encode_tensors({"x": torch.tensor([1.0, -3, 3, 3, 0, 3, 3, 1])}))
    assert out["x"].sign().tolist() == [0, -1, 1, 1, 0, 1, 0, 0]
    sparse = torch.zeros(100)
    sparse[7], sparse[90] = 2.0, -1.0
    out = ComPEFT(density=0.5).decode_tensors(ComPEFT(density=0.5).encode_tensors({"x": sparse}))
    assert out["x"].nonzero().reshape(-1).tolist() == [7, 90]
    zeros = ComPEFT().decode_tensors(ComPEFT().encode_tensors({"x": torch.zeros(3, 4)}))
    assert torch.equal(zeros["x"], torch.zeros(3, 4))


def test_top_entries_beat_a_random_mask() -> None:
    """The control: the same count of signs at random places says far less of the update."""
    tau = flat(adapter(8))
    got = flat(coded(ComPEFT(), adapter(8)))
    at = torch.randperm(tau.numel(), generator=generator(0, "test", "mask"))[: got.count_nonzero()]
    control = torch.zeros_like(tau)
    control[at] = tau[at].sign()
    assert torch.cosine_similarity(got, tau, 0) > 2 * torch.cosine_similarity(control, tau, 0)


def test_planes_count_products() -> None:
    g = generator(0, "test", "planes")
    a, b = ({"x": torch.randn(1003, generator=g)} for _ in range(2))
    codec = Ternary(density=0.4)
    pa, pb = (Planes.of(codec.signs(t)[0]) for t in (a, b))
    da, db = (torch.from_numpy(p.signs().dense()).double() for p in (pa, pb))
    assert pa.dot(pb) == pytest.approx((da @ db).item(), rel=1e-12, abs=1e-12)
    assert pa.dot(pa) == pytest.approx((da @ da).item(), rel=1e-12)
    assert torch.equal(coded(codec, a)["x"].double(), da)
    assert torch.equal(coded(ComPEFT(density=0.4), a)["x"].double(), da)
    body = stream.unframe("ternary", codec.encode_tensors(a))[1]
    assert len(body) == 2 + 2 * 126 and codec.bits(1003) == 2 + 16 / 1003
    with pytest.raises(OptionError, match="lengths"):
        pa.dot(Planes.of(codec.signs({"x": torch.randn(10, generator=g)})[0]))


@pytest.mark.parametrize("cls", CODECS)
@pytest.mark.parametrize("resigned", [False, True])
def test_damaged_streams_raise_artefact_error_and_nothing_else(cls: type[ComPEFT], resigned: bool) -> None:
    """2,000 mutants a codec; with a true checksum some decode, to finite tensors, and none raises anything else."""
    rng, codec = random.Random(0), cls(per_tensor=True)
    data = codec.encode_tensors({n: t for n, t in adapter().items() if t.numel() != 1})
    refused = 0
    for _ in range(1000):
        mutant = mutate(rng, data)
        mutant = signed(mutant) if resigned else mutant
        try:
            out = codec.decode_tensors(mutant, max_numel=10_000)
        except ArtefactError:
            refused += 1
        else:
            assert resigned or mutant == data
            assert all(torch.isfinite(t).all() for t in out.values())
    assert refused > (300 if resigned else 990)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to three changes: bits, bytes, cuts, insertions, doubled pieces, digits of the header."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 300))
        kind = rng.randrange(6)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.randint(1, 40)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randint(1, 20))
        elif kind == 4:
            out[at:at] = out[at : at + rng.randint(1, 40)]
        else:
            out[at : at + 1] = rng.choice([b"9999", b"-1", b"null", b"[", b"1e9", b'"', b"{}", b"\xff"])
        if not out:
            out = bytearray(b"\0")
    return bytes(out)


def header_of(change: Callable[[dict], None]) -> bytes:
    data = ComPEFT().encode_tensors({"x": torch.arange(20.0), "y": torch.arange(9.0)})
    header, body = stream.unframe("compeft", data)
    change(header)
    return stream.frame(header.pop("codec", "compeft"), header, body)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(tensors=[["x", "float32", [2**61, 2**61]]]),
        lambda h: h.update(tensors=[["x", "float32", [2**40]]]),
        lambda h: h.update(tensors=[["x", "float32", [True]]]),
        lambda h: h.update(tensors=[["x", "float32", [-20]]]),
        lambda h: h.update(tensors=[["x", "int8", [20]]]),
        lambda h: h.update(tensors=[["x", ["float32"], [20]]]),
        lambda h: h.update(tensors=[["y", "float32", [9]], ["x", "float32", [20]]]),
        lambda h: h.update(tensors=[["x", "float32", [9]], ["x", "float32", [20]]]),
        lambda h: h.update(tensors=[[None, "float32", [29]]]),
        lambda h: h.update(tensors=[]),
        lambda h: h.update(tensors={}),
        lambda h: h.update(tensors=[["x", "float32", [3]]]),
        lambda h: h.update(per_tensor=1),
        lambda h: h.update(density="dense"),
        lambda h: h.update(more=1),
        lambda h: h.pop("density"),
        lambda h: h.update(codec="ternary"),
    ],
)
def test_headers_that_lie_are_refused(change: Callable[[dict], None]) -> None:
    with pytest.raises(ArtefactError):
        ComPEFT().decode_tensors(header_of(change))


def test_other_hostile_frames_are_refused() -> None:
    good = header_of(lambda h: None)
    assert torch.isfinite(ComPEFT().decode_tensors(good)["x"]).all()
    deep = b"[" * 100_000
    huge = b'{"codec":' + b"9" * 5000 + b"}"
    for text in (deep, huge, b"\xff\xfe", json.dumps([1]).encode(), b""):
        rest = struct.pack("<I", len(text)) + text
        with pytest.raises(ArtefactError):
            ComPEFT().decode_tensors(stream.MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest)
    for data in (b"", b"PK\x03\x04", good[:-1], good + b"\0", b"RWAC\x02" + good[5:], signed(good + b"\0")):
        with pytest.raises(ArtefactError):
            ComPEFT().decode_tensors(data)


def compeft_body(body: bytes, numel: int = 32) -> bytes:
    header = {"density": 0.2, "per_tensor": False, "tensors": [["x", "float32", [numel]]]}
    return stream.frame("compeft", header, body)


def one_entry(gamma: int = 0x3F80, count: int = 1, b: int = 0) -> bytes:
    """γ, then of a tensor of 32 entries: so many kept, b, their signs (positive), remainders and quotients (zero)."""
    out = BitWriter()
    for value, width in ((gamma, 16), (count, 6), (b, 5)):
        out.uints(np.array([value]), width)
    out.flags(np.zeros(count, bool))
    out.uints(np.zeros(count, np.int64), b)
    out.unary(np.zeros(count, np.int64))
    return compeft_body(out.getvalue())


@pytest.mark.parametrize("gamma", [0x7F80, 0x7FC0, 0xBF80])
def test_magnitudes_that_are_not_finite_or_negative_are_refused(gamma: int) -> None:
    assert ComPEFT().decode_tensors(one_entry())["x"].tolist() == [1.0] + [0.0] * 31
    with pytest.raises(ArtefactError, match="magnitude"):
        ComPEFT().decode_tensors(one_entry(gamma))


@pytest.mark.parametrize(("count", "b"), [(33, 0), (4, 31)])
def test_counts_and_splits_that_cannot_be_are_refused(count: int, b: int) -> None:
    assert ComPEFT().decode_tensors(one_entry(count=4))["x"].tolist() == [1.0] * 4 + [0.0] * 28
    with pytest.raises(ArtefactError, match="b\\*"):
        ComPEFT().decode_tensors(one_entry(count=count, b=b))


@pytest.mark.parametrize("planes", [b"\x01\x00\x01\x00", b"\x00\x80\x00\x00", b"\x00\x00\x00\x80"])
def test_planes_that_overlap_or_overrun_are_refused(planes: bytes) -> None:
    header = {"density": 0.2, "per_tensor": False, "tensors": [["x", "float32", [15]]]}
    good = Ternary().decode_tensors(stream.frame("ternary", header, b"\x80\x3f\x01\x00\x00\x40"))["x"]
    assert good.tolist() == [1.0] + [0.0] * 13 + [-1.0]
    with pytest.raises(ArtefactError, match="planes"):
        Ternary().decode_tensors(stream.frame("ternary", header, b"\x80\x3f" + planes))


def test_reader_limit_is_named() -> None:
    data = ComPEFT().encode_tensors({"x": torch.randn(5000, generator=generator(0, "test", "limit"))})
    with pytest.raises(ArtefactError, match="max_numel"):
        ComPEFT().decode_tensors(data, max_numel=4999)
    assert ComPEFT().decode_tensors(data, max_numel=5000)["x"].numel() == 5000


@pytest.mark.parametrize(
    "options",
    [{"density": 0}, {"density": 1.5}, {"density": "half"}, {"alpha": 0.0}, {"alpha": float("inf")}, {"per_tensor": 1}],
)
@pytest.mark.parametrize("name", ["compeft", "ternary"])
def test_wrong_options_are_refused(name: str, options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        make("codec", name, **options)
    assert find("codec", name).reference == "192"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "nothing"),
        ({"x": torch.arange(9)}, "'x' is torch.int64"),
        ({"x": torch.tensor([1.0, float("nan"), 2, 3, 4])}, "'x' holds nan"),
        ({"x": torch.ones(3)}, "keeps none"),
        ({"x": torch.ones(10)}, "alike"),
        ({"x": torch.linspace(-6e4, 6e4, 99).half()}, "alpha"),
    ],
)
def test_tensors_that_cannot_be_encoded_are_refused(tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ComPEFT(alpha=9.0).encode_tensors(tensors)


def test_input_is_not_changed_and_output_is_writable() -> None:
    tensors = adapter()
    before = {n: t.clone() for n, t in tensors.items()}
    out = coded(ComPEFT(), tensors)
    assert all(torch.equal(before[n], t) for n, t in tensors.items())
    out["q.A"] += 1
    assert np.isfinite(out["q.B"].numpy()).all()
