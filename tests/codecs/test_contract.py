"""What every registered codec keeps: error, size, determinism, dtypes and shapes, odd tensors, damaged streams."""

from __future__ import annotations

import random
import tracemalloc
import zlib

import pytest
import torch
from torch import Tensor

from rankwise import catalogue
from rankwise.codecs import stream
from rankwise.codecs.base import AdapterCodec
from rankwise.codecs.delta import Difference, digest
from rankwise.codecs.lossless import Lossless
from rankwise.codecs.search import ALPHAS, search
from rankwise.codecs.weights import adapter_codec
from rankwise.errors import ArtefactError, OptionError, UnknownName
from rankwise.seeds import generator
from tests.codecs.test_compeft import mutate, signed

#: codec with options → largest relative error on Gaussian tensors
CASES = {
    "compeft": ({"name": "compeft"}, 0.72),
    "compeft-tensor": ({"name": "compeft", "per_tensor": True, "density": 0.5}, 0.55),
    "ternary": ({"name": "ternary"}, 0.72),
    "intk": ({"name": "intk", "group": 8}, 0.11),
    "int8": ({"name": "intk", "k": 8}, 0.008),
    "int8-affine": ({"name": "intk", "k": 8, "symmetric": False}, 0.007),
    "nf4": ({"name": "nf4"}, 0.12),
    "lossless": ({"name": "lossless"}, 0.0),
    "delta": ({"name": "delta"}, 0.0),
    "delta-int8": ({"name": "delta", "inner": {"name": "intk", "k": 8}}, 1e-4),
    "delta-compeft": ({"name": "delta", "inner": "compeft"}, 1e-2),
}
everywhere = pytest.mark.parametrize("case", CASES)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = generator(0, "test", "contract")
    shapes = {"q.A": (8, 70), "q.B": (65, 8), "moe.A": (3, 4, 40)}
    return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}


def near(of: dict[str, Tensor]) -> dict[str, Tensor]:
    g = generator(0, "test", "near")
    return {n: (t + torch.randn(t.shape, generator=g) * 0.01).to(t.dtype) for n, t in of.items()}


def codec_of(case: str, to: dict[str, Tensor]) -> AdapterCodec:
    codec = adapter_codec(CASES[case][0])
    return codec.bind(near(to)) if isinstance(codec, Difference) else codec


def test_every_codec_is_in_the_table() -> None:
    assert {c[0]["name"] for c in CASES.values()} == {m.name for m in catalogue.methods("codec")}


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_error_size_determinism_and_kinds(case: str, dtype: torch.dtype) -> None:
    given = tensors(dtype)
    codec = codec_of(case, given)
    data = codec.encode_tensors(given)
    out = codec.decode_tensors(data)
    assert list(out) == sorted(given)
    for name, t in given.items():
        assert out[name].shape == t.shape and out[name].dtype == t.dtype
        rounding = 0.0 if codec.exact else torch.finfo(dtype).eps
        error = (out[name].double() - t.double()).norm() / t.double().norm()
        assert error <= CASES[case][1] + rounding
        assert not codec.exact or torch.equal(out[name].view(torch.uint8), t.view(torch.uint8))
    assert codec.encode_tensors(dict(reversed(given.items()))) == data == codec_of(case, given).encode_tensors(given)
    assert not codec.exact or error == 0
    numel = sum(t.numel() for t in given.values())
    bound = codec.bits(40) * (2 if dtype == torch.float64 and codec.exact else 1)
    header = 400 + 25 * len(given)
    assert 8 * (len(data) - header) / numel <= 1.03 * bound


@everywhere
def test_odd_tensors_are_handled_or_refused_by_name(case: str) -> None:
    whole = tensors() | {
        "none": torch.zeros(0, 3),
        "zero": torch.zeros(8, 8),
        "one": torch.tensor([-1.5]),
        "scalar": torch.tensor(2.5),
    }
    codec = codec_of(case, whole)
    if case in ("compeft-tensor",):
        with pytest.raises(OptionError, match="'one'"):
            codec.encode_tensors(whole)
        whole = {n: t for n, t in whole.items() if n not in ("one", "scalar")}
    out = codec.decode_tensors(codec.encode_tensors(whole))
    assert all(out[n].shape == t.shape for n, t in whole.items())
    assert torch.equal(out["zero"], torch.zeros(8, 8)) or isinstance(codec, Difference)
    bad = whole | {"q.A": torch.full((2, 4), float("nan"))}
    codec = codec_of(case, bad)
    if codec.exact:
        assert codec.decode_tensors(codec.encode_tensors(bad))["q.A"].isnan().all()
    else:
        with pytest.raises(OptionError, match=r"'q\.A'"):
            codec.encode_tensors(bad)
    for empty in ({}, {"none": torch.zeros(0, 3)}):
        with pytest.raises(OptionError, match="nothing"):
            codec_of(case, empty).encode_tensors(empty)
    with pytest.raises(OptionError, match="'i' is torch.int64"):
        codec.encode_tensors({"i": torch.arange(4)})


