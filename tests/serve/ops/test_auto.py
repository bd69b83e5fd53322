"""The choosing operator: its table, its split of a step, what it leaves out, and what it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.serve.batch import BASE
from rankwise.serve.ops import auto
from rankwise.serve.ops.bags import Bags
from rankwise.serve.ops.base import Group, LoraPages
from rankwise.serve.ops.build import compiler
from rankwise.serve.ops.registry import make_op
from tests.serve.ops.steps import GROUPS, evaluator, gap, inputs, make_case

SHORT_BAGS = {(d, n): "bags" if n <= 8 else "grouped" for d in auto.SEGMENTS for n in auto.ROWS}


def test_each_segment_goes_to_the_choice_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of single tokens beside a prompt runs two operators, and adds up to the whole change."""
    monkeypatch.setattr(auto, "table", lambda *_: SHORT_BAGS)
    case = make_case({0: 8, 1: 9, 2: 3}, [BASE, 0, *[1] * 40, 2])
    op = make_op("auto", case.pages)
    op.begin(case.plan, case.slots)
    parts = {o.name: [(s.slot, s.start) for s in plan.segments] for o, plan in op._parts}  # type: ignore[attr-defined]
    assert parts == {"bags": [(0, 1), (2, 42)], "grouped": [(1, 2)]}
    for group in GROUPS:
        x, ys = inputs(case, group, torch.float32)
        want = evaluator(case, group, x, ys)
        op.apply(group, x, ys)
        assert gap(ys, want, [torch.zeros_like(y) for y in ys]) < 1e-5


def test_a_step_without_adapters_runs_nothing() -> None:
    case = make_case({0: 8}, [BASE] * 3)
    op = make_op("auto", case.pages)
    op.begin(case.plan, case.slots)
    assert op.shrink(GROUPS[0], torch.full((3, GROUPS[0].inp), float("nan"))) == []


def test_an_operator_that_is_wrong_here_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = Bags._change

    def off(self: Bags, group: Group, x: Tensor):  # type: ignore[no-untyped-def]
        made = right(self, group, x)
        return made and (made[0], made[1] * 1.01)

    monkeypatch.setattr(Bags, "_change", off)
    found = auto._measure([(16, (16,))], torch.float32, "cpu", ("bags", "grouped", "cat"))
    assert "bags" not in found.values()
    assert "'bags' is off by" in caplog.text


def test_measured_once_per_shapes_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [Group("a", ("a",), 24, (48,))]
    make_op("auto", LoraPages(groups, 1))
    monkeypatch.setattr(auto, "_measure", lambda *_: pytest.fail("measured again"))
    make_op("auto", LoraPages(groups, 3))


def test_the_first_stands_unless_beaten_in_the_median_and_the_best() -> None:
    assert auto._winner({"bags": [1.0, 1.0, 1.0], "grouped": [0.5, 0.5, 0.5]}) == "grouped"
    assert auto._winner({"bags": [1.0, 9.0, 9.0], "grouped": [2.0, 2.0, 2.0]}) == "bags"  # a neighbour slowed the first
    assert auto._winner({"bags": [1.0, 1.0, 1.0], "grouped": [0.95, 0.95, 0.95]}) == "bags"
    assert auto._winner({"bags": [1.0]}) == "bags"


@pytest.mark.skipif(compiler() is None, reason="no C compiler builds the native operator")
def test_native_is_used_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = LoraPages(GROUPS, 1)
    assert auto.candidates(pages, False) == ("bags", "grouped", "cat")
    monkeypatch.delenv("RANKWISE_NATIVE", raising=False)
    assert "native" not in make_op("auto", pages).ops  # type: ignore[attr-defined]
    assert "native" in make_op("auto", pages, native=True).ops  # type: ignore[attr-defined]
    monkeypatch.setenv("RANKWISE_NATIVE", "1")
    assert "native" in make_op("auto", pages).ops  # type: ignore[attr-defined]
    assert "native" not in make_op("auto", pages, native=False).ops  # type: ignore[attr-defined]
    monkeypatch.setenv("RANKWISE_NATIVE", "yes")
    with pytest.raises(OptionError, match="RANKWISE_NATIVE is 'yes'"):
        make_op("auto", pages)
    with pytest.raises(OptionError, match="a choice of the operator 'auto'"):
        make_op("bags", pages, native=True)
