"""The order in which rows are seen: a permutation for each epoch, known from the seed alone, that resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rankwise import seeds
from rankwise.errors import ArtefactError, OptionError


class Sampler:
    """Indices 0 … n−1 in the order of (seed, epoch); iterating goes on from where the state says.

    A pass to its end starts the next epoch.  ``state_dict()`` counts the indices handed out, so a loader that fetches
    ahead should be asked for the state at the step it has reached: ``state_dict(seen)``.

    Args:
        n: rows.
        seed: of the orders.
        epoch: the first, from 0.
        shuffle: False: in the rows' own order.

    Raises:
        OptionError: no rows, or a negative epoch.
        ArtefactError: a state of other data or another seed.
    """

    def __init__(self, n: int, seed: int = 0, epoch: int = 0, shuffle: bool = True):
        if n < 1:
            raise OptionError(f"A sampler needs at least one row; n is {n}.")
        if epoch < 0:
            raise OptionError(f"epoch counts from 0; it is {epoch}.")
        self.n, self.seed, self.epoch, self.shuffle = n, seed, epoch, shuffle
        self.seen = 0

    def order(self, epoch: int) -> list[int]:
        """The whole order of one epoch."""
        if not self.shuffle:
            return list(range(self.n))
        return torch.randperm(self.n, generator=seeds.generator(self.seed, "data order", str(epoch))).tolist()

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        while self.seen < self.n:
            self.seen += 1
            yield order[self.seen - 1]
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch`` from its beginning; the epoch it is in already goes on (the Trainer calls this as it resumes)."""
        if epoch != self.epoch:
            self.epoch, self.seen = epoch, 0

    def state_dict(self, seen: int | None = None) -> dict[str, Any]:
        """Plain data: n, seed, shuffle, epoch, seen."""
        at = self.seen if seen is None else seen
        return {"n": self.n, "seed": self.seed, "shuffle": self.shuffle, "epoch": self.epoch, "seen": at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; refuses one of other data, since the same numbers would name other rows."""
        for key in ("n", "seed", "shuffle"):
            if state.get(key) != getattr(self, key):
                raise ArtefactError(
                    f"The sampler's state has {key} = {state.get(key)!r}, but this run has {getattr(self, key)!r}; resume with the same data and seed."
                )
        epoch, seen = state.get("epoch"), state.get("seen")
        if not isinstance(epoch, int) or not isinstance(seen, int) or epoch < 0 or not 0 <= seen <= self.n:
            raise ArtefactError(f"The sampler's state is damaged: epoch {epoch!r}, seen {seen!r} of {self.n}.")
        self.epoch, self.seen = epoch, seen
