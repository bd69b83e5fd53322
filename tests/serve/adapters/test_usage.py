"""Which kept adapter goes first: the longest unused for what it costs to bring back, never one that is held."""

from __future__ import annotations

import dataclasses

from rankwise.serve.adapters.usage import Use, stalest


@dataclasses.dataclass
class Kept:
    use: Use


def kept(**uses: tuple[float, float, int]) -> dict[str, Kept]:
    return {name: Kept(Use(*use)) for name, use in uses.items()}


def anyone(name: str, entry: Kept) -> bool:
    return True


def test_the_longest_unused_goes_first() -> None:
    assert stalest(kept(old=(1.0, 2.0, 0), new=(9.0, 2.0, 0)), 10.0, anyone) == "old"


def test_of_two_unused_as_long_the_cheaper_goes_first() -> None:
    assert stalest(kept(dear=(5.0, 8.0, 0), cheap=(5.0, 1.0, 0)), 10.0, anyone) == "cheap"
    assert stalest(kept(dear=(0.0, 8.0, 0), cheap=(9.5, 1.0, 0)), 10.0, anyone) == "dear", "long enough unused, the dear one goes"


def test_of_two_just_used_the_earlier_goes_first() -> None:
    assert stalest(kept(a=(3.0, 1.0, 0), b=(4.0, 1.0, 0)), 3.0, anyone) == "a"


def test_what_is_held_or_may_not_go_stays() -> None:
    entries = kept(held=(0.0, 1.0, 1), kept=(1.0, 1.0, 0), free=(2.0, 1.0, 0))
    assert stalest(entries, 10.0, lambda name, _: name != "kept") == "free"
    assert stalest(kept(held=(0.0, 1.0, 2)), 10.0, anyone) is None is stalest({}, 10.0, anyone)


def test_what_costs_nothing_divides_by_nothing() -> None:
    assert Use(0.0, 0.0).staleness(1.0) > Use(0.0, 1.0).staleness(1.0)
