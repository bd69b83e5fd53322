"""Bit streams and gap codes: lossless, ComPEFT's parameters and sizes, damage refused."""

from __future__ import annotations

import time

import numpy as np
import pytest

from rankwise.codecs import golomb
from rankwise.codecs.bits import BitReader, BitWriter
from rankwise.errors import ArtefactError, OptionError

#: density, b*, bits a parameter with signs, by the formula (docs/methods/codecs.md#compeft)
TABLE = [(0.05, 4, 0.339), (0.1, 3, 0.576), (0.2, 2, 0.939), (0.3, 1, 1.188), (0.5, 0, 1.5)]


def mask(n: int, density: float) -> np.ndarray:
    return np.flatnonzero(np.random.default_rng(0).random(n) < density)


@pytest.mark.parametrize(("density", "b", "bits"), TABLE)
def test_parameter_and_size_are_the_formulas(density: float, b: int, bits: float) -> None:
    assert golomb.parameter(density) == b
    assert density * (golomb.position_bits(density) + 1) == pytest.approx(bits, abs=6e-4)
    positions = mask(1_000_000, density)
    out = BitWriter()
    golomb.write_positions(out, positions, b)
    assert len(out) + positions.size == pytest.approx(1_000_000 * bits, rel=0.01)


def test_parameter_is_clamped_where_dense() -> None:
    assert [golomb.parameter(k) for k in (0.61, 0.63, 0.9, 0.999999, 1)] == [0] * 5
    assert golomb.position_bits(1) == 1.0
    for density in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(OptionError):
            golomb.parameter(density)


@pytest.mark.parametrize("b", [0, 1, 5, 12])
@pytest.mark.parametrize("positions", [[], [0], [999], [0, 1, 2], [3, 500, 999], list(range(1000))])
def test_round_trip(b: int, positions: list[int]) -> None:
    out = BitWriter()
    golomb.write_positions(out, np.array(positions, np.int64), b)
    bits = BitReader(out.getvalue())
    assert golomb.read_positions(bits, len(positions), b, 1000).tolist() == positions
    bits.end()
    if positions:  # one entry fewer, and the last position is outside
        with pytest.raises(ArtefactError):
            golomb.read_positions(BitReader(out.getvalue()), len(positions), b, positions[-1])


def test_code_is_the_textbook_one() -> None:
    """Gaps 5 and 0 with b = 2: remainders 01, 00, quotients 1 → 01, 0 → 1; bits from the least significant."""
    out = BitWriter()
    golomb.write_positions(out, np.array([5, 6]), 2)
    assert len(out) == 7 and out.getvalue() == bytes([0b1100001])


def test_sections_follow_without_gaps() -> None:
    out = BitWriter()
    out.flags(np.array([True, False, True]))
    out.uints(np.array([5, 0, 7]), 3)
    out.unary(np.array([2, 0, 3]))
    assert len(out) == 3 + 9 + 8
    bits = BitReader(out.getvalue())
    assert bits.flags(3).tolist() == [True, False, True]
    assert bits.uints(3, 3).tolist() == [5, 0, 7]
    assert bits.unary(3).tolist() == [2, 0, 3]
    bits.end()


def test_damage_is_refused() -> None:
    for use in (lambda r: r.uints(3, 3), lambda r: r.unary(9), lambda r: r.end()):
        with pytest.raises(ArtefactError):
            use(BitReader(b"\x81"))
    with pytest.raises(ValueError, match="fit"):
        BitWriter().uints(np.array([8]), 3)
    with pytest.raises(ValueError, match="increase"):
        golomb.write_positions(BitWriter(), np.array([4, 4]), 1)


def test_ten_million_positions_take_seconds() -> None:
    positions = mask(50_000_000, 0.2)
    begun, out = time.process_time(), BitWriter()
    golomb.write_positions(out, positions, 2)
    assert np.array_equal(golomb.read_positions(BitReader(out.getvalue()), positions.size, 2, 50_000_000), positions)
    assert time.process_time() - begun < 10
