"""The Triton operator: the whole suite of the operators on a GPU, or under the interpreter in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.serve.ops.base import LoraPages
from rankwise.serve.ops.registry import make_op
from tests.serve.ops.steps import GROUPS

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'rankwise[triton]'"
)


@needs_triton
def test_the_suite_of_all_operators() -> None:
    """The interpreter must be chosen before the kernels are read, hence a process of its own."""
    gpu = torch.cuda.is_available()
    device = {"RANKWISE_TEST_DEVICE": "cuda"} if gpu else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("test_ops.py"))]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, env={**env, **device, "RANKWISE_TEST_OPS": "triton"})
    assert done.returncode == 0, done.stdout[-3000:]
    # the quiet report of this repository has dots only: one a test, and a line of their share
    assert sum(line.count(".") for line in done.stdout.splitlines() if re.fullmatch(r"\.+ +\[ *\d+%\]", line)) > 15, done.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_a_cpu_is_refused_in_one_sentence() -> None:
    with pytest.raises(OptionError, match="needs a GPU, or TRITON_INTERPRET=1"):
        make_op("triton", LoraPages(GROUPS, 1))


@needs_triton
def test_tables_keep_their_addresses_until_they_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured graph relies on: a step of other rows and pages under the capacity rewrites, and moves nothing."""
    from tests.serve.ops.steps import plan_of

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op = make_op("triton", LoraPages(GROUPS, 40))

    def addresses() -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in (op.pieces, op.list, op.count))  # type: ignore[attr-defined]

    op.begin(plan_of([0, 1, 2]), {0: [1], 1: [2], 2: [3]})
    first, held = addresses(), op.capacity  # type: ignore[attr-defined]
    assert op.list[:3].tolist() == [1, 2, 3]  # type: ignore[attr-defined]
    op.begin(plan_of([5, -1, 6, 7, 8]), {5: [9], 6: [8], 7: [7], 8: [6]})
    assert (addresses(), op.capacity) == (first, held)  # type: ignore[attr-defined]
    assert op.list[:4].tolist() == [9, 8, 7, 6]  # type: ignore[attr-defined]
    op.begin(plan_of(list(range(20))), {i: [i] for i in range(20)})
    assert op.capacity[0] == 32 > held[0]  # type: ignore[attr-defined]
