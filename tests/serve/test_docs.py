"""docs/serving.md: every command runs as printed (on another port), and says what the page says."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from rankwise.serve.http.auth import Keys
from rankwise.serve.http.schemas import UNSERVED, Chat, Completion
from tests.serve.http.live import write_adapter

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("ada", "bob"), 1):
        write_adapter(tmp_path / "runs" / name, seed)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    start, *shell = [b.replace("8000", port) for b in blocks("bash")]
    (tmp_path / "notes.jsonl").write_text('{"text": "def add(a, b): return a + b"}\n' * 3)
    # the page's part on training beside serving goes on with the same server
    args = [sys.executable, "-m", "rankwise.cli.main", *start.split()[1:], "--train", "jobs", "--train-data", "."]
    child = subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert f"http://127.0.0.1:{port}" in child.stdout.readline()
        example = child.stdout.readline()
        for _ in range(400):
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                break
            time.sleep(0.05)
        for line in [example, *(line for b in shell for line in b.splitlines() if line.startswith("curl"))]:
            done = subprocess.run(
                ["bash", "-c", line.replace("curl", "curl -sS --fail-with-body", 1)], capture_output=True, text=True
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            assert '"error": {' not in done.stdout
        names: dict[str, object] = {}  # a later block goes on from an earlier one
        for code in (b.replace("8000", port) for b in blocks("python")):
            exec(compile(code, "docs/serving.md", "exec"), names)
        assert "['base', 'ada', 'bob']" in capsys.readouterr().out
    finally:
        child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 0


def test_the_key_file_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(blocks("json")[0])
    keys = Keys.read(file)
    alice = keys._caller("Bearer alice-has-a-long-key")
    assert (alice.name, alice.may("team-a-1"), alice.may("bob"), alice.may(None), alice.admin) == (
        "alice",
        True,
        False,
        False,
        False,
    )
    assert json.loads(blocks("json")[0])["keys"][0]["admin"]


def test_every_field_is_on_the_page() -> None:
    for field in {*Completion.model_fields, *Chat.model_fields} - {"messages", "user", "best_of", "prompt"}:
        assert f"`{field}`" in PAGE, field
    assert all(f"`{f}`" in PAGE for f in ("tools", "response_format", "suffix"))
    assert {"tools", "response_format", "suffix"} <= set(UNSERVED)