@everywhere
@pytest.mark.parametrize("resigned", [False, True])
def test_damaged_streams_raise_artefact_error_and_nothing_else(case: str, resigned: bool) -> None:
    given = tensors()
    rng, codec = random.Random(1), codec_of(case, given)
    data = codec.encode_tensors(given)
    refused = 0
    for _ in range(120):
        mutant = mutate(rng, data)
        mutant = signed(mutant) if resigned else mutant
        try:
            codec.decode_tensors(mutant, max_numel=10_000)  # type: ignore[call-arg]
        except ArtefactError:
            refused += 1
        else:
            assert resigned or mutant == data
    assert refused > (20 if resigned else 117)


def test_lossless_keeps_every_pattern() -> None:
    bits = torch.tensor([0, -(2**31), 1, -1, 2**31 - 1, 0x7F800000, -0x00800000, 0x3F800000], dtype=torch.int32)
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    given = {"f": bits.view(torch.float32), "h": halves.view(torch.float16), "b": halves.view(torch.bfloat16)}
    for codec in (Lossless(), Difference().bind({n: t.flip(0) for n, t in given.items()})):
        out = codec.decode_tensors(codec.encode_tensors(given))
        assert torch.equal(out["f"].view(torch.int32), bits)
        assert torch.equal(out["h"].view(torch.int16), halves) and torch.equal(out["b"].view(torch.int16), halves)


def test_a_difference_is_as_small_as_the_adapters_are_near() -> None:
    given = {"x": torch.randn(4000, generator=generator(0, "test", "near"))}
    sizes = []
    for eps in (0.0, 1e-6, 1e-3):
        to = {"x": given["x"] * (1 + eps)}
        sizes.append(len(Difference().bind(to).encode_tensors(given)))
    assert sizes[0] < 400 < sizes[1] < sizes[2] < len(Lossless().encode_tensors(given)) < 4000 * 4


def test_a_wrong_reference_is_refused() -> None:
    given, codec = tensors(), Difference({"name": "intk", "k": 8})
    right = near(given)
    data = codec.bind(right).encode_tensors(given)
    wrong = right | {"q.A": right["q.A"].clone()}
    wrong["q.A"][0, 0] += 1e-6
    with pytest.raises(ArtefactError, match=digest(right)[:12]):
        codec.bind(wrong).decode_tensors(data)
    for bad, words in (({"q.A": right["q.A"]}, "lacks it"), (right | {"q.B": right["q.B"].T}, r"has it as \(8, 65\)")):
        with pytest.raises(ArtefactError, match=words):
            codec.bind(bad).decode_tensors(data)
        with pytest.raises(OptionError, match=words):
            codec.bind(bad).encode_tensors(given)
    for nobody in (lambda: codec.decode_tensors(data), lambda: codec.encode_tensors(given)):
        with pytest.raises((ArtefactError, OptionError), match="give that one"):
            nobody()


def test_streams_that_claim_more_than_they_hold() -> None:
    header = {"options": {"k": 4}, "tensors": [["x", "float32", [2**29]]]}
    with pytest.raises(ArtefactError, match="early"):
        adapter_codec("intk").decode_tensors(stream.frame("intk", header, b"\0" * 100))
    with pytest.raises(ArtefactError, match="deflated"):
        Lossless().decode_tensors(stream.frame("lossless", {"tensors": [["x", "float32", [2**29]]]}, b"\0" * 100))
    with pytest.raises(ArtefactError, match="options"):
        adapter_codec("intk").decode_tensors(stream.frame("intk", header | {"options": {"k": 99}}, b""))


def test_a_deflated_bomb_is_not_inflated() -> None:
    data = stream.frame("lossless", {"tensors": [["x", "float32", [10]]]}, zlib.compress(bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(ArtefactError, match="40 bytes"):
        Lossless().decode_tensors(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("named", "error", "words"),
    [
        ("compft", UnknownName, "compeft"),
        ({"name": "compeft", "densty": 0.1}, OptionError, "density"),
        ({"name": "lossless", "k": 4}, OptionError, "no option 'k'"),
        ({"name": "delta", "inner": "delta"}, OptionError, "another codec"),
        ({"name": "delta", "inner": {"name": "lossless", "k": 4}}, OptionError, "no option 'k'"),
        ({"k": 4}, OptionError, "'name'"),
    ],
)
def test_wrong_names_and_options(named: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        adapter_codec(named)  # type: ignore[arg-type]


def test_search_finds_the_scale_of_least_error() -> None:
    given = tensors()
    flat = torch.cat([given[n].reshape(-1) for n in sorted(given)])

    def error(out: dict[str, Tensor]) -> float:
        return float((torch.cat([out[n].reshape(-1) for n in sorted(out)]) - flat).norm())

    found = search(adapter_codec("compeft"), given, error)  # type: ignore[arg-type]
    assert [a for _, a, _ in found.tried] == list(ALPHAS)
    # the best common magnitude is the mean |τ| of the kept: 1.76 σ of the largest fifth of a Gaussian, so 2 on the grid
    assert found.codec.alpha == 2.0 and found.codec.density == 0.2
    worst = search(adapter_codec("ternary"), given, error, alphas=(1.0, 6.0), densities=(0.1, 0.5), higher_is_better=True)  # type: ignore[arg-type]
    assert (worst.codec.name, worst.codec.density, worst.codec.alpha) == ("ternary", 0.5, 6.0)
    with pytest.raises(OptionError, match="finite"):
        search(adapter_codec("compeft"), given, lambda out: float("nan"))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="empty"):
        search(adapter_codec("compeft"), given, error, alphas=())  # type: ignore[arg-type]
