"""``rankwise serve``: what a user gets wrong is one line and status 2, before the model is read where that can be."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import typer

import rankwise as rw
from rankwise.cli import serve as verb
from rankwise.cli.main import app, main
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.source import FolderSource
from tests.models import llama, move


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["serve", "--model", "base", *args])
    return int(left.value.code)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "0.0.0.0"], "needs --api-keys"),
        (["--host", "192.0.2.1", "--api-keys", "KEYS"], "Cannot listen on 192.0.2.1"),
        (["--adapter-split", "split"], "give --tensor-parallel N"),
        (["--tensor-parallel", "2", "--adapter-split", "both"], "No way to split adapters is called 'both'"),
        (["--tensor-parallel", "2", "--train", "jobs"], "--train works on one device"),
        (["--adapters", "nowhere"], "'nowhere' is no folder"),
        (["--adapters", "s3://x", "--adapters", "nowhere"], "'nowhere' is no folder"),
        (["--api-keys", "none.json"], "cannot be read"),
        (["--port", "70000"], "65535"),
        (["--train-data", "."], "give --train FOLDER"),
        (["--train", "/dev/null/x"], "cannot be a folder"),
        (["--train", "jobs", "--train-data", "nowhere"], "'nowhere' is no folder"),
        (["--max-num-seqs", "0"], "max-num-seqs"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_the_model_is_read(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verb, "load_text_model", lambda name: pytest.fail("the model was read"))
    args = [str(tmp_path / a) if a == "jobs" else a for a in args]
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "a", "key": "0123456789abcdef"}]}))
    assert run(*(str(keys) if a == "KEYS" else a for a in args)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_too_many_devices_are_refused_before_one_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would be a process that reads the base: ninety-eight of them take the machine down."""
    from rankwise.serve.parallel.experimental.processes import Processes

    monkeypatch.setattr(Processes, "start", lambda self: pytest.fail("processes were started"))
    assert run("--port", "0", "--tensor-parallel", "99") == 2
    err = capsys.readouterr().err
    assert "too few for 99 devices; give --tensor-parallel" in " ".join(err.split()) and "Traceback" not in err


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("--port", str(taken.getsockname()[1])) == 2
    err = capsys.readouterr().err
    assert "Address already in use; give another" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "nope"], "No policy is called 'nope'"),
        (["--policy", "merge_mode"], "it wants the engine to merge an adapter into the base's weights while others wait"),
        (["--set", "zz=3"], "has no option 'zz'"),
        (["--set", "slo"], "option=value"),
        (["--kv-tokens", "100"], "no multiple"),
        (["--op", "zz"], "No delta operator"),
        (["--name", "a:b"], "without ':'"),
    ],
    ids=str,
)
def test_what_the_engine_refuses_is_one_line_too(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args, "--port", "0") == 2
    assert re.search(re.escape(words), capsys.readouterr().err.replace("\n", " "))


def test_ends_are_of_the_generation_config_and_of_the_tokenizer() -> None:
    class Has:
        def __init__(self, **fields: Any):
            self.__dict__ = fields

    config = lambda ids: Has(generation_config=Has(eos_token_id=ids))
    assert verb._ends(config([3, 4]), Has(eos_token_id=5)) == {3, 4, 5}
    assert verb._ends(config(3), Has(eos_token_id=None)) == {3}
    assert verb._ends(config(None), Has(eos_token_id=None)) == frozenset()


@pytest.mark.parametrize(("old", "new"), verb.RENAMED.items())
@pytest.mark.parametrize("joined", [True, False])
def test_old_options_are_taken_with_one_line(
    old: str, new: str, joined: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not in --help."""
    told: list[verb.ServeOptions] = []
    monkeypatch.setattr(verb, "serve", told.append)
    main(["serve", "--model", "base", *([f"{old}=7"] if joined else [old, "7"])])
    assert getattr(told[0], new[2:].replace("-", "_")) == 7
    assert told[0] == dataclasses.replace(verb.ServeOptions(model="base"), **{new[2:].replace("-", "_"): 7})
    err = capsys.readouterr().err
    assert f"{old} is now {new}" in err and len(err.strip().splitlines()) == 1
    commands: Any = typer.main.get_command(app)
    shown = {o for p in commands.commands["serve"].params for o in p.opts}
    assert new in shown and old not in shown


def test_folders_and_uris_are_served_together_the_first_given_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copies"))
    roots = [tmp_path / n for n in ("one", "far", "two")]
    for seed, (root, names) in enumerate(zip(roots, (["a"], ["a", "b"], ["b", "c"]), strict=True)):
        for name in names:
            adapter = rw.attach(llama(), {"r": 2})
            move(adapter, seed=seed)
            adapter.save(root / name)
    loader = AdapterLoader(llama())
    source = verb._source([str(roots[0]), roots[1].as_uri(), str(roots[2])])(loader)
    assert source.names() == ["a", "b", "c"]
    for name, root in zip("abc", roots, strict=True):
        assert source.resolve(name).digest == FolderSource(root, loader).resolve(name).digest
    assert source.fetch(source.resolve("b")).manifest.name == "b"
