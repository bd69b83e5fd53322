"""Old or new, never mixed: every failing call, every kill, every power cut, many writers at once."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import ArtefactError
from rankwise.store import atomic
from rankwise.store.atomic import Files, is_temporary, locked, replace_file, sweep, write_folder

OLD, NEW = b"old" * 100, b"new" * 5000


class Failing(Files):
    """The k-th call fails with ``code``; counts them."""

    def __init__(self, k: int, code: int):
        self.k, self.code, self.calls = k, code, 0

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in (
            "create",
            "write",
            "sync",
            "rename",
            "exchange",
            "sync_folder",
            "mkdir",
            "link",
            "listdir",
            "unlink",
            "rmdir",
        ):
            return method

        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == self.k:
                raise OSError(self.code, os.strerror(self.code), str(args[0]))
            return method(*args)

        return call


def folder_write(path: Path, data: bytes, files: Files = atomic.FILES) -> None:
    write_folder(path, {"one": data, "two": data[::-1]}, files=files)


def folder_read(path: Path) -> bytes:
    one, two = (path / "one").read_bytes(), (path / "two").read_bytes()
    assert one == two[::-1], "mixed"
    return one


WAYS: dict[str, tuple[Callable[..., None], Callable[[Path], bytes]]] = {
    "file": (lambda p, d, files=atomic.FILES: replace_file(p, d, files=files), lambda p: p.read_bytes()),
    "folder": (folder_write, folder_read),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_every_call_may_fail(way: str, code: int, tmp_path: Path) -> None:
    write, read = WAYS[way]
    for k in itertools.count(1):
        root = tmp_path / str(k)
        target = root / "x"
        write(target, OLD)
        if way == "folder":
            (target / "mine").write_text("kept")
        files = Failing(k, code)
        try:
            write(target, NEW, files)
            done = True
        except ArtefactError as e:
            assert str(target) in str(e) and os.strerror(code) in str(e)
            done = False
        assert read(target) in ((NEW,) if done else (OLD, NEW))
        assert way == "file" or (target / "mine").read_text() == "kept"
        visible = [n for n in os.listdir(root) if not is_temporary(n)]
        assert visible == ["x"]
        write(target, OLD)  # the next start sweeps whatever was left
        assert os.listdir(root) == ["x"] and read(target) == OLD
        if files.calls < k:
            assert done and k > 6
            break


def test_a_system_without_exchange(tmp_path: Path) -> None:
    class Without(Files):
        def exchange(self, a: Path, b: Path) -> None:
            raise OSError(errno.ENOSYS, "no", str(b))

    folder_write(tmp_path / "x", OLD)
    folder_write(tmp_path / "x", NEW, Without())
    assert folder_read(tmp_path / "x") == NEW and os.listdir(tmp_path) == ["x"]

    class Dies(Without):  # between the two renames
        def rename(self, source: Path, target: Path) -> None:
            if target.name == "x":
                raise KeyboardInterrupt
            super().rename(source, target)

    with pytest.raises(KeyboardInterrupt):
        folder_write(tmp_path / "x", OLD, Dies())
    assert not (tmp_path / "x").exists()
    sweep(tmp_path)
    assert folder_read(tmp_path / "x") == NEW and os.listdir(tmp_path) == ["x"]


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "f", b"x")
        write_folder(tmp_path / "d", {"f": b"x"})
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750


def test_a_file_in_the_way_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(ArtefactError, match="file stands"):
        write_folder(tmp_path / "x", {"f": b"x"})
    assert (tmp_path / "x").read_bytes() == b"mine"


def test_leftovers_of_the_living_stay(tmp_path: Path) -> None:
    host = atomic._HOST
    alive = tmp_path / f".rankwise-tmp.{host}.{os.getppid()}.abc"
    elsewhere = tmp_path / ".rankwise-tmp.01234567.1.abc"
    dead = tmp_path / f".rankwise-tmp.{host}.4194399.abc"
    for p in (alive, elsewhere, dead):
        p.write_bytes(b"")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, elsewhere.name])
    os.utime(elsewhere, (0, 0))
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [alive.name]


# --- power cuts -----------------------------------------------------------------------------------------------
Change = dict[str, int | None]  # name → inode, or None where the name goes
State = tuple[list[dict[str, int]], list[bytes], list[tuple[int, Change]]]


class Drive(Files):
    """A disk in memory.  A cut keeps the synced bytes of each file, and any subset of the unsynced changes of names."""

    def __init__(self) -> None:
        self.files: list[list[bytes]] = []  # file inode → [volatile, durable]
        self.names: list[dict[str, int]] = [{}]  # folder inode → its entries as the system shows them; folders are ~inode
        self.durable: list[dict[str, int]] = [{}]
        self.pending: list[tuple[int, Change]] = []
        self.states: list[State] = []

    def _at(self, path: Path) -> int:
        here = ~0
        for part in path.parts[1:]:
            here = self.names[~here][part]
        return here

    def _change(self, folder: Path, change: Change) -> None:
        n = ~self._at(folder)
        _enter(self.names[n], change)
        self.pending.append((n, change))
        self._record()

    def _record(self) -> None:
        self.states.append((list(map(dict, self.durable)), [d for _, d in self.files], list(self.pending)))

    def create(self, path: Path) -> int:
        self.files.append([b"", b""])
        self._change(path.parent, {path.name: len(self.files) - 1})
        return len(self.files) - 1

    def write(self, fd: int, data: memoryview) -> int:
        part = bytes(data[:7000])  # a short write
        self.files[fd][0] += part
        self._record()
        return len(part)

    def sync(self, fd: int) -> None:
        self.files[fd][1] = self.files[fd][0]
        self._record()

    def close(self, fd: int) -> None:
        pass

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent
        self._change(target.parent, {source.name: None, target.name: self._at(source)})

    def exchange(self, a: Path, b: Path) -> None:
        assert a.parent == b.parent
        self._change(a.parent, {a.name: self._at(b), b.name: self._at(a)})

    def sync_folder(self, path: Path) -> None:
        n = ~self._at(path)
        for m, change in self.pending:
            if m == n:
                _enter(self.durable[n], change)
        self.pending = [(m, c) for m, c in self.pending if m != n]
        self._record()

    def mkdir(self, path: Path) -> None:
        self.names.append({})
        self.durable.append({})
        self._change(path.parent, {path.name: ~(len(self.names) - 1)})

    def link(self, source: Path, target: Path) -> None:
        self._change(target.parent, {target.name: self._at(source)})

    def unlink(self, path: Path) -> None:
        self._change(path.parent, {path.name: None})

    rmdir = unlink

    def listdir(self, path: Path) -> list[str]:
        return sorted(self.names[~self._at(path)])

    def kind(self, path: Path) -> str:
        try:
            return "folder" if self._at(path) < 0 else "file"
        except KeyError:
            return ""

    def after_cut(self) -> Iterator[tuple[list[dict[str, int]], list[bytes]]]:
        """Every state a cut could leave: at each moment, each subset of the unsynced changes (in order)."""
        for durable, contents, pending in self.states:
            for keep in itertools.product((False, True), repeat=len(pending)):
                folders = list(map(dict, durable))
                for (n, change), kept in zip(pending, keep):
                    if kept:
                        _enter(folders[n], change)
                yield folders, contents


def _enter(entries: dict[str, int], change: Change) -> None:
    for name, inode in change.items():
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


def seen(folders: list[dict[str, int]], contents: list[bytes], way: str) -> bytes | None:
    """What a reader finds under the name: the version, None where there is nothing, or b"MIXED"."""
    entry = folders[0].get("x")
    if entry is None:
        return None
    if way == "file":
        return contents[entry]
    inside = folders[~entry]
    if set(inside) != {"one", "two"}:
        return b"MIXED"
    one, two = contents[inside["one"]], contents[inside["two"]]
    return one if one == two[::-1] else b"MIXED"


def histories(way: str, drive_of: Callable[[], Drive]) -> Iterator[tuple[Drive, int, list[bytes]]]:
    """All sequences of up to three writes: (drive, states before the last write, versions)."""
    write, _ = WAYS[way]
    for n in (1, 2, 3):
        drive, versions, before = drive_of(), [], 0
        for i in range(n):
            before = len(drive.states)
            versions.append(bytes([65 + i]) * 20_000)
            write(Path("/x"), versions[-1], drive)
        yield drive, before, versions


def violations(way: str, drive_of: Callable[[], Drive] = Drive) -> int:
    bad = 0
    for drive, before, versions in histories(way, drive_of):
        old = versions[-2] if len(versions) > 1 else None
        moments = drive.states
        drive.states = moments[before:]
        bad += sum(seen(t, c, way) not in (old, versions[-1]) for t, c in drive.after_cut())
        drive.states = moments[-1:]  # the call has returned: it must last
        bad += sum(seen(t, c, way) != versions[-1] for t, c in drive.after_cut())
    return bad


@pytest.fixture
def no_realpath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "realpath", lambda p, **_: os.fspath(p))


@pytest.mark.parametrize("way", WAYS)
def test_power_cuts(way: str, no_realpath: None) -> None:
    assert violations(way) == 0


class NoSync(Drive):
    def sync(self, fd: int) -> None:
        self._record()


class NoFolderSync(Drive):
    def sync_folder(self, path: Path) -> None:
        self._record()


class NoInnerSync(Drive):
    def sync_folder(self, path: Path) -> None:
        if path != Path("/"):
            return
        super().sync_folder(path)


@pytest.mark.parametrize("way,fault", [("file", NoSync), ("file", NoFolderSync), ("folder", NoSync), ("folder", NoInnerSync)])
def test_the_model_sees_a_missing_sync(way: str, fault: type[Drive], no_realpath: None) -> None:
    assert violations(way, fault) > 0


# --- kills ----------------------------------------------------------------------------------------------------
def _version(way: str, i: int) -> bytes:
    return f"{i:06d}|".encode() * 400


def _writer(way: str, target: Path, start: int) -> None:
    write, _ = WAYS[way]
    for i in itertools.count(start):
        write(target, _version(way, i))


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_moment(way: str, tmp_path: Path) -> None:
    kill_many(way, tmp_path, kills=100)


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_moment_long(way: str, tmp_path: Path) -> None:
    kill_many(way, tmp_path, kills=2500)


def kill_many(way: str, root: Path, kills: int) -> None:
    """Fork a writer, kill it after a random while, look: a whole version, never an older one than before."""
    write, read = WAYS[way]
    rng, target, last = random.Random(0), root / "x", 0
    write(target, _version(way, 0))
    began = time.monotonic()
    for _ in range(5):
        write(target, _version(way, 0))
    one = (time.monotonic() - began) / 5
    for _ in range(kills):
        ready, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(go, b".")
                _writer(way, target, last + 1)
            finally:
                os._exit(1)
        os.read(ready, 1)  # the clock starts when the child does
        os.close(ready)
        os.close(go)
        time.sleep(rng.uniform(0.0, min(4 * one, 0.1)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        data = read(target)
        now = int(data[:6])
        assert data == _version(way, now), "mixed or short"
        assert now >= last, "lost"
        assert [n for n in os.listdir(root) if not is_temporary(n)] == ["x"]
        last = now
    assert last > kills // 4, "the writers hardly ran"
    write(target, _version(way, last + 1))
    assert os.listdir(root) == ["x"]


# --- crowds ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
def test_eight_writers_eight_readers(way: str, tmp_path: Path) -> None:
    crowd(way, tmp_path, seconds=1.0)


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_eight_writers_eight_readers_long(way: str, tmp_path: Path) -> None:
    crowd(way, tmp_path, seconds=60.0)


def crowd(way: str, root: Path, seconds: float) -> None:
    write, _ = WAYS[way]
    target, counter, lock = root / "x", itertools.count(1), root / "lock"
    lock.mkdir()
    write(target, _version(way, 0))
    end, faults, reads = time.monotonic() + seconds, [], itertools.count()

    def read() -> bytes:
        if way == "file":
            return target.read_bytes()
        fd = os.open(target, os.O_RDONLY)  # one version of the folder, even while it is exchanged
        try:
            parts = []
            for name in ("one", "two"):
                with open(name, "rb", opener=lambda n, flags: os.open(n, flags, dir_fd=fd)) as f:
                    parts.append(f.read())
        finally:
            os.close(fd)
        assert parts[0] == parts[1][::-1]
        return parts[0]

    def writer() -> None:
        while time.monotonic() < end:
            with locked(lock):
                write(target, _version(way, next(counter)))

    def reader() -> None:
        last = 0
        while time.monotonic() < end:
            try:
                data = read()
            except FileNotFoundError:  # the version that was opened has been replaced and removed
                continue
            now = int(data[:6])
            if data != _version(way, now) or now < last:
                faults.append((last, now))
            last = now
            next(reads)

    def guard(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=guard, args=(f,)) for f in [writer] * 8 + [reader] * 8]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults, faults[:3]
    assert next(counter) > 5 and next(reads) > 20
    assert sorted(os.listdir(root)) == ["lock", "x"]


def test_unlocked_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    def run(i: int) -> None:
        for k in range(10):
            folder_write(tmp_path / "x", f"{i}-{k} ".encode() * 50)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    folder_read(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
