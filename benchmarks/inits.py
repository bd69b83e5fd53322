"""Time and peak memory of PiSSA, EVA and LoRA-GA beside PEFT's, each in a process of its own, in turn.

python -m benchmarks.inits [--rounds 3] [--hidden 512]
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.common import device, llama, write

INITS = ("pissa", "eva", "lora_ga")


def batches(n: int = 4) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    out = [torch.randint(0, 1024, (4, 128), generator=g).to(device()) for _ in range(n)]
    return [{"input_ids": x, "labels": x.clone()} for x in out]


def child(who: str, init: str, hidden: int) -> dict[str, float]:
    importlib.import_module(who)  # its time and memory are another benchmark's
    if who == "rankwise":
        importlib.import_module("rankwise.catalogue").methods()
    model = llama(hidden, 4)
    data = batches()
    model(**data[0]).loss.backward() if init == "lora_ga" else None
    model.zero_grad(set_to_none=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    (ours if who == "rankwise" else theirs)(model, init, data)
    seconds = time.perf_counter() - start
    return {"s": seconds, "peak MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def ours(model: Any, init: str, data: Any) -> None:
    import rankwise as rw

    rw.attach(model, {"init": init, "r": 8}, calibration=data)


# PEFT's EVA goes round its data until every direction has settled (tau 0.99: many minutes on a random model), so here
# it stops after its least work, two batches; ours reads the four once.
def theirs(model: Any, init: str, data: Any) -> None:
    import peft

    if init == "pissa":
        peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights="pissa"))
    elif init == "eva":
        config = peft.LoraConfig(
            r=8, target_modules="all-linear", init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.0)
        )
        net = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(net, data)
    else:
        from peft.tuners.lora import loraga

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # it takes no "all-linear" here
        config = peft.LoraConfig(r=8, target_modules=names, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

        def step() -> None:
            for b in data:
                model(**b).loss.backward()

        loraga.preprocess_loraga(model, config, step)
        peft.get_peft_model(model, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--child", nargs=2)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(child(*a.child, a.hidden)))
        return
    rows = []
    for init in INITS:
        seen: dict[str, list[dict[str, float]]] = {"rankwise": [], "peft": []}
        for _ in range(a.rounds):
            for who in seen:
                command = [sys.executable, "-m", "benchmarks.inits", "--child", who, init, "--hidden", str(a.hidden)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{who} {init}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    sys.exit(1)
                seen[who].append(json.loads(done.stdout.strip().splitlines()[-1]))
        for who, runs in seen.items():
            if runs:
                rows.append({"init": init, "what": who, **{k: statistics.median(r[k] for r in runs) for k in runs[0]}})
                print(rows[-1], flush=True)
    write("inits", rows)


if __name__ == "__main__":
    main()
