"""Time of merging beside PEFT's ``add_weighted_adapter`` and mergekit, in turn in one process; peak memory; and at scale.

python -m benchmarks.merge [--rounds 3] [--hidden 512]
python -m benchmarks.merge --memory [--hidden 512]
python -m benchmarks.merge --scale [--layers 16] [--adapters 100] [--hidden 2048] [--folder DIR]

The first: 2 and 8 adapters of rank 16 on a 4-layer model, from adapters in a model to a merged one in it on both sides;
``ties`` and ``dare`` are PEFT's ``ties_svd`` and ``dare_linear_svd`` (ours are always of ΔW).  Where mergekit is installed,
also two whole models of that size by the same YAML, from folders to a folder.  The second: each in a process of its own,
for the peak.  The third: adapters of a 1B-shaped model, written as PEFT folders one by one and merged from there, one site
at a time; the peak is beside what the process held before, and beside the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved, llama, ratios, write

R = 16
METHODS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "svd": ("svd", {}, "svd", {}),
    "ties": ("ties", {"density": 0.2}, "ties_svd", {"density": 0.2}),
    "linear": ("linear", {}, "linear", {}),
    "cat": ("cat", {}, "cat", {}),
    "dare": ("dare_linear", {"density": 0.5}, "dare_linear_svd", {"density": 0.5}),
}
SCALE: dict[str, dict[str, Any]] = {"ties": {}, "knots": {"rank": R}, "lego": {}}


def clock() -> Any:
    """The process's own time on one thread, which a busy neighbour does not count in; else the wall's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def peak() -> float:
    """MB, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now() -> float:
    """MB held at this moment."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def child(who: str, method: str, count: int, hidden: int) -> dict[str, float]:
    model = llama(hidden, 4)
    run = (ours if who == "rankwise" else theirs)(model, method, count)
    before = peak()
    start = time.perf_counter()
    run()
    return {"s": time.perf_counter() - start, "peak MB": peak() - before}


def ours(model: Any, method: str, count: int) -> Any:
    """Adapters of a model into one more, as PEFT does it: their values, the merged value, attached."""
    import rankwise as rw
    from rankwise.merge import attach_state, merge_states

    g = torch.Generator().manual_seed(0)
    adapters = [rw.attach(model, {"r": R, "alpha": R, "targets": "all-linear"}, name=f"a{i}", activate=not i) for i in range(count)]
    with torch.no_grad():
        for a in adapters:
            for p in a.trainable_parameters():
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    name, options, _, _ = METHODS[method]
    toy = torch.nn.Sequential(torch.nn.Linear(64, 64))
    one = rw.attach(toy, {"r": 2, "targets": "all-linear"}).lower()
    attach_state(toy, merge_states([one, one], None, name, **options))  # imports
    turn = itertools.count()
    return lambda: attach_state(
        model, merge_states([a.lower() for a in adapters], None, name, **options), name=f"merged{next(turn)}", activate=False
    )


def theirs(model: Any, method: str, count: int) -> Any:
    import peft

    names = [f"a{i}" for i in range(count)]
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", init_lora_weights=False)
    net = peft.get_peft_model(model, config, adapter_name=names[0])
    for n in names[1:]:
        net.add_adapter(n, config)
    _, _, kind, options = METHODS[method]
    turn = itertools.count()
    return lambda: net.add_weighted_adapter(names, [1 / count] * count, f"merged{next(turn)}", combination_type=kind, **options)


def beside_peft(rounds: int, hidden: int) -> list[dict[str, Any]]:
    """Medians, and the median over rounds of our time over theirs."""
    rows = []
    for count in (2, 8):
        for method in METHODS:
            mine, other = llama(hidden, 4), llama(hidden, 4)
            merge, add = ours(mine, method, count), theirs(other, method, count)

            times = interleaved({"rankwise": merge, "peft": add}, rounds, warm=0, clock=clock())
            share = ratios(times, "peft")
            for who, found in times.items():
                rows.append(
                    {
                        "method": method,
                        "sources": f"{count} adapters",
                        "what": who,
                        "s": statistics.median(found),
                        "over peft": share[who],
                    }
                )
                print(rows[-1], flush=True)
    return rows


#: mergekit's name → what its YAML says beside the models; a base and two models, or two
WHOLE: dict[str, dict[str, Any]] = {
    "linear": {}, "task_arithmetic": {"base": True}, "ties": {"base": True, "density": 0.2}, "dare_ties": {"base": True, "density": 0.5},
    "sce": {"base": True, "weightless": True}, "slerp": {"t": 0.3}, "karcher": {"weightless": True},
}  # fmt: skip


