"""The Golomb stream beside its entropy: random masks, and the factors of an adapter trained on the shipped base."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise import assets
from rankwise.assets import tasks
from rankwise.codecs import stream
from rankwise.codecs.compeft import ComPEFT
from rankwise.seeds import generator
from rankwise.train.compare import windows

DENSITIES = (0.05, 0.1, 0.2, 0.5)


def entropy(k: float) -> float:
    """Bits an entry of a random ternary mask of density k: −(1−k)·log₂(1−k) − k·log₂(k/2)."""
    return sum(-p * math.log2(p / ways) for p, ways in ((1 - k, 1), (k, 2)) if p > 0)


def measured(codec: ComPEFT, tensors: dict[str, Tensor]) -> tuple[float, float]:
    """Bits an entry of the body without its table (γ; count and b of each tensor), and the bound Σ n·H(k) / Σ n of the tensors."""
    data = codec.encode_tensors(tensors)
    out = codec.decode_tensors(data)
    body = stream.unframe("compeft", data)[1]
    vectors = len(tensors) if codec.per_tensor else 1
    table = 16 * vectors + sum(t.numel().bit_length() + 5 for t in out.values())
    n = sum(t.numel() for t in out.values())
    bound = sum(t.numel() * entropy(int(t.count_nonzero()) / t.numel()) for t in out.values())
    assert 8 * len(body) - table >= 0 and table < 0.01 * n
    return (8 * len(body) - table) / n, bound / n


@pytest.mark.parametrize("density", DENSITIES)
def test_random_masks(density: float) -> None:
    bits, bound = measured(ComPEFT(density=density), {"x": torch.randn(300_000, generator=generator(0, "test", "mask"))})
    assert bits == pytest.approx(bound, rel=0.02)
    assert bound == pytest.approx(entropy(density), rel=1e-4)


def test_above_one_half_the_dropped_are_listed() -> None:
    x = {"x": torch.randn(100_000, generator=generator(0, "test", "dense"))}
    for density, ratio in ((0.8, 1.012), (0.95, 1.005), (1.0, 1.001)):
        bits, bound = measured(ComPEFT(density=density), x)
        assert bound <= bits * 1.002 and bits < ratio * bound


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Factors after 12 steps: A still mostly its start, B small and uneven."""
    model, tokenizer = assets.load_base()
    batches = windows(tokenizer, tasks.domains()["tables"][0], 64, 4)
    adapter = rw.attach(model, rw.Recipe(form="lora", r=8, alpha=16))
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=3e-3)
    for batch in take(batches, 12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: t.detach().clone() for n, t in adapter.named_parameters().items()}


def take(batches: Iterable[dict[str, Tensor]], n: int) -> list[dict[str, Tensor]]:
    return [b for b, _ in zip(batches, range(n))]


@pytest.mark.parametrize("density", DENSITIES)
def test_a_trained_adapter(density: float, trained: dict[str, Tensor]) -> None:
    bits, bound = measured(ComPEFT(density=density), trained)
    assert bound * 0.98 <= bits <= bound * 1.02
    # as many as the density says over all, but not in each tensor: the bound of the tensors is below that of the whole
    assert bound < 0.99 * entropy(density) and bits < entropy(density)
