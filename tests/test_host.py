"""Workers of OpenMP: what a serving process keeps of them, counted where the system lists a process's threads."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise import host

pytestmark = pytest.mark.skipif(host._pause() is None, reason="only GNU's OpenMP holds workers for each thread")

COUNT = """
import threading, torch
from pathlib import Path
from rankwise.host import Helpers, release_workers

torch.set_num_threads(3)

def product():
    x = torch.ones(400, 400)
    return float((x @ x + torch.ones(400, 400).exp()).sum())

def workers():
    "Threads of the process that Python did not start."
    return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()

before = workers()
first = product()
"""


def run(rest: str) -> list[str]:
    made = subprocess.run(
        [sys.executable, "-c", COUNT + rest], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert made.returncode == 0, made.stderr
    return made.stdout.split()


def test_released_workers_are_gone_and_come_back_with_the_next_product() -> None:
    out = run("print(workers() - before, release_workers(), workers() - before, product() == first, workers() - before)")
    assert out == ["2", "True", "0", "True", "2"]


def test_helpers_keep_no_workers_whatever_they_do() -> None:
    rest = """
pool = Helpers(2, "helper")
release_workers()
print(pool.submit(product).result() == first, workers() - before)
try:
    pool.submit(lambda: (product(), 1 / 0)).result()
except ZeroDivisionError:
    print("raised", workers() - before)
"""
    assert run(rest) == ["True", "0", "raised", "0"]


def test_a_started_engine_has_the_only_workers() -> None:
    """The thread that made the server ran products too, and another that reads an adapter."""
    rest = """
from tests.serve.rig import server
from rankwise.serve.types import Finished, Request, Sampling
made = server(4, 64, 16, "auto", False, "fcfs")
digest = made.cache.resolve("one").digest
made.cache.fetch(digest).result()
release_workers()
before = workers()  # whatever reading a model has started
product()
assert workers() - before == 2
made.engine.start()
made.cache._threads.submit(product).result()
print(workers() - before)
done = threading.Event()
def seen(event):
    if isinstance(event, Finished):
        print(event.outcome.value)
        done.set()
made.engine.call(product)  # the engine's own: its steps here are too small to need any
made.engine.submit(Request("r", (3, 4, 5), Sampling(max_tokens=4, ignore_eos=True), digest), seen)
assert done.wait(60)
print(workers() - before)
made.engine.stop()
"""
    assert run(rest) == ["0", "length", "2"]


def test_a_forked_process_lets_them_be() -> None:
    """What libgomp knows of the pool came along, its threads did not: asked to end them it would wait for ever."""
    rest = """
import os, signal
child = os.fork()
if not child:
    signal.alarm(20)
    other = threading.Thread(target=product)
    other.start()
    print(release_workers(), flush=True)
    other.join()
    os._exit(0)
print(os.waitpid(child, 0)[1], release_workers())
"""
    assert run(rest) == ["False", "0", "True"]


def test_a_mapped_file_of_any_name_is_no_hindrance(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.so"
    with open(name, "wb") as f:
        f.write(b"0" * 4096)
    with open(name, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ):
        host._pause.cache_clear()
        assert host._pause() is not None
