"""``rankwise train --server`` against a real server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli.train_server import Client
from tests.cli.tools import call
from tests.serve.http.live import wait
from tests.serve.http.test_fine_tuning import TEXTS, running


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tmp_path_factory.mktemp("server")) as (address, _):
        yield address


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "say it twice: ", "completion": t}) for t in TEXTS))
    return str(path)


def test_it_trains_there_and_says_the_name(url: str, data: str, capsys: Any) -> None:
    args = ["train", "--server", url, "--data", data, "--name", "twice", "--form", "dora", "--set", "form.r=2", "--lr", "0.01"]
    code, text, err = call(capsys, *args, "--steps", "4")
    assert code == 0, err
    assert text.strip() == f"served as twice (version 1) at {url}"
    code, text, err = call(capsys, *args, "--epochs", "2", "--batch", "2", "--json")
    job = json.loads(text)
    assert code == 0 and not err and (job["step"], job["version"], job["status"]) == (3, 2, "succeeded")
    assert job["recipe"] == {"form": "dora", "r": 2} and job["hyperparameters"]["learning_rate_multiplier"] == 10


WRONG = [
    (["--name", "x", "--out", "here"], "--out means nothing with --server"),
    (["--name", "x", "--arg", "fp16=true"], "--arg means nothing with --server"),
    ([], "--server needs --name"),
    (["--name", "x", "--stage", "dpo"], "--stage is pt or sft"),
    (["--name", "x", "--stage", "pt"], "learns whole texts"),
    (["--name", "X Y"], "The server refuses it (400): suffix"),
    (["--name", "x", "--form", "full"], "'full'"),
    (["--name", "x", "--model", "other"], "The server refuses it (400): model is"),
    (["--name", "x", "--set", "dropout=0.1"], "dropout"),
    (["--name", "x", "--max-length", "3"], "The server refuses it (400)"),
    (["--name", "x", "--set", "targets=nothing_there"], "did not succeed: "),
]


@pytest.mark.parametrize(("args", "says"), WRONG)
def test_mistakes_are_one_line(args: list[str], says: str, url: str, data: str, capsys: Any) -> None:
    code, text, err = call(capsys, "train", "--server", url, "--data", data, *args)
    last = [line for line in err.splitlines() if line.startswith("rankwise:")]
    assert code == 2 and len(last) == 1 and says in last[0] and not text, err


def test_where_no_server_is(data: str, capsys: Any) -> None:
    for url, says in (("http://127.0.0.1:9", "No rankwise server answers at"), ("nowhere", "is no address")):
        code, _, err = call(capsys, "train", "--server", url, "--data", data, "--name", "x")
        assert code == 2 and says in err
    for args, says in ((["--out", "x"], "--model is missing"), (["--model", "base"], "--out is missing")):
        code, _, err = call(capsys, "train", "--data", data, *args)
        assert code == 2 and says in err
    code, _, err = call(capsys, "train", "--data", data, "--model", "base", "--out", "x", "--name", "y")
    assert code == 2 and "--name" in err


class Process:
    """``rankwise serve --train`` as a user starts it."""

    def __init__(self, home: Path):
        args = [sys.executable, "-m", "rankwise.cli.main", "serve", "--model", "base", "--train", str(home), "--port", "0"]
        self.child = subprocess.Popen([*args, "--kv-tokens", "1024", "--step-seconds", "0.1"], stdout=subprocess.PIPE, text=True)
        assert self.child.stdout is not None
        self.url = next(line for line in self.child.stdout if " at http://" in line).split()[-1]
        wait(self.ready)  # the port is open before the engine has started

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return answer.status == 200
        except urllib.error.HTTPError:
            return False

    def end(self, how: int) -> None:
        self.child.send_signal(how)
        self.child.wait(30)
        assert self.child.stdout is not None
        self.child.stdout.close()


def test_a_served_job_outlives_a_killed_server(data: str, tmp_path: Path, capsys: Any) -> None:
    process = Process(tmp_path / "jobs")
    try:
        args = ["train", "--server", process.url, "--data", data, "--set", "form.r=2"]
        code, text, err = call(capsys, *args, "--name", "first", "--steps", "3")
        assert code == 0 and f"at {process.url}" in text, err
        client = Client(process.url)
        rows = [{"prompt": "say it twice: ", "completion": t} for t in TEXTS]
        body = {"model": "base", "suffix": "second", "training_data": rows, "steps": 400, "checkpoint_every": 1}
        job = client.call("POST", "/fine_tuning/jobs", body)["id"]
        wait(lambda: client.call("GET", f"/fine_tuning/jobs/{job}")["step"] >= 3)
    finally:
        process.end(signal.SIGKILL)
    process = Process(tmp_path / "jobs")
    try:
        client = Client(process.url)
        jobs = client.call("GET", "/fine_tuning/jobs")["data"]
        assert [(j["suffix"], j["status"]) for j in jobs[1:]] == [("first", "succeeded")]
        assert (
            client.call("POST", "/completions", {"model": "first", "prompt": "say", "max_tokens": 2})["usage"]["completion_tokens"]
            == 2
        )
        events = lambda: [e["message"] for e in client.call("GET", f"/fine_tuning/jobs/{job}/events?since=0")["data"]]
        wait(lambda: any("goes on after step" in m for m in events()))
        client.call("POST", f"/fine_tuning/jobs/{job}/cancel")
        wait(lambda: client.call("GET", f"/fine_tuning/jobs/{job}")["status"] == "cancelled")
    finally:
        process.end(signal.SIGTERM)
    assert process.child.returncode == 0
