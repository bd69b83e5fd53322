"""How long a step takes: a model fitted while serving, and the tokens that fit a limit by it.

    t = a₀ + a₁·min(T, k) + a₂·max(T − k, 0) + a₃·Σ contexts + a₄·Σ ranks + a₅·[adapters present],      all a ≥ 0

T tokens in the step; below the knee k products wait for memory, above it they compute; Σ ranks is over distinct adapters.
Relative errors are minimised (rows over their measured time), so a pause of the machine weighs no more than any other row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from rankwise.errors import OptionError

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step computes: ``tokens``; ``context``: cached tokens read by its rows; ``ranks``: summed over its adapters."""

    tokens: int
    context: int = 0
    ranks: int = 0

    def joined(self, tokens: int) -> StepLoad:
        """With that many tokens of prompts or training more."""
        return dataclasses.replace(self, tokens=self.tokens + tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Coefficients:
    """What the parts of a step cost, in seconds.

    Attributes:
        step, adapters: of a step; of the presence of adapters.
        token, token_above: of a token below and above the ``knee`` (tokens).
        context, rank: of a cached token; of a unit of rank.
    """

    step: float = 0.0
    token: float = 0.0
    token_above: float = 0.0
    context: float = 0.0
    rank: float = 0.0
    adapters: float = 0.0
    knee: int = 16

    def seconds(self, load: StepLoad) -> float:
        below = min(load.tokens, self.knee)
        adapters = self.rank * load.ranks + (self.adapters if load.ranks else 0.0)
        return self.step + self.token * below + self.token_above * (load.tokens - below) + self.context * load.context + adapters


def _rows(loads: Sequence[StepLoad], knee: int) -> Array:
    T, context, ranks = np.array([(x.tokens, x.context, x.ranks) for x in loads], np.float64).T
    return np.stack([np.ones(len(T)), np.minimum(T, knee), np.maximum(T - knee, 0), context, ranks, ranks > 0], 1)


def nonnegative(X: Array, y: Array) -> tuple[Array, float]:
    """argmin ‖Xa − y‖² over a ≥ 0, and its value: the unconstrained answers of all 2^k sets of columns, the best that is ≥ 0.

    X: n×k, for the few columns of a step (k ≤ 8); columns are scaled to length 1 inside, and all sets are solved at once.
    """
    size = np.linalg.norm(X, axis=0)
    scale = np.where(size > 0, size, 1.0)
    unit = X / scale
    G, b = unit.T @ unit, unit.T @ y
    inside = _sets(len(size)) & (size > 0)
    # columns outside a set become those of the identity, with 0 on the right
    systems = (
        np.where(inside[:, :, None] & inside[:, None, :], G, 0.0) + np.eye(len(size)) * np.where(inside, 1e-13, 1.0)[:, None, :]
    )
    a = np.linalg.solve(systems, np.where(inside, b, 0.0)[:, :, None])[:, :, 0]
    values = np.where((a >= 0).all(1), np.einsum("si,ij,sj->s", a, G, a) - 2 * a @ b, np.inf)
    best = int(values.argmin())
    return a[best] / scale, float(values[best] + y @ y)


@functools.cache
def _sets(k: int) -> npt.NDArray[np.bool_]:
    """All sets of k columns, a row each, small ones first."""
    return np.array(sorted(itertools.product((False, True), repeat=k), key=sum))


class StepTime:
    """The model, fitted on the last ``window`` steps every ``every`` of them (sooner at the start).

    Args:
        prior: what is predicted before the first step.
        knees: where the line of tokens may bend; the best is taken at each fit.
    """

    def __init__(
        self,
        prior: Coefficients = Coefficients(),
        window: int = 256,
        every: int = 32,
        knees: Sequence[int] = (8, 16, 32, 64, 128, 256),
    ):
        if window < 1 or every < 1 or not knees or min(knees) < 1:
            raise OptionError(f"StepTime got window = {window}, every = {every}, knees = {tuple(knees)}; each is at least 1.")
        self.coefficients, self.every, self.knees = prior, every, tuple(knees)
        self.samples: deque[tuple[StepLoad, float]] = deque(maxlen=window)
        self.errors: deque[float] = deque(maxlen=window)
        self.seen = 0

    def predict(self, load: StepLoad) -> float:
        """Seconds of a step with that load."""
        return self.coefficients.seconds(load)

    def observe(self, load: StepLoad, seconds: float) -> float:
        """Learn from a step; the ratio of what had been predicted to what it was.

        Raises:
            OptionError: seconds that are not above 0.
        """
        if not 0 < seconds < float("inf"):
            raise OptionError(f"A step of {load.tokens} tokens was said to take {seconds} seconds; a step takes more than 0.")
        ratio = self.predict(load) / seconds
        if self.seen:  # before the first step there is only the prior
            self.errors.append(ratio)
        self.samples.append((load, seconds))
        self.seen += 1
        if self.seen % self.every == 0 or (self.seen < self.every and self.seen & (self.seen - 1) == 0):
            self.fit()
        return ratio

    def error_ratio(self) -> float:
        """Median of |predicted/measured − 1| over the window, each predicted before it was measured; 0 with none yet."""
        return float(np.median(np.abs(np.array(self.errors) - 1))) if self.errors else 0.0

    def fit(self) -> Coefficients:
        """Fit to the window now."""
        y = np.array([t for _, t in self.samples])
        fits = {}
        for knee in self.knees:
            fits[knee] = nonnegative(_rows([x for x, _ in self.samples], knee) / y[:, None], np.ones(len(y)))
        knee = min(fits, key=lambda k: (round(fits[k][1], 12), k))
        step, token, above, context, rank, adapters = map(float, fits[knee][0])
        self.coefficients = Coefficients(step, token, above, context, rank, adapters, knee)
        return self.coefficients


@dataclasses.dataclass(frozen=True)
class StepBudget:
    """How many prompt and training tokens join a step.

    Attributes:
        seconds: the time of a step by its load (:meth:`StepTime.predict`).
        max_num_batched_tokens: most tokens of a step, decoding rows among them.
        least_prefill: prompt tokens that always may join where a prompt waits, so that a tight limit cannot starve prompts.
    """

    seconds: Callable[[StepLoad], float]
    max_num_batched_tokens: int = 256
    least_prefill: int = 16

    def split(self, decode: StepLoad, prefill_waiting: int, train_waiting: int, slo: float | None) -> tuple[int, int]:
        """(prompt tokens, training tokens) beside ``decode``, prompts first, the step within ``slo`` seconds (None: no limit).

        Training takes what then is left, s = max{s : t(c + s) ≤ slo}; it gets nothing of a step that is late already.

        Args:
            decode: the load of the decoding rows.
            prefill_waiting, train_waiting: tokens that could join.
            slo: seconds, or None for no limit.
        """
        room = max(self.max_num_batched_tokens - decode.tokens, 0)
        least = min(prefill_waiting, self.least_prefill, max(room, 1 if decode.tokens == 0 else 0))
        prefill = max(self._most(decode, min(prefill_waiting, room), slo), least)
        train = self._most(decode.joined(prefill), min(train_waiting, max(room - prefill, 0)), slo)
        return prefill, train

    def _most(self, load: StepLoad, most: int, slo: float | None) -> int:
        """Largest n ≤ most whose step stays within ``slo``, by bisection (time grows with tokens)."""
        if slo is None or self.seconds(load.joined(most)) <= slo:
            return most
        low, high = 0, most  # low may be late itself: then nothing joins
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(load.joined(middle)) <= slo else (low, middle)
        return low