def beside_mergekit(rounds: int, hidden: int) -> list[dict[str, Any]]:
    """The same file given to both; the result's largest difference is told."""
    if importlib.util.find_spec("mergekit") is None:
        print("mergekit is not installed: left out")
        return []
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from rankwise.merge.mergekit import merge_yaml

    rows = []
    with tempfile.TemporaryDirectory() as spare:
        where = {}
        for i, n in enumerate(("base", "a", "b")):
            net = llama(hidden, 4)
            g = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for p in net.parameters():
                    p.add_(0.01 * i * torch.randn(p.shape, generator=g))
            net.save_pretrained(Path(spare) / n)
            where[n] = str(Path(spare) / n)
        turn = itertools.count()
        new = lambda who: str(Path(spare) / f"{who}{next(turn)}")
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        for method, extra in WHOLE.items():
            data = _yaml(method, dict(extra), where)
            runs = {
                "rankwise": lambda d=data: merge_yaml(d, new("r")),
                "mergekit": lambda d=data: run_merge(MergeConfiguration.model_validate(d), new("m"), options),
            }
            times = interleaved(runs, rounds, warm=1, clock=clock())
            share = ratios(times, "mergekit")
            for who, found in times.items():
                rows.append(
                    {
                        "method": method,
                        "sources": "2 whole models",
                        "what": who,
                        "s": statistics.median(found),
                        "over mergekit": share[who],
                    }
                )
                print(rows[-1], flush=True)
    return rows


def _yaml(method: str, extra: dict[str, Any], where: dict[str, str]) -> dict[str, Any]:
    own = {} if extra.pop("weightless", False) or "t" in extra else {"weight": 0.5}
    own |= {"density": extra.pop("density")} if "density" in extra else {}
    names = ["b"] if "t" in extra else ["a", "b"]
    base = {"base_model": where["base"]} if extra.pop("base", False) else {"base_model": where["a"]} if "t" in extra else {}
    models = [{"model": where[n]} | ({"parameters": own} if own else {}) for n in names]
    return {"merge_method": method, "models": models, "dtype": "float32", **base} | ({"parameters": extra} if extra else {})


# --- at scale --------------------------------------------------------------------------------------------------
def folders(where: Path, adapters: int, layers: int, hidden: int) -> list[str]:
    """Random rank-16 adapters of a 1B-shaped Llama (32 heads, 8 of keys; an MLP of 4·hidden), as PEFT folders."""
    from safetensors.torch import save_file

    kv, mlp = hidden // 4, 4 * hidden
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}  # fmt: skip
    out = []
    for t in range(adapters):
        path = where / f"{t:03d}"
        out.append(str(path))
        if path.exists():
            continue
        path.mkdir(parents=True)
        g = torch.Generator().manual_seed(t)
        tensors = {}
        for layer in range(layers):
            for n, (o, i) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{n}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(R, i, generator=g) / i**0.5
                tensors[f"{key}.lora_B.weight"] = 0.01 * torch.randn(o, R, generator=g)
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": sorted(n.split(".")[1] for n in shapes)}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return out


def scale_child(method: str, paths: list[str]) -> dict[str, float]:
    from rankwise.delta import AdapterState, LowRank
    from rankwise.merge import merge_states
    from rankwise.merge.engine.folders import open_folders

    merge_states([AdapterState({"x": LowRank(torch.randn(R, 64), torch.randn(64, R))})] * 2, None, method)  # imports
    start = time.perf_counter()
    sources = open_folders(paths, verify=False)
    opened = time.perf_counter() - start
    before = now()
    start = time.perf_counter()
    state = merge_states(sources, None, method, **SCALE[method])
    took = time.perf_counter() - start
    result = sum(t.numel() * t.element_size() for t in state.tensors().values()) / 2**20
    inputs = sum(Path(p, "adapter_model.safetensors").stat().st_size for p in paths) / 2**20
    site = max(sum(t.numel() * 8 for t in s.sites[n].tensors().values()) for s in sources[:1] for n in s.sites) * len(paths) / 2**20
    return {
        "open s": opened,
        "s": took,
        "peak MB": peak() - before,
        "result MB": result,
        "inputs MB": inputs,
        "largest site MB": site,
    }


def run(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.merge", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(arguments[:4])}: {done.stderr.strip().splitlines()[-1]}", flush=True)
        sys.exit(1)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def scale(a: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as spare:
        where = Path(a.folder or spare)
        folders(where, a.adapters, a.layers, a.hidden)
        rows = []
        for method in SCALE:
            found = run("--scale-child", method, "--folder", str(where), "--adapters", str(a.adapters))
            rows.append({"method": method, "adapters": a.adapters, "layers": a.layers, "hidden": a.hidden, **found})
            print(rows[-1], flush=True)
    write("merge_scale", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--folder", help="where the adapters of --scale are kept; default: a temporary one")
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--scale-child")
    a = parser.parse_args()
    a.hidden = a.hidden or (2048 if a.scale else 512)
    if a.child:
        print(json.dumps(child(a.child[0], a.child[1], int(a.child[2]), a.hidden)))
    elif a.scale_child:
        print(json.dumps(scale_child(a.scale_child, [str(Path(a.folder, f"{t:03d}")) for t in range(a.adapters)])))
    elif a.scale:
        scale(a)
    elif a.memory:
        rows = []
        for method in METHODS:
            for count in (2, 8):
                for who in ("rankwise", "peft"):
                    found = run("--child", who, method, str(count), "--hidden", str(a.hidden))
                    rows.append({"method": method, "adapters": count, "what": who, **found})
                    print(rows[-1], flush=True)
        write("merge_memory", rows)
    else:
        note = "Time is the process's own, on one thread." if torch.get_num_threads() == 1 else "Time is the wall's."
        write("merge", [*beside_peft(a.rounds, a.hidden), *beside_mergekit(a.rounds, a.hidden)], note=note)


if __name__ == "__main__":
    main()
