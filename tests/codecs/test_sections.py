"""Signs of several tensors as one bit stream: what is read is what was written, and nothing else is read at all."""

from __future__ import annotations

import numpy as np
import pytest

from rankwise.codecs import sections
from rankwise.codecs.signs import Signs, to_bf16
from rankwise.errors import ArtefactError


def signs(rng: np.random.Generator, lengths: list[int], densities: list[float]) -> Signs:
    """Of one vector: its tensors' entries kept by chance, each tensor with its own density."""
    kept = np.concatenate([rng.random(n) < d for n, d in zip(lengths, densities, strict=True)])
    positions = np.flatnonzero(kept)
    return Signs(int(kept.size), positions, rng.random(positions.size) < 0.5, to_bf16(float(rng.random())))


@pytest.mark.parametrize("densities", [[0.02, 0.3], [0.0, 1.0], [0.51, 0.5], [0.9, 0.001]])
def test_what_is_read_is_what_was_written(densities: list[float]) -> None:
    rng = np.random.default_rng(0)
    sizes = [[400, 77], [1, 256]]
    parts = [signs(rng, lengths, densities) for lengths in sizes]
    data = sections.write(parts, sizes)
    for part, again in zip(parts, sections.read(data, sizes), strict=True):
        assert np.array_equal(part.dense(), again.dense()) and part.gamma == again.gamma
    assert sections.write(sections.read(data, sizes), sizes) == data


def test_tensors_of_unlike_density_take_no_more_bits_than_their_own_codes() -> None:
    """A dense and a sparse tensor together cost what they cost apart, but for the padding of a byte."""
    rng = np.random.default_rng(1)
    one, two = signs(rng, [4000], [0.4]), signs(rng, [4000], [0.01])
    apart = len(sections.write([one], [[4000]])) + len(sections.write([two], [[4000]]))
    assert len(sections.write([one, two], [[4000], [4000]])) <= apart + 1


def test_other_bits_are_refused() -> None:
    rng = np.random.default_rng(2)
    sizes = [[64, 64]]
    data = sections.write([signs(rng, *[[64, 64], [0.2, 0.7]])], sizes)
    with pytest.raises(ArtefactError):
        sections.read(data[:-1], sizes)
    with pytest.raises(ArtefactError):
        sections.read(data + b"\0", sizes)
    claims = bytearray(data)
    claims[2] = 0xFF  # the count of the first tensor, just behind γ
    with pytest.raises(ArtefactError, match="claims 127 kept ones|claims"):
        sections.read(bytes(claims), sizes)
