"""Traffic to measure with: S-LoRA's generator (draw for draw) and Punica's popularities and lengths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from rankwise.errors import OptionError, unknown


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Adapters of a published setting: ``base``, its width, the ``ranks`` that names cycle through (on q, k, v, o)."""

    base: str
    hidden: int
    ranks: tuple[int, ...]


#: S1 … S6 as published (S3 is not among them), and the scaled ones that two cores can run
SETTINGS = {
    "S1": Setting("Llama-7B", 4096, (8,)),
    "S2": Setting("Llama-7B", 4096, (64, 32, 16, 8)),
    "S4": Setting("Llama-13B", 5120, (64, 32, 16)),
    "S5": Setting("Llama-30B", 7168, (32,)),
    "S6": Setting("Llama-70B", 8192, (64,)),
    "S1'": Setting("M0", 256, (8,)),
    "S2'": Setting("M0", 256, (16, 8, 4, 2)),
}


def setting(name: str) -> Setting:
    """One of :data:`SETTINGS`; UnknownName with the nearest names if there is none."""
    if name not in SETTINGS:
        raise unknown("setting", name, SETTINGS)
    return SETTINGS[name]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace.

    Attributes:
        at: seconds from the start.
        adapter, rank: its index, its rank.
        prompt, output: tokens.
    """

    at: float
    adapter: int
    rank: int
    prompt: int
    output: int


@dataclasses.dataclass(frozen=True, slots=True)
class TraceOptions:
    """What a trace is drawn from.

    Attributes:
        adapters: how many, n; ``ranks``: adapter i has rank ranks[i mod len].
        alpha: P(i) = ((i+1)/n)^α − (i/n)^α; 1 is uniform, smaller is more skewed.
        rate: requests a second; ``cv``: standard deviation of the gaps over their mean (1: Poisson); ``duration``: seconds.
        prompt, output: lengths, integers in [low, high).

    Raises:
        OptionError: a value out of its range.
    """

    adapters: int = 32
    alpha: float = 1.0
    rate: float = 2.0
    cv: float = 1.0
    duration: float = 60.0
    prompt: tuple[int, int] = (8, 512)
    output: tuple[int, int] = (8, 512)
    ranks: tuple[int, ...] = (8,)
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("adapters", "alpha", "rate", "cv", "duration"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"A trace got {name} = {getattr(self, name)}; it is above 0 and finite.")
        for name, (low, high) in (("prompt", self.prompt), ("output", self.output)):
            if not 1 <= low < high:
                raise OptionError(f"A trace got {name} lengths in [{low}, {high}); they are 1 or more, the end above the start.")
        if not self.ranks or min(self.ranks) < 1:
            raise OptionError(f"A trace got the ranks {self.ranks}; give at least one, each 1 or more.")


def generate(options: TraceOptions) -> list[Arrival]:
    """⌊rate·duration⌋ requests in order of arrival.

    numpy's legacy generator, drawn in the order of the published one: adapters ⌊n·U⌋ with U of density αu^{α−1}, prompt
    lengths, answer lengths, then gaps from Gamma(1/cv², cv²/rate); so the same seed gives the same trace as there.
    """
    o, rng = options, np.random.RandomState(options.seed)
    count = int(o.rate * o.duration)
    chosen = (rng.power(o.alpha, count) * o.adapters).astype(int)
    prompts, outputs = rng.randint(*o.prompt, count), rng.randint(*o.output, count)
    arrivals = np.cumsum(rng.gamma(1 / o.cv**2, o.cv**2 / o.rate, count))
    # a draw may round up to 1, which would be adapter n
    chosen = np.minimum(chosen, o.adapters - 1)
    return [
        Arrival(float(at), int(a), o.ranks[a % len(o.ranks)], int(p), int(n))
        for at, a, p, n in zip(arrivals, chosen, prompts, outputs, strict=True)
    ]


def popularity(kind: str, count: int) -> list[int]:
    """Adapter of each of ``count`` requests, as Punica has them.

    ``identical``: one for all; ``distinct``: one each; ``uniform``: ⌈√count⌉ in turn; ``skewed``: groups of
    ⌊1.5^k⌋ requests, k = 0, 1, …, until all are in one.
    """
    if kind == "identical":
        return [0] * count
    if kind == "distinct":
        return list(range(count))
    if kind == "uniform":
        return [i % (math.isqrt(count - 1) + 1) for i in range(count)]
    if kind == "skewed":
        out: list[int] = []
        k = 0
        while len(out) < count:
            out += [k] * int(1.5**k)
            k += 1
        return out[:count]
    raise unknown("popularity", kind, ("identical", "distinct", "uniform", "skewed"))


def punica_lengths(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, answer) of ``count`` requests: prompt lognormal (0.8, location −1, scale 18) in [1, 2046], total uniform in
    [0, 2048) raised to prompt + 2 where it is below."""
    rng = np.random.RandomState(seed)
    prompts = np.clip(rng.lognormal(math.log(18), 0.8, count) - 1, 1, 2046).astype(int)
    totals = np.maximum(rng.randint(0, 2048, count), prompts + 2)
    return [(int(p), int(t - p)) for p, t in zip(prompts, totals, strict=True)]


def effective(shares: Sequence[float]) -> float:
    """Effective number of adapters, 1/Σp² of their shares p."""
    return 1 / float(np.square(np.asarray(shares)).sum())
