"""What to try next after a sweep, read off its own numbers; a rule each, no rule without a number behind it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rankwise.train.job_result import JobResult, best


def advice(
    outcomes: Sequence[JobResult], axes: Mapping[str, Sequence[object]], chosen: Mapping[str, Mapping[str, object]]
) -> list[str]:
    """Sentences, the most telling first.

    Args:
        outcomes: all jobs of the sweep.
        axes: the grid: field → the values that were tried.
        chosen: job → field → its value.
    """
    top = best(outcomes)
    if top is None:
        return ["No job finished: lower the learning rate, or mend what the refusals name."]
    if top.score() >= top.before["loss"]:
        return [f"No job is better than the base ({top.before['loss']:.4g} held out): try a lower lr, fewer steps or more data."]
    said = [s for field in axes for s in _edge(field, axes[field], chosen[top.name].get(field), top)]
    said += _longer(top)
    finished = [o for o in outcomes if o.after]
    if len(finished) > 1:
        second = sorted(o.score() for o in finished)[1]
        gap, gain = second - top.score(), top.before["loss"] - top.score()
        if gap < 0.02 * gain:
            said.append(
                f"The first two differ by {gap:.2g} nats, {gap / gain:.0%} of the gain: within what another seed changes; try the seeds 0, 1 and 2."
            )
    return said or ["The best values lie inside the grid: refine around them."]


def _edge(field: str, values: Sequence[object], value: object, top: JobResult) -> list[str]:
    """The best job is at an end of a numeric axis."""
    numbers = sorted({float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)})
    if len(numbers) < 2 or field == "seed" or not isinstance(value, (int, float)) or numbers[0] <= 0:
        return []
    ratio = numbers[-1] / numbers[-2] if value == numbers[-1] else numbers[0] / numbers[1]
    if value not in (numbers[0], numbers[-1]):
        return []
    beyond = value * ratio
    if isinstance(value, int):
        beyond = max(1, round(beyond))
    side = "highest" if value == numbers[-1] else "lowest"
    return [f"{field} = {value:g} is the {side} tried and the best: try {beyond:g}."] if beyond != value else []


def _longer(top: JobResult) -> list[str]:
    """The training loss of the best job still falls over its last third."""
    third = len(top.losses) // 3
    if third < 4:
        return []
    late, last = top.losses[-2 * third : -third], top.losses[-third:]
    spread = statistics.stdev(last) * (2 / third) ** 0.5
    fall = statistics.mean(late) - statistics.mean(last)
    return [f"The loss of {top.name} still fell by {fall:.2g} over its last third: train longer."] if fall > 2 * spread else []
