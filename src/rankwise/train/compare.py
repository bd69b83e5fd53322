"""Several recipes on the same base, data, order and budget of steps: quality, size, memory and time, side by side."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.adapter import attach
from rankwise.errors import DataError, RankwiseError
from rankwise.seeds import generator
from rankwise.train.memory import account, saved_bytes
from rankwise.train.session import Session

if TYPE_CHECKING:
    from rankwise.recipe import Recipe

Batch = dict[str, Tensor]


@dataclasses.dataclass
class Row:
    """One recipe's result.  ``score`` is bits a byte (lower is better) or the error rate; ``seconds`` the median step."""

    name: str
    by: str
    before: float
    after: float
    trainable: int
    stored_bytes: int
    seconds: float
    memory: dict[str, int]
    losses: list[float]
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


def windows(tokenizer: Any, texts: Sequence[str], length: int, batch: int, seed: int = 0) -> list[Batch]:
    """Texts as batches of whole windows that begin with BOS, none across two documents; order drawn from the seed."""
    rows = []
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows += [[first, *ids[i : i + length - 1]] for i in range(0, len(ids) - length + 2, length - 1)]
    if len(rows) < batch:
        raise DataError(
            f"The texts hold {len(rows)} windows of {length} tokens, fewer than one batch of {batch}; give more text, or shorter windows."
        )
    order = torch.randperm(len(rows), generator=generator(seed, "windows")).tolist()
    ids_ = torch.tensor([rows[i] for i in order])
    return [{"input_ids": b, "labels": b.clone()} for b in ids_.split(batch) if len(b) == batch]


def run_recipe(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Batch],
    score: Callable[[nn.Module], float],
    *,
    name: str,
    steps: int,
    lr: float,
    before: float,
    progress: Callable[[int], None] = lambda n: None,
    keep: Path | None = None,
) -> Row:
    """Train one recipe for ``steps`` and measure it; the model is left as it was. ``keep``: save the adapter there."""
    torch.manual_seed(recipe.seed)
    adapter = attach(model, recipe, calibration=[batches[i % len(batches)] for i in range(8)], name=name)
    try:
        model.train()
        session = Session(model, adapter, lr=lr, total_steps=steps, schedule="cosine", warmup=0.1, max_grad_norm=1.0)
        losses, times = [], []
        for n in range(steps):
            batch = batches[n % len(batches)]
            start = time.perf_counter()
            session.step_begin()
            out = model(**batch)
            (out.loss + session.penalty(out, batch)).backward()
            session.step()
            times.append(time.perf_counter() - start)
            losses.append(float(out.loss.detach()))
            progress(n + 1)
        session.close()
        memory = account(session, batches[0])
        model.eval()
        after = score(model)
        with tempfile.TemporaryDirectory() as folder:
            path = adapter.save(keep or Path(folder) / "adapter")
            stored = (
                sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())
                if Path(path).is_dir()
                else Path(path).stat().st_size
            )
        return Row(
            name,
            "rankwise",
            before,
            after,
            adapter.numel(),
            stored,
            statistics.median(times[1:] or times),
            memory,
            losses,
            recipe.to_json(),
        )
    finally:
        adapter.detach()
        model.eval()


#: what PEFT calls the parts that both have: (form, init) → fields of its LoraConfig
PEFT_TWINS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("lora", None): {},
    ("rslora", None): {},
    ("dora", None): {"use_dora": True},
    ("lora", "pissa"): {"init_lora_weights": "pissa"},
    ("lora", "olora"): {"init_lora_weights": "olora"},
}


def run_peft(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Batch],
    score: Callable[[nn.Module], float],
    *,
    name: str,
    steps: int,
    lr: float,
    before: float,
) -> Row | None:
    """The same recipe by HF PEFT on a copy of the model, or None where PEFT has no twin of it or is not installed."""
    import copy

    twin = PEFT_TWINS.get((_named(recipe.form) or "lora", _named(recipe.init)))
    plain = recipe.budget is None and recipe.router is None and not recipe.losses and _named(recipe.optimizer) == "adamw"
    plain = plain and not (recipe.parts or recipe.modules_to_save or recipe.layers or recipe.rank_pattern or recipe.alpha_pattern)
    plain = plain and not (recipe.exclude or recipe.dropout) and recipe.policy in ("alpha/r", "alpha/sqrt_r")
    if twin is None or not plain:
        return None
    try:
        import peft
    except ImportError:
        return None
    torch.manual_seed(recipe.seed)
    alpha: Any = recipe.alpha if recipe.alpha is not None else recipe.r  # PEFT divides any number, though its hint says int
    config = peft.LoraConfig(
        r=recipe.r, lora_alpha=alpha, target_modules=recipe.targets, use_rslora=recipe.policy == "alpha/sqrt_r", **twin
    )
    net = peft.get_peft_model(copy.deepcopy(model), config).train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    from rankwise.train.session import factor

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor("cosine", 0.1, steps))
    losses, times = [], []
    for n in range(steps):
        start = time.perf_counter()
        out = net(**batches[n % len(batches)])
        out.loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
        losses.append(float(out.loss.detach()))
    with saved_bytes(net) as saved:
        net(**batches[0])
    trainable = sum(p.numel() for p in params)
    memory = {
        "base": sum(p.numel() * p.element_size() for p in net.parameters() if not p.requires_grad),
        "adapter": 4 * trainable, "gradients": 4 * trainable, "optimiser": 8 * trainable, "saved activations": saved["bytes"],
    }  # fmt: skip
    net.eval()
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        stored = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))
    return Row(name, "PEFT", before, score(net), trainable, stored, statistics.median(times[1:] or times), memory, losses)


def _named(value: Any) -> str | None:
    return value["name"] if isinstance(value, dict) else value


def compare(
    model: nn.Module,
    recipes: Mapping[str, tuple[Recipe, float]],
    batches: Sequence[Batch],
    score: Callable[[nn.Module], float],
    *,
    steps: int,
    with_peft: bool = True,
    keep: Path | None = None,
    progress: Callable[[str, int], None] = lambda name, n: None,
) -> tuple[list[Row], list[str]]:
    """Every recipe (with its learning rate) in turn; returns rows and the refusals, one sentence each."""
    before = score(model.eval())
    rows: list[Row] = []
    refused: list[str] = []
    for name, (recipe, lr) in recipes.items():
        tell = lambda n, name=name: progress(name, n)
        try:
            where = keep / name if keep is not None else None
            rows.append(
                run_recipe(model, recipe, batches, score, name=name, steps=steps, lr=lr, before=before, progress=tell, keep=where)
            )
        except RankwiseError as error:
            refused.append(f"{name}: {error}")
            continue
        if with_peft:
            twin = run_peft(model, recipe, batches, score, name=name, steps=steps, lr=lr, before=before)
            if twin is not None:
                rows.append(twin)
    return rows, refused


def best(rows: Iterable[Row]) -> Row:
    """The row of ours with the lowest score."""
    return min((r for r in rows if r.by == "rankwise"), key=lambda r: r.after)
