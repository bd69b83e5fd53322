"""Devices that are processes joined by gloo: the engine over two of them, and the real ``rankwise serve --tensor-parallel 2``."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from rankwise.serve.parallel.experimental.comm import PeerLost
from rankwise.serve.parallel.experimental.processes import Processes
from rankwise.serve.simulate.drive import run_until_idle
from rankwise.serve.types import Outcome
from tests.serve import rig
from tests.serve.http.live import base, greedy, merged, write_adapter
from tests.serve.parallel.test_engine import SERVED, ask, made

PAGE = (Path(__file__).parents[3] / "docs/serving.md").read_text()
LINE = "Device 1 of 2 ended (its process ended with status -9), so the server ends"


def unreadable() -> Any:
    raise FileNotFoundError("no such base here")


@pytest.mark.slow
def test_two_processes_answer_as_the_merged_model_alone_and_end_together() -> None:
    team = Processes(rig.base_model, 2)
    try:
        server = made(team, "split")
        rig.check(ask(server, 11, SERVED), server)
    finally:
        team.close()
    assert team.processes[1].exitcode == 0 and not team.lost


def test_what_the_system_refuses_is_said_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", full)
    team = Processes(rig.base_model, 3)
    with pytest.raises(BlockingIOError, match="no more processes"):
        try:
            team.start()
        finally:
            team.close()
    assert not Path(team._folder.name).exists()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _children(pid: int) -> list[int]:
    """Processes that ``pid`` started by spawning, oldest first."""
    lines = subprocess.run(
        ["ps", "-ww", "--ppid", str(pid), "-o", "pid=,args="], capture_output=True, text=True
    ).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "spawn_main" in line]


def _ask(url: str, model: str, prompt: list[int], n: int) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": n, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()


@pytest.mark.slow
def test_the_real_server_on_two_processes(tmp_path: Path) -> None:
    """The command of docs/serving.md: each adapter's answer is its merged model's; a process that dies ends the server at once, with one line and status 1."""
    folders = {name: write_adapter(tmp_path / "runs" / name, seed) for seed, name in enumerate(("ada", "bob"), 1)}
    port = _free_port()
    line = next(line for line in PAGE.splitlines() if "--tensor-parallel" in line)
    args = [*line.replace("8000", str(port)).split()[1:], "--adapter-split", "split"]
    child = subprocess.Popen(
        [sys.executable, "-m", "rankwise.cli.main", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stderr is not None
        url = f"http://127.0.0.1:{port}"
        assert url in child.stdout.readline()
        prompt = base()[1]("def main(", add_special_tokens=False).input_ids
        for name, want in (("ada", merged((folders["ada"], 1.0))), ("bob", merged((folders["bob"], 1.0))), ("base", base()[0])):
            text = _ask(url, name, prompt, 12)["choices"][0]["text"]
            assert text == base()[1].decode(greedy(want, prompt, 12)), name
        (other,) = _children(child.pid)
        os.kill(other, signal.SIGKILL)
        start = time.monotonic()
        assert child.wait(20) == 1
        assert time.monotonic() - start < 10
        said = child.stderr.read().splitlines()
        assert [line for line in said if "rankwise:" in line] == [said[-1]] and LINE in said[-1]
    finally:
        child.kill()


@pytest.mark.soak
@pytest.mark.parametrize("sig,status", [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_the_others_go_with_the_first(sig: signal.Signals, status: int, tmp_path: Path) -> None:
    port = _free_port()
    args = ["serve", "--model", "base", "--port", str(port), "--tensor-parallel", "2"]
    child = subprocess.Popen([sys.executable, "-m", "rankwise.cli.main", *args], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and str(port) in child.stdout.readline()
    _ask(f"http://127.0.0.1:{port}", "base", [5, 6], 2)
    (other,) = _children(child.pid)
    child.send_signal(sig)
    assert child.wait(30) == status
    end = time.monotonic() + 10
    while Path(f"/proc/{other}").exists():
        assert time.monotonic() < end, "it outlives the server"
        time.sleep(0.05)


@pytest.mark.soak
def test_a_process_that_stands_still_is_given_up() -> None:
    """It answers no collective: after the time limit the step ends, and the team with it."""
    team = Processes(rig.base_model, 2, timeout=3)
    try:
        server = made(team, "split")
        os.kill(team.processes[1].pid, signal.SIGSTOP)
        run, told = rig.Run(), list[str]()
        team.when_lost(told.append)
        server.engine.submit(rig.Request("r", (3, 4), rig.Sampling(max_tokens=2)), run.events["r"].append)
        start = time.monotonic()
        run_until_idle(server.engine)
        assert run.outcome("r").outcome is Outcome.ERROR and 2 < time.monotonic() - start < 10
        assert told == [team.lost] and "lost the others in a step" in team.lost
        with pytest.raises(PeerLost, match="lost the others"):
            team.tell(1, "anything")
    finally:
        team.close()
    assert not team.processes[1].is_alive()


@pytest.mark.soak
def test_a_process_that_cannot_read_its_base_says_why() -> None:
    team = Processes(unreadable, 2)
    try:
        with pytest.raises(PeerLost, match="Device 1 of 2 ended .FileNotFoundError: no such base here."):
            made(team, "split")
    finally:
        team.close()
