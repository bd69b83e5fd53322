"""Damaged and hostile files: one error, nothing run, nothing fetched, nothing hung."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import re
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankwise.store
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import ArtefactError
from rankwise.sites import find_sites
from rankwise.store.native import FILE, load_native, load_state, rebuild_state, save_state
from rankwise.store.peft.export import export_peft, read_peft
from rankwise.store.tensorfile import read_tensors
from tests.store.test_native import states
from tests.store.test_tensorfile import same

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.up, self.down = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3), nn.Linear(4, 6), nn.Linear(6, 4)


def toy_state(i: int) -> AdapterState:
    g = torch.Generator().manual_seed(i)
    shapes = {"embed": (4, 5), "conv": (4, 12), "up": (6, 4), "down": (4, 6)}
    names = list(shapes)[: 1 + i % 4]
    sites = {
        n: LowRank(
            torch.randn(1 + i % 3, shapes[n][1], generator=g), torch.randn(shapes[n][0], 1 + i % 3, generator=g), 0.5 * (1 + i % 3)
        )
        for n in names
    }
    full = {"down.weight": torch.randn(4, 6, generator=g), "down.bias": torch.randn(4, generator=g)} if i % 4 < 3 and i % 2 else {}
    return AdapterState(sites, full)


Case = tuple[dict[str, bytes], Callable[[Path], Any], Any]


def corpus(root: Path) -> list[Case]:
    """20 sound artefacts: (files, loader, what it must give)."""
    out: list[Case] = []
    for name, state in states().items():
        save_state(root / name, state)
        files = {FILE: (root / name / FILE).read_bytes()}
        out.append((files, lambda p: _flat(load_state(p)), _flat(state)))
    sites = find_sites(Toy())
    specs = {n: s.spec for n, s in sites.items()}
    for i in range(11):
        export_peft(root / f"p{i}", toy_state(i), sites)
        files = {n: (root / f"p{i}" / n).read_bytes() for n in (WEIGHTS, CONFIG)}
        out.append((files, lambda p: _flat(read_peft(p, specs, hub=False)[0]), _flat(read_peft(root / f"p{i}", specs)[0])))
    assert len(out) == 20
    return out


def _flat(state: AdapterState) -> dict[str, torch.Tensor]:
    out = {f"{n}|{k}": t for n, d in state.sites.items() for k, t in d.tensors().items()}
    out |= {f"{n}|scale": torch.tensor(float(getattr(d, "scale", 1.0))) for n, d in state.sites.items()}
    return out | {f"full|{k}": t for k, t in state.full.items()}


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One of a dozen sorts of damage."""
    kind, b = rng.randrange(14), bytearray(data)
    n = int.from_bytes(data[:8], "little") if len(data) > 8 and data[8:9] == b"{" else 0
    at = rng.randrange(len(b))
    if kind <= 2:
        b[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del b[at:]
    elif kind == 4:
        b[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif kind == 5:
        del b[at : at + rng.randrange(1, 40)]
    elif kind == 6:  # splice with another artefact
        b[at:] = other[rng.randrange(len(other)) :]
    elif kind == 7 and n:  # a length that lies
        b[:8] = rng.choice([0, 1, n - 1, n + 1, len(b), 1 << 24, 1 << 40, (1 << 64) - 1]).to_bytes(8, "little")
    elif kind == 8:
        b += rng.randbytes(rng.randrange(1, 9))
    elif kind == 9:
        i, j = sorted((at, rng.randrange(len(b))))
        b[i:j] = bytes(j - i)
    elif n or data[:1] == b"{":
        text = data[8 : 8 + n] if n else data
        text = rewrite(text, rng)
        b = bytearray((len(text).to_bytes(8, "little") + text + data[8 + n :]) if n else text)
    return bytes(b)


def rewrite(text: bytes, rng: random.Random) -> bytes:
    """Damage to a JSON text that leaves it JSON more often than not."""
    kind = rng.randrange(8)
    if kind == 0:
        return re.sub(
            rb"\d+",
            lambda m: rng.choice([m[0], b"-1", b"0", b"4611686018427387904", b"1e3", m[0] + b"0"]),
            text,
            count=rng.randrange(1, 9),
        )
    if kind == 1:
        return text.replace(b"F32", rng.choice([b"F16", b"I32", b"F64", b"C64", b"XYZ"]), rng.randrange(1, 3))
    if kind == 2:
        keys = re.findall(rb'"[^"\\]+"', text) or [b'"x"']
        return text.replace(rng.choice(keys), rng.choice([*keys, b'"zzz"', b'"a"', b"null", b"[]", b"{}", b"3"]), 1)
    if kind == 3:
        return b"{" + text.strip()[1:-1] + b"," + text.strip()[1:]
    if kind == 4:
        return b'{"__metadata__":' + b"[" * rng.choice([10, 5000]) + b"," + text[1:]
    if kind == 5:
        return text.replace(b"{", b'{"x":1,', rng.randrange(1, 3))
    if kind == 6:
        return text.replace(b"true", b"1").replace(b"false", b'"no"').replace(b"null", b"[[]]")
    return text[::-1]


def campaign(count: int, root: Path, seed: int, limit: float) -> tuple[int, int]:
    """(refused, loaded equal); anything else fails."""
    rng, cases = random.Random(seed), corpus(root)
    events: list[str] = []
    armed = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if armed and event.startswith(
            ("socket.", "subprocess.", "os.exec", "os.system", "os.fork", "exec", "compile", "pickle.", "import")
        ):
            events.append(event)

    place, refused, equal, began = root / "mutant", 0, 0, time.monotonic()
    place.mkdir()
    for files, load, _ in cases:  # warm: whatever is imported late is imported now
        _write(place, files)
        load(place)
    sys.addaudithook(hook)
    for i in range(count):
        files, load, want = cases[rng.randrange(20)]
        other = rng.choice(list(cases[rng.randrange(20)][0].values()))
        name = rng.choice(list(files))
        damaged = {**files, name: mutate(files[name], other, rng)}
        _write(place, damaged)
        one = time.thread_time()
        try:
            got = load(place)
        except ArtefactError:
            refused += 1
        else:
            assert same(got, want), f"mutant {i} of seed {seed} loaded as something else"
            equal += 1
        assert time.thread_time() - one < 1.0, f"mutant {i} of seed {seed} took too long"
        if time.monotonic() - began > limit:
            break
    armed = False
    assert not events, set(events)
    return refused, equal


def _write(place: Path, files: dict[str, bytes]) -> None:
    for name in (FILE, WEIGHTS, CONFIG):
        if name in files:
            (place / name).write_bytes(files[name])
        elif (place / name).exists():
            (place / name).unlink()


def test_mutants(tmp_path: Path) -> None:
    gc.collect()
    refused, equal = campaign(5000, tmp_path, seed=0, limit=200.0)
    assert refused + equal == 5000, "not all were tried in 200 s"
    assert refused > 1000 and equal > 10  # equal: only notes were touched, or nothing


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_mutants_long(tmp_path: Path) -> None:
    refused, equal = campaign(200_000, tmp_path, seed=1, limit=3000.0)
    assert refused + equal == 200_000


# --- pickles --------------------------------------------------------------------------------------------------
MARK = Path("ran")


class Gadget:
    def __init__(self, call: Callable[..., Any], *args: Any):
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


def gadgets(mark: str) -> list[bytes]:
    """60 pickles that would leave a file behind: direct, nested, reflective, built late, cut after the call."""
    shell, code = f"touch {mark}", f"open({mark!r},'w').close()"
    calls = [
        Gadget(os.system, shell), Gadget(eval, code), Gadget(exec, code), Gadget(os.popen, shell), Gadget(open, mark, "w"),
        Gadget(__import__("subprocess").Popen, ["touch", mark]),
    ]  # fmt: skip
    out: list[bytes] = []
    for call in calls:
        for protocol in (0, 2, 4, 5):
            out.append(pickle.dumps(call, protocol))
        out += [pickle.dumps({"state_dict": [call]}, 4), pickle.dumps(call, 2)[:-1], b"\0" * 8 + pickle.dumps(call, 4)]
        out += [
            len(p := pickle.dumps(call, 2)).to_bytes(8, "little") + p,
            b"{" + pickle.dumps(call, 0),
            pickle.dumps((1, [2, {3: call}]), 3),
        ]
    return out


def test_no_gadget_runs_under_any_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mark, events, armed = str(tmp_path / "ran"), [], True
    pickles = gadgets(mark)
    assert len(pickles) == 60
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["up"]}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if armed and event in ("pickle.find_class", "os.system", "subprocess.Popen", "exec"):
            events.append(event)

    sys.addaudithook(hook)
    for i, data in enumerate(pickles):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in (FILE, WEIGHTS, "adapter_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "x"):
            (folder / name).write_bytes(data)
        with zipfile.ZipFile(folder / "zip.safetensors", "w") as z:
            z.writestr("archive/data.pkl", data)
        for name in os.listdir(folder):
            with pytest.raises(ArtefactError):
                read_tensors(folder, name)
        (folder / CONFIG).write_text(json.dumps(config))
        for load in (load_native, lambda p: read_peft(p, {}, hub=False)):
            with pytest.raises(ArtefactError):
                load(folder)
        (folder / WEIGHTS).unlink()
        with pytest.raises(ArtefactError, match="run code"):
            read_peft(folder, {}, hub=False)
        (folder / CONFIG).write_bytes(data)
        with pytest.raises(ArtefactError):
            read_peft(folder, {}, hub=False)
    armed = False
    assert not events and not os.path.exists(mark)


def test_the_gadgets_are_live(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Gadget(open, str(mark), "w"))).close()
    assert mark.exists()


#: a pipe between a server and the processes it started itself: no file and no client gives it a byte
OWN_PIPE = ("serve/parallel/experimental/messages.py", {"import pickle", "return pickle.loads(source.recv_bytes())"})


def scan(root: Path) -> list[str]:
    """Lines of the library that could run what a file says."""
    word = re.compile(
        r"\bimport pickle\b|\bfrom pickle\b|\bpickle\.loads?\(|\bdill\b|\bcloudpickle\b|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(|shell=True|os\.system\("
        r"|torch\.load\((?!.*weights_only=True)|allow_pickle=True|joblib\.load|trust_remote_code=True"
    )
    found = []
    for path in sorted(root.rglob("*.py")):
        for n, line in enumerate(path.read_text().splitlines(), 1):
            if word.search(line.split("#")[0]) and "``" not in line:
                found.append(f"{path.relative_to(root)}:{n}: {line.strip()}")
    return found


def test_nothing_in_the_library_can_unpickle(tmp_path: Path) -> None:
    root = Path(rankwise.store.__file__).parent.parent
    file, lines = OWN_PIPE
    elsewhere = [f for f in scan(root) if not (f.startswith(f"{file}:") and f.split(": ", 1)[1] in lines)]
    assert elsewhere == []
    (tmp_path / "x.py").write_text("import pickle\nt = torch.load(p)\ntorch.load(p, weights_only=True)\nmodel.eval()\neval(s)\n")
    assert len(scan(tmp_path)) == 3


# --- words in headers -----------------------------------------------------------------------------------------
CANARIES = [
    "{{7*7}}",
    "${7*7}",
    "%(x)s",
    "{0.__class__}",
    "__import__('os').system('touch ran')",
    "$(touch ran)",
    "`touch ran`",
    "<script>",
    "!!python/object:os.system",
    "%s%n",
    "\u202e",
]


@pytest.mark.parametrize("text", CANARIES)
def test_templates_stay_text(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    state = AdapterState({text: states()["lowrank"].sites["a.b.c"]}, {}, {text: [text]})
    save_state(tmp_path / "a", state, {"recipe": {text: text}, "provenance": {"x": text}})
    tensors, head = load_native(tmp_path / "a")
    assert head["recipe"] == {text: text} and dict(rebuild_state(tensors, head).meta) == {text: [text]}
    config = {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": [text],
        "base_model_name_or_path": text,
        "task_type": text,
        "what": text,
    }
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    (tmp_path / "a" / WEIGHTS).write_bytes(b"")
    with pytest.raises(ArtefactError):
        read_peft(tmp_path / "a", {}, hub=False)
    assert os.listdir(tmp_path) == ["a"] and "49" not in capfd.readouterr().out
