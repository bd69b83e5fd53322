"""The native operator's build: found, refused with a reason, cached, never loaded from a folder others can write to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.serve.ops import build
from rankwise.serve.ops.base import Group, LoraPages
from rankwise.serve.ops.registry import make_op
from tests.serve.ops.steps import GROUPS, evaluator, gap, inputs, make_case, run

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler builds the native operator")

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rankwise" / "native"


def test_built_once_and_anew_when_the_source_changes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "small.c"
    source.write_text(SOURCE)
    assert build.load(source).answer() == 42
    made = list(cache.iterdir())
    with monkeypatch.context() as m:  # a second build would need this, and fail
        m.setattr(build, "_build", lambda *_: pytest.fail("built again"))
        assert build.load(source).answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    assert build.load(source).answer() == 43
    assert len(list(cache.iterdir())) == 2 == len(made) + 1


def test_what_cannot_be_built_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int answer(void) { return }\n")
    with pytest.raises(OptionError, match="did not compile with .*error"):
        build.load(source)
    assert not list(cache.iterdir())
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(OptionError, match="needs a C compiler"):
        build.load(source)


def test_a_cache_that_others_can_write_to_is_refused(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "small.c"
    source.write_text(SOURCE)
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(OptionError, match="can be written by, other users"):
        build.load(source)


def test_what_it_does_not_take() -> None:
    with pytest.raises(OptionError, match=r"torch\.bfloat16; use 'bags'"):
        make_op("native", LoraPages(GROUPS, 1, torch.bfloat16))
    nine = Group("wide", tuple("abcdefghi"), 8, (8,) * 9)
    with pytest.raises(OptionError, match="8 modules in a group; wide has 9"):
        make_op("native", LoraPages([nine], 1))


@pytest.mark.parametrize("threads", [1, 2])
def test_all_numbers_of_rows_in_a_piece(threads: int) -> None:
    """Pieces of 1 to 8 rows are cut into 8, 4, 2 and 1; 17 rows are three pieces, on one thread or two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 2, 3, 4, 5, 6, 7, 8, 17):
            case = make_case({0: 9, 1: 8}, [0] * n + [1] * (n + 1))
            for group in GROUPS:
                x, ys = inputs(case, group, torch.float32)
                assert gap(run("native", case, group, x, ys), evaluator(case, group, x, ys), ys) < 1e-5, (n, group.name)
    finally:
        torch.set_num_threads(before)
