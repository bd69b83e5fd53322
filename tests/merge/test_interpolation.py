"""Interpolation: exact ends, affine, the first source for what is missing; two tasks traded; the recipes' reductions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankwise import catalogue
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import MergeError, OptionError
from rankwise.merge import merge_states
from rankwise.merge.judge.evaluator import Evaluator
from rankwise.merge.methods.interpolation import GRID, between, fusing, path, ratatouille, sweep
from tests.merge.models import Net, net_batch, net_value
from tests.merge.tools import dense, source


def test_ends_are_exact_and_the_line_is_straight() -> None:
    a, b = source(0), source(1)
    assert torch.allclose(dense(between(a, b, 1.0)), dense(a), atol=1e-6)
    assert torch.allclose(dense(between(a, b, 0.0)), dense(b), atol=1e-6)
    for lam in (-0.5, 0.3, 1.5):
        assert torch.allclose(dense(between(a, b, lam)), lam * dense(a) + (1 - lam) * dense(b), atol=1e-5)


def test_what_is_missing_is_the_first_ones() -> None:
    a, b = source(0), source(1)
    part = AdapterState({"x": b.sites["x"]})
    got = merge_states([a, part, b], [0.5, 0.3, 0.2], "interpolation")
    assert torch.allclose(dense(got, "y"), 0.8 * dense(a, "y") + 0.2 * dense(b, "y"), atol=1e-5)
    assert torch.allclose(dense(got), 0.5 * dense(a) + 0.5 * dense(b), atol=1e-5)
    assert got.meta["errors"]["x"] < 1e-6 < 0.1 < got.meta["errors"]["y"]  # it departs from the sum with zeros, and says so
    behind = merge_states([part, a], [0.25, 0.75], "interpolation")
    assert torch.allclose(dense(behind, "y"), 0.75 * dense(a, "y"), atol=1e-5)  # the first lacks it too: zero


def test_weights_must_sum_to_one() -> None:
    a, b = source(0), source(1)
    with pytest.raises(OptionError, match="sum to one; they sum to 1.5"):
        merge_states([a, b], [1.0, 0.5], "interpolation")
    assert catalogue.find("merge", "interpolation").reference == "014"


def test_the_middle_beats_each_specialist_on_the_others_task() -> None:
    """Two tasks on one trunk: each adapter is a step down its own task's gradient, here the middle serves both."""
    net, tasks = Net(), {"one": net_batch(1, 64), "two": net_batch(2, 64)}
    special = {}
    for name, batch in tasks.items():
        net.zero_grad()
        net(**batch).loss.backward()
        special[name] = AdapterState(
            {
                n: LowRank(-2.0 * torch.eye(m.in_features), m.weight.grad.clone()).to_lowrank(rank=4)[0]
                for n, m in net.named_children()
            }
        )
    evaluator = Evaluator(net, {n: (lambda m, b=b: m(**b).loss.item()) for n, b in tasks.items()})
    points = {p.lam: p.scores for p in sweep(evaluator, special["one"], special["two"])}
    assert tuple(points) == GRID
    assert points[1.0]["one"] == pytest.approx(evaluator.score(special["one"], "one"), abs=1e-6)
    assert points[0.4]["two"] < points[1.0]["two"] and points[0.6]["one"] < points[0.0]["one"]
    base = evaluator.score(AdapterState({}), "one")
    way = path(evaluator, special["one"], (0.0, 0.75, 1.0))
    assert way[0].scores["one"] == pytest.approx(base, abs=1e-6) and way[1].scores["one"] < base


def test_recipes_reduce_to_ordinary_fine_tuning() -> None:
    calls: list[AdapterState] = []

    def finetune(start: AdapterState) -> AdapterState:
        """Adds the same step wherever it starts."""
        calls.append(start)
        step = net_value(7)
        return start + step

    base, a, b = AdapterState({}), net_value(0), net_value(1)
    ordinary = finetune(base).sites["inner"].dense()
    assert torch.allclose(ratatouille([base], finetune).sites["inner"].dense(), ordinary, atol=1e-6)
    assert torch.allclose(fusing([base], finetune).sites["inner"].dense(), ordinary, atol=1e-6)
    calls.clear()
    one = ratatouille([a, b], finetune)
    assert calls == [a, b]
    calls.clear()
    two = fusing([a, b], finetune)
    assert len(calls) == 1
    mean = (a.sites["inner"].dense() + b.sites["inner"].dense()) / 2
    assert torch.allclose(calls[0].sites["inner"].dense(), mean, atol=1e-6)
    assert torch.allclose(one.sites["inner"].dense(), two.sites["inner"].dense(), atol=1e-5)  # with a step that is the same
    with pytest.raises(MergeError, match="no auxiliary"):
        fusing([], finetune)


def test_share_is_lambda_between_two() -> None:
    a, b = source(0), source(1)
    for lam in (0.0, 0.3, 1.0):
        got = merge_states([a, b], None, "interpolation", share=lam)
        assert torch.equal(dense(got), dense(merge_states([a, b], [lam, 1 - lam], "interpolation")))
        assert torch.allclose(dense(got), lam * dense(a) + (1 - lam) * dense(b), atol=1e-6)
    with pytest.raises(OptionError, match="uses no weights"):
        merge_states([a, b], [0.5, 0.5], "interpolation", share=0.3)
    with pytest.raises(OptionError, match="between two sources; the merge 'interpolation' got 3"):
        merge_states([a, b, a], None, "interpolation", share=0.3)


def test_whole_models_take_what_they_lack_from_the_first(tmp_path: Path) -> None:
    """Three sources of which the second lacks a norm: its part is the first one's, and the coefficients still sum to one."""
    from rankwise.merge.checkpoints import merge_checkpoints
    from tests.merge.test_checkpoints import folder, whole

    n = "model.norm.weight"
    every = [folder(tmp_path / str(i), i + 1) for i in range(3)]
    lacking = shutil.copytree(every[1], tmp_path / "lacking")
    save_file({k: t for k, t in whole(every[1]).items() if k != n}, lacking / "model.safetensors", {"format": "pt"})
    merge_checkpoints([every[0], lacking, every[2]], tmp_path / "out", "interpolation", [0.5, 0.3, 0.2])
    a, b, c = (whole(p) for p in every)
    for k, t in whole(tmp_path / "out").items():
        assert torch.allclose(t, 0.5 * a[k] + 0.3 * (a if k == n else b)[k] + 0.2 * c[k], atol=1e-6), k
    with pytest.raises(MergeError, match=r"lacking, the first source, has no 'model\.norm\.weight'"):
        merge_checkpoints([lacking, every[0]], tmp_path / "no", "interpolation")
    merge_checkpoints(every[:2], tmp_path / "share", "interpolation", share=0.25)
    assert all(torch.allclose(t, 0.25 * a[k] + 0.75 * b[k], atol=1e-6) for k, t in whole(tmp_path / "share").items())
