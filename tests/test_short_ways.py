"""Short ways: how many calls into the package, over how many of its files, the things take that are done most often.

Where a call is one of thousands in a step, it is Python's calls that take the time, and a reader follows each of them.  The limits are
today's figures; who needs more of either says so here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import rankwise as rw
from tests.models import llama

PACKAGE = str(Path(rw.__file__).parent)


class Calls:
    """Frames of the package that ``fn`` enters: (file, function) → times."""

    def __init__(self, fn: Callable[[], object]):
        self.seen: Counter[tuple[str, str]] = Counter()
        before = sys.getprofile()
        sys.setprofile(self._see)
        try:
            fn()
        finally:
            sys.setprofile(before)

    def _see(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            self.seen[code.co_filename.removeprefix(PACKAGE + "/"), code.co_qualname] += 1

    @property
    def frames(self) -> int:
        """All of them: functions, comprehensions (before Python 3.12), and generators each time they go on."""
        return self.seen.total()

    @property
    def functions(self) -> int:
        return sum(n for (_, name), n in self.seen.items() if not name.endswith(">"))

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.seen}

    def __str__(self) -> str:
        head = f"{self.frames} frames, {self.functions} of them functions, over {len(self.files)} files: {sorted(self.files)}"
        return "\n".join([head, *(f"{n:5} {file} {name}" for (file, name), n in self.seen.most_common())])


def forward(form: str, grad: bool) -> Calls:
    """One call of one adapted linear layer, after a first that may set something up."""
    model = llama(layers=1)
    rw.attach(model, {"form": form, "r": 4, "targets": ["q_proj"]})
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 5, 32)
    with torch.set_grad_enabled(grad):
        layer(x)
        return Calls(lambda: layer(x))


def within(calls: Calls, *, frames: int, files: int, functions: int | None = None) -> None:
    assert calls.files, "nothing of the package was called: the counting does not count"
    assert calls.frames <= frames, f"more than {frames} frames: {calls}"
    assert len(calls.files) <= files, f"more than {files} files: {calls}"
    assert functions is None or calls.functions <= functions, f"more than {functions} functions: {calls}"


@pytest.mark.parametrize("grad", [True, False])
def test_the_forward_of_a_lora_layer(grad: bool) -> None:
    within(forward("lora", grad), frames=40 if grad else 35, files=7, functions=22 if grad else 21)


@pytest.mark.parametrize("grad", [True, False])
def test_the_forward_of_a_dora_layer(grad: bool) -> None:
    within(forward("dora", grad), frames=40, files=6)


def test_attaching_lora_to_one_layer() -> None:
    rw.attach(llama(layers=1), "lora")  # the first in a process registers the methods too
    model = llama(layers=1)
    within(Calls(lambda: rw.attach(model, "lora")), frames=1000, files=30)


def test_the_counting_counts() -> None:
    """Each call once, whoever makes it, and nothing of other packages."""
    model = llama(layers=1)
    adapter = rw.attach(model, {"r": 4, "targets": ["q_proj"]})
    calls = Calls(lambda: [adapter.numel() for _ in range(3)])
    assert calls.seen["adapter.py", "Adapter.numel"] == 3 and calls.functions >= 3
    assert not Calls(lambda: torch.nn.Linear(3, 3)).seen
    with pytest.raises(AssertionError, match=r"more than 2 frames: \d+ frames[\s\S]*Adapter\.numel"):
        within(calls, frames=2, files=99)
