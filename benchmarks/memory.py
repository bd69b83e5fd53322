"""Bytes of one training step by category, for each form; what autograd keeps is counted, not guessed.

python -m benchmarks.memory
"""

from __future__ import annotations

import torch

import rankwise as rw
from benchmarks.common import device, llama, write
from rankwise.train.memory import account

RECIPES = {
    "lora": {"form": "lora", "r": 8}, "dora": {"form": "dora", "r": 8}, "paca": {"form": "paca", "r": 8}, "mos": {"form": "mos", "r": 4},
    "lora_xs": {"form": "lora_xs", "r": 8}, "full adamw": {"form": "full", "targets": "all-linear"},
    "full galore r=64": {"form": "full", "targets": "all-linear", "optimizer": {"name": "galore", "r": 64}},
    "full lisa γ=1": {"form": "full", "targets": "all-linear", "budget": {"name": "lisa", "blocks": 1}},
}  # fmt: skip


def main() -> None:
    ids = torch.randint(0, 1024, (2, 256), device=device())
    batch = {"input_ids": ids, "labels": ids}
    rows = []
    for name, recipe in RECIPES.items():
        model = llama(512, 4).train()
        adapter = rw.attach(model, recipe)
        session = rw.Session(model, adapter, lr=1e-4, total_steps=10)
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
        session.step_begin()
        got = account(session, batch)
        rows.append({"what": name, **{f"{k} MB": v / 1e6 for k, v in got.items()}, "total MB": sum(got.values()) / 1e6})
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    write("memory", rows)


if __name__ == "__main__":
    main()
