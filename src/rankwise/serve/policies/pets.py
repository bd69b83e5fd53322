"""Batches planned by dynamic programming, for work that is all there before it begins."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

from rankwise.catalogue import register
from rankwise.serve.policies.base import Policy, RequestInfo, State, need


def partition(lengths: Sequence[int], cost: Callable[[int, int], float], most: int) -> list[tuple[int, int]]:
    """Cut ascending ``lengths`` into runs [start, end) of least total cost(number, longest), none above ``most`` long.

    O(q·most) calls of ``cost``; among equal plans the one with fewest runs.
    """
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for end in range(1, len(lengths) + 1):
        options = ((best[s][0] + cost(end - s, lengths[end - 1]), best[s][1] + 1, s) for s in range(max(0, end - most), end))
        best.append(min(options))
    runs: list[tuple[int, int]] = []
    end = len(lengths)
    while end:
        runs.append((best[end][2], end))
        end = best[end][2]
    return runs[::-1]


@register("policy", "pets", title="Planned batches (offline)", paper="PetS, USENIX ATC 2022", reference="001")
@dataclasses.dataclass
class Pets(Policy):
    """Batch after batch, each planned over all that wait, for engines or work where batches are padded.

    Within an adapter, requests sorted by prompt are cut into mini-batches of least Σ β, β(n, longest) = ``launch`` +
    n·longest·(``token`` + ``cell``·LoRA pages of the adapter); then all mini-batches, sorted by their longest, are cut into
    macro-batches of least Σ α, α(requests, longest) = ``step`` + requests·longest·``token``.  The next macro-batch is let in when
    nothing runs.  With ``least`` or fewer waiting: order of arrival.
    The published code runs the last macro-batch; here it is the one with the oldest request, which costs the same and
    starves none.

    Attributes:
        step, launch, token, cell: of the costs above, in any unit.
        max_batch: requests of a macro-batch.
        least: waiting requests up to which nothing is planned.
    """

    step: float = 100.0
    launch: float = 10.0
    token: float = 1.0
    cell: float = 0.05
    max_batch: int = 32
    least: int = 10
    name = "pets"

    def __post_init__(self) -> None:
        need(
            "pets", max_batch=(self.max_batch, self.max_batch >= 1, "at least 1"), least=(self.least, self.least >= 0, "0 or more")
        )
        need("pets", **{n: (getattr(self, n), getattr(self, n) >= 0, "0 or more") for n in ("step", "launch", "token", "cell")})

    def order(self, state: State) -> list[RequestInfo]:
        if state.running:
            return []
        jobs = list(state.waiting)
        if len(jobs) <= self.least:
            return jobs
        oldest = min(jobs, key=lambda j: j.arrival)
        return next(b for b in self.plan(jobs) if any(j.id == oldest.id for j in b))

    def plan(self, jobs: Sequence[RequestInfo]) -> list[list[RequestInfo]]:
        """All macro-batches, those of short prompts first."""
        minis = sorted(self._minis(jobs), key=lambda b: b[-1].prompt)
        sizes = [0]
        for b in minis:
            sizes.append(sizes[-1] + len(b))
        return [[j for b in minis[s:e] for j in b] for s, e in self._macros(minis, sizes)]

    def _minis(self, jobs: Sequence[RequestInfo]) -> list[list[RequestInfo]]:
        queues: dict[str | None, list[RequestInfo]] = defaultdict(list)
        for j in sorted(jobs, key=lambda j: (j.prompt, j.arrival)):
            queues[j.adapter].append(j)
        out = []
        for queue in queues.values():
            price = self.token + self.cell * queue[0].lora_pages
            runs = partition([j.prompt for j in queue], lambda n, longest: self.launch + n * longest * price, self.max_batch)  # noqa: B023
            out += [queue[s:e] for s, e in runs]
        return out

    def _macros(self, minis: Sequence[Sequence[RequestInfo]], sizes: Sequence[int]) -> list[tuple[int, int]]:
        """:func:`partition` over mini-batches, whose number of requests a macro-batch adds up."""
        best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
        for end in range(1, len(minis) + 1):
            longest = minis[end - 1][-1].prompt
            starts = [s for s in range(end) if sizes[end] - sizes[s] <= self.max_batch]
            best.append(
                min((best[s][0] + self.step + (sizes[end] - sizes[s]) * longest * self.token, best[s][1] + 1, s) for s in starts)
            )
        runs: list[tuple[int, int]] = []
        end = len(minis)
        while end:
            runs.append((best[end][2], end))
            end = best[end][2]
        return runs[::-1]
