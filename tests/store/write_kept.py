"""Writes the files under ``kept/``: one adapter of every form, coded, PEFT, GGUF, and a checkpoint of a run half-way.

They were written once, by the version that ``kept/expected.json`` names, and stay as they are: ``test_kept.py`` shows that what an
earlier version wrote is read to the bit by this one.  A new form or format adds its files under another folder, and rewrites none.

    python -m tests.store.write_kept FOLDER
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise import assets
from tests.contract.cases import example, methods
from tests.models import batch_for, llama, logits, move

ROWS = [{"prompt": f"a {i}", "completion": f"b {i * 7}"} for i in range(12)]
CODECS = ["compeft", "lossless", "nf4", "ternary", {"name": "intk", "k": 8}]
RUN = dict(
    max_steps=4,
    per_device_train_batch_size=2,
    save_strategy="steps",
    save_steps=2,
    packing=False,
    max_length=32,
    learning_rate=1e-2,
)


def base(tied: bool = False) -> Any:
    return llama(layers=2, tie=tied)


def digest(adapter: Any) -> str:
    """One number for every bit of every tensor an adapter holds, names included."""
    h = hashlib.sha256()
    for name, t in sorted(adapter.tensors().items()):
        h.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        h.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def recipes() -> dict[str, dict[str, Any]]:
    """One recipe a form, and those whose files say more than the form's tensors do."""
    out = {f"form-{m.name}": {"targets": ["q_proj", "o_proj"], **example(m)} for m in methods("form") if m.name != "patch"}
    out["form-bottleneck"] = dict(example(next(m for m in methods("form") if m.name == "bottleneck")))
    out["init-pissa"] = {"form": "lora", "r": 4, "targets": ["q_proj"], "init": "pissa"}
    out["init-loftq"] = {"form": "lora", "r": 4, "targets": ["q_proj"], "init": "loftq"}
    out["router-smora"] = {"targets": ["q_proj"], **example(next(m for m in methods("router") if m.name == "smora"))}
    out["router-mixlora"] = dict(example(next(m for m in methods("router") if m.name == "mixlora")))
    return out


def attached(recipe: dict[str, Any]) -> tuple[Any, Any]:
    model = base()
    adapter = rw.attach(model, rw.Recipe(**recipe), name="kept")
    move(adapter)
    return model, adapter


def run(out: Path, resume: bool) -> Any:
    model, tokenizer = assets.load_base()
    recipe = {"form": "lora", "r": 2, "targets": ["q_proj"], "layers": [0]}
    return rw.train(model, tokenizer, ROWS, recipe, output_dir=out, resume=resume, **RUN)


def main(folder: Path) -> None:
    expected: dict[str, Any] = {"version": rw.__version__, "torch": torch.__version__, "files": {}, "checkpoint": {}}
    for name, recipe in recipes().items():
        model, adapter = attached(recipe)
        adapter.save(folder / name)
        expected["files"][name] = {"digest": digest(adapter), "logits": logits(model, batch_for(model)).flatten()[:64].tolist()}
    for codec in CODECS:
        model, adapter = attached({"form": "lora", "r": 4, "targets": ["q_proj"]})
        name = f"coded-{codec if isinstance(codec, str) else codec['name']}"
        adapter.save(folder / name, codec=codec)
        loaded = rw.load(base(), folder / name)
        expected["files"][name] = {"digest": digest(loaded)}
    for format in ("peft", "gguf", "kohya"):
        model, adapter = attached({"form": "dora" if format == "peft" else "lora", "r": 4, "targets": ["q_proj", "o_proj"]})
        name = f"format-{format}"
        adapter.export(folder / name, format=format)
        model = base()
        loaded = rw.load(model, folder / name)
        expected["files"][name] = {"digest": digest(loaded), "logits": logits(model, batch_for(model)).flatten()[:64].tolist()}
    model = base(tied=True)
    adapter = rw.attach(
        model, rw.Recipe(r=2, targets=["embed_tokens"], separate_tied=True), name="kept"
    )  # was written as untie=True
    move(adapter)
    adapter.save(folder / "tied-untie")
    first = logits(model, batch_for(model)).flatten()[:64].tolist()
    expected["files"]["tied-untie"] = {"digest": digest(adapter), "logits": first, "tied": True}
    work = folder / "run"
    done = run(work, resume=False)
    expected["checkpoint"] = {"digest": digest(done.adapter), "loss": done.metrics["train"]["train_loss"]}
    for part in ("adapter", "checkpoint-4", "checkpoint-2/tokenizer.json"):
        shutil.rmtree(work / part) if (work / part).is_dir() else (work / part).unlink()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
