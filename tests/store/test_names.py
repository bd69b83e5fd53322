"""No name is a path, and no link leads out of the folder."""

from __future__ import annotations

import itertools
import os
import random
import sys
from pathlib import Path

import pytest
from torch import nn

import rankwise as rw
from rankwise.adapter import adapters
from rankwise.errors import ArtefactError, OptionError, RankwiseError
from rankwise.store.names import check_name, open_inside
from rankwise.store.native import load_native
from rankwise.store.peft.export import read_peft
from rankwise.store.tensorfile import read_small, read_tensors

GOOD = ["default", "a", "Müller's tone v2.1", "日本語", "x_y-z.1", "run 7 (best)", "ü" * 64, "a+b=c", "100% sure", "e.g"]
SEEDS = [
    "", ".", "..", "../x", "..\\x", "a/../../b", "/etc/passwd", "//server/share", "C:\\x", "c:x", "a\0b", "a\nb", "a\tb", "\x1b[31mx",
    "%2e%2e%2fx", "%252e%252e%252f", "x%00", "․․/x", "‥", "a．．b", "．．", "／etc", "a∕b", "a⁄b", "a＼b", "x.", "x ", " x", ".x", "-rf", "~root",
    "CON", "con.txt", "NUL", "com1", "LPT9.x", "COM¹", "a" * 129, "a" * 4096, "ü" * 65, "x\u202ey", "x\u200by", "x\ufeff", "x\u2028y",
    "a:b", "a*b", "a?b", 'a"b', "a<b", "a|b", "http://x", "file:///x", "__base__", "rankwise", "x\ud800y", "…", "a..b", "x\u00a0y",
]  # fmt: skip


def hostile(count: int = 2000) -> list[str]:
    rng, out = random.Random(0), list(SEEDS)
    while len(out) < count:
        a, b = rng.choice(SEEDS), rng.choice(SEEDS)
        out.append(rng.choice([f"{a}/{b}", f"{a}\\{b}", f"x/{a}", f"{a}/", f"../{a}{b}", f"{a}\0{b}", f"{a}%2f{b}"]))
    return out


def test_good_names_pass() -> None:
    assert [check_name(n) for n in GOOD] == GOOD
    assert check_name("a" * 128)


def test_hostile_names_are_refused_everywhere(tmp_path: Path) -> None:
    """2,000 names over every entry point that takes one: nothing outside the root is opened, no other error escapes."""
    (tmp_path / "secret").write_bytes(b"x")
    root = tmp_path / "root"
    root.mkdir()
    opened: list[str] = []
    armed = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        if armed and event == "open" and isinstance(args[0], (str, bytes)):
            opened.append(os.fsdecode(args[0]))

    sys.addaudithook(hook)
    for name in hostile():
        with pytest.raises(OptionError, match="Invalid adapter name"):
            check_name(name)
        for entry in (open_inside, lambda r, n: read_small(r, n, 10), read_tensors):
            with pytest.raises((ArtefactError, FileNotFoundError)):
                entry(root, name)
    armed = False
    outside = [p for p in opened if os.path.isabs(p) and not p.startswith(str(root)) and not p.endswith((".py", ".pyc"))]
    assert not [p for p in outside if "site-packages" not in p], outside[:5]
    for thing in (None, 3, b"x", ["x"]):
        with pytest.raises(OptionError):
            check_name(thing)


def test_hostile_names_attach_and_load_nothing(tmp_path: Path) -> None:
    """The same names where an adapter is given one: refused before the model or a file is touched."""
    model = nn.Sequential(nn.Linear(4, 4))
    rw.attach(model, {"targets": ["0"], "r": 1}, name="mine").save(tmp_path / "a")
    for name in hostile():
        with pytest.raises(OptionError, match="Invalid adapter name"):
            rw.attach(model, {"targets": ["0"], "r": 1}, name=name)
        with pytest.raises(OptionError, match="Invalid adapter name"):
            rw.load(model, tmp_path / "a", name=name)
    assert [a.name for a in adapters(model).values()] == ["mine"] and os.listdir(tmp_path) == ["a"]


def test_loaders_answer_hostile_paths_with_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in hostile(300):
        for load in (load_native, lambda n: read_peft(n, {}, hub=False)):
            with pytest.raises(RankwiseError):
                load(name)


def test_links(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (root / "sub").mkdir(parents=True)
    (outside / "f").write_bytes(b"secret")
    (root / "sub" / "f").write_bytes(b"mine")
    (root / "away").symlink_to(outside / "f")
    (root / "up").symlink_to("../outside/f")
    (root / "near").symlink_to("sub/f")
    (root / "dir").symlink_to(outside)
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")
    assert read_small(root, "near", 10) == b"mine"
    for name in ("away", "up", "dir", "sub", "pipe"):
        with pytest.raises(ArtefactError):
            read_small(root, name, 10)
    with pytest.raises((ArtefactError, FileNotFoundError)):
        read_small(root, "loop", 10)
    with pytest.raises(ArtefactError, match="not a folder"):
        read_small(outside / "f", "x", 10)


def test_a_hub_snapshot_may_link_to_its_blobs(tmp_path: Path) -> None:
    entry = tmp_path / "models--a--b"
    (entry / "blobs").mkdir(parents=True)
    (entry / "snapshots" / "rev").mkdir(parents=True)
    (entry / "blobs" / "abc").write_bytes(b"data")
    (entry / "snapshots" / "rev" / "f").symlink_to("../../blobs/abc")
    assert read_small(entry / "snapshots" / "rev", "f", 10) == b"data"
    (entry / "snapshots" / "rev" / "g").symlink_to(tmp_path / "other")
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(ArtefactError, match="outside"):
        read_small(entry / "snapshots" / "rev", "g", 10)


def test_a_link_swapped_between_check_and_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacker replaces the file by a link right before it is opened: the open itself refuses."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "f").write_bytes(b"mine")
    real, swaps = os.open, itertools.count()

    def evil(path: object, *args: object, **kwargs: object) -> int:
        if path == "f" and next(swaps) == 0:
            (root / "f").unlink()
            (root / "f").symlink_to(tmp_path / "secret")
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", evil)
    with pytest.raises(ArtefactError):
        read_small(root, "f", 10)
