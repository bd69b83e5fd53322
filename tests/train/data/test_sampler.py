"""Resumed is uninterrupted, across the end of an epoch too."""

from __future__ import annotations

import json

import pytest

from rankwise.errors import ArtefactError, OptionError
from rankwise.train.data import Sampler


def stream(s: Sampler, n: int) -> list[int]:
    out: list[int] = []
    while len(out) < n:
        for i in s:
            out.append(i)
            if len(out) == n:
                break
    return out


def test_resume_at_every_step_gives_the_same_stream() -> None:
    whole = stream(Sampler(7, seed=3), 21)
    assert [sorted(whole[k : k + 7]) for k in (0, 7, 14)] == [list(range(7))] * 3 and len(
        {tuple(whole[k : k + 7]) for k in (0, 7, 14)}
    ) == 3
    for at in range(20):
        first = Sampler(7, seed=3)
        head = stream(first, at)
        second = Sampler(7, seed=3)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + stream(second, 21 - at) == whole, at


def test_epochs_depend_on_the_seed_alone() -> None:
    assert list(Sampler(50, 1, epoch=4)) == Sampler(50, 1).order(4) != Sampler(50, 2).order(4)
    assert list(Sampler(4, shuffle=False)) == [0, 1, 2, 3]
    s = Sampler(9, 1)
    stream(s, 5)
    s.set_epoch(0)
    assert s.seen == 5
    s.set_epoch(2)
    assert list(s) == Sampler(9, 1).order(2)


def test_a_state_of_other_data_is_refused() -> None:
    state = Sampler(7, 3).state_dict(seen=4)
    assert state["seen"] == 4
    for other in (Sampler(8, 3), Sampler(7, 4), Sampler(7, 3, shuffle=False)):
        with pytest.raises(ArtefactError, match="resume with the same data and seed"):
            other.load_state_dict(state)
    with pytest.raises(ArtefactError, match="damaged"):
        Sampler(7, 3).load_state_dict({**state, "seen": 9})
    for n, epoch in ((0, 0), (3, -1)):
        with pytest.raises(OptionError):
            Sampler(n, 0, epoch)
