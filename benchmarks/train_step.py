"""One training step beside PEFT's and the bound (frozen base: forward and gradient of the input only), interleaved.

python -m benchmarks.train_step [--rounds 9] [--tokens 1024] [--forms lora dora …]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

import rankwise as rw
from benchmarks.common import RESULTS, device, interleaved, llama, ratios, write
from rankwise.train.memory import saved_bytes

PEFT = {"lora": {}, "dora": {"use_dora": True}}


def bound(hidden: int, layers: int, dtype: torch.dtype, ids: torch.Tensor) -> tuple[Any, Callable[[], Any]]:
    model = llama(hidden, layers, dtype).requires_grad_(False).train()
    x = model.get_input_embeddings()(ids).detach()

    def step() -> None:
        e = x.clone().requires_grad_(True)
        model(inputs_embeds=e, labels=ids, use_cache=False).loss.backward()

    return model, step


def ours(hidden: int, layers: int, dtype: torch.dtype, ids: torch.Tensor, form: str) -> tuple[Any, Callable[[], Any]]:
    model = llama(hidden, layers, dtype).train()
    adapter = rw.attach(model, {"form": form, "r": 8, "alpha": 16})
    session = rw.Session(model, adapter, lr=1e-4, total_steps=10_000)

    def step() -> None:
        session.step_begin()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        (out.loss + session.penalty(out, {})).backward()
        session.step()

    return model, step


def peft(hidden: int, layers: int, dtype: torch.dtype, ids: torch.Tensor, form: str) -> tuple[Any, Callable[[], Any]]:
    import peft as library

    config = library.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **PEFT[form])
    model = library.get_peft_model(llama(hidden, layers, dtype), config).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def activations(model: Any, ids: torch.Tensor, embeds: bool = False) -> int:
    with saved_bytes(model) as saved:
        if embeds:
            e = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            model(inputs_embeds=e, labels=ids, use_cache=False)
        else:
            model(input_ids=ids, labels=ids, use_cache=False)
    return saved["bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--forms", nargs="*", default=["lora", "dora"])
    parser.add_argument("--append", action="store_true", help="add to the results that are there")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    a = parser.parse_args()
    ids = torch.randint(0, 1024, (2, a.tokens // 2), device=device())
    rows = json.loads((RESULTS / "train_step.json").read_text())["rows"] if a.append else []
    for dtype in a.dtypes:
        kind = getattr(torch, dtype)
        for form in a.forms:
            made = {"bound": bound(a.hidden, a.layers, kind, ids), f"rankwise {form}": ours(a.hidden, a.layers, kind, ids, form)}
            if form in PEFT:
                made[f"peft {form}"] = peft(a.hidden, a.layers, kind, ids, form)
            times = interleaved({n: s for n, (_, s) in made.items()}, a.rounds)
            ratio = ratios(times, "bound")
            for name, (model, _) in made.items():
                row = {
                    "dtype": dtype, "hidden": a.hidden, "layers": a.layers, "tokens": a.tokens, "what": name, "ratio to bound": ratio[name],
                    "ms": 1e3 * statistics.median(times[name]), "saved activations MB": activations(model, ids, name == "bound") / 1e6,
                }  # fmt: skip
                place = next((m.__dict__["_rankwise"] for m in model.modules() if "_rankwise" in m.__dict__), None)
                if place is not None and place.fast.product.choices:
                    row["product"] = next(iter(place.fast.product.choices.values())).why
                rows.append(row)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            del made
    write("train_step", rows)


if __name__ == "__main__":
    main()
