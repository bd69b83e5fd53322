"""Old keywords and attributes of merges and of decoding are taken with one deprecation line, and give what the new ones do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rankwise.catalogue import make
from rankwise.decoding.model import DecodingModel, Fusion
from rankwise.delta.lowrank import LowRank
from rankwise.delta.state import AdapterState
from rankwise.merge import Evaluator, Merge, merge_states
from rankwise.merge.judge.model_soups import Models
from rankwise.merge.methods import interpolation, quality_diversity
from tests.models import llama


class Norm(Evaluator):
    """Scores a value by its norm, with no model at all."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1), score=lambda model: 0.0)

    def score(self, state: AdapterState, split: str | None = None) -> float:
        return float(state.norm())


def states() -> list[AdapterState]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return [AdapterState({"a": LowRank(draw(2, 5), draw(4, 2), 1.0)}) for _ in range(3)]


def test_merge_states_takes_oracle() -> None:
    new = merge_states(states(), method="greedy_soup", evaluator=Norm())
    with pytest.warns(DeprecationWarning, match=r"The argument .oracle. is now .evaluator.") as said:
        old = merge_states(states(), method="greedy_soup", oracle=Norm())
    assert len(said) == 1 and said[0].filename == __file__
    assert torch.equal(old.sites["a"].dense(), new.sites["a"].dense()) and old.meta["weights"] == new.meta["weights"]


def test_both_spellings_at_once_are_refused() -> None:
    with pytest.raises(TypeError, match="'evaluator' twice"):
        merge_states(states(), method="greedy_soup", oracle=Norm(), evaluator=Norm())


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (interpolation.sweep, states()[:2]),
        (interpolation.path, states()[:1]),
        (interpolation.scored, states()[:1]),
        (quality_diversity.frontier, states()[:2]),
    ],
)
def test_functions_that_score_take_oracle(function: Any, given: list[AdapterState]) -> None:
    names = ("first", "second") if function is interpolation.sweep else ("quality", "diversity") if len(given) == 2 else ("state",)
    with pytest.warns(DeprecationWarning, match="oracle"):
        old = function(oracle=Norm(), **dict(zip(names, given, strict=True)))
    assert old == function(Norm(), *given)


def test_models_take_oracle() -> None:
    judge = Norm()
    with pytest.warns(DeprecationWarning, match="oracle"):
        assert Models(oracle=judge, folders=["a"], load=lambda f: judge.model).evaluator is judge  # type: ignore[call-arg]


def test_a_merge_that_says_needs_oracle() -> None:
    with pytest.warns(DeprecationWarning, match="needs_oracle is now .*needs_evaluator"):

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Asks(Merge):
            @property
            def needs_oracle(self) -> bool:
                return True

    assert Asks().needs_evaluator
    with pytest.warns(DeprecationWarning, match="needs_evaluator"):
        assert not make("merge", "cat").needs_oracle


def test_fusion_takes_voices() -> None:
    one = {"base": DecodingModel(llama())}
    with pytest.warns(DeprecationWarning, match="voices"):
        fusion = Fusion(voices=one, terms=[])  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="models"):
        assert fusion.voices is fusion.models
