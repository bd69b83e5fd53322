"""Several recipes on the same base, data, order and budget of steps: quality, size, memory and time, side by side."""

from __future__ import annotations

import copy
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
from rankwise.recipe import build
from rankwise.seeds import generator
from rankwise.train.memory import account, saved_bytes
from rankwise.train.session import Session
from rankwise.train.settings import TrainSettings

if TYPE_CHECKING:
    from rankwise.recipe import Recipe

#: to which every run's gradient norm is clipped
CLIP = 1.0
Batch = dict[str, Tensor]


@dataclasses.dataclass
class Row:
    """One recipe's result.

    Args:
        name: of the recipe; ``by``: whose implementation.
        by: rankwise, or PEFT.
        before, after: the score (bits a byte or an error rate; lower is better) of the base and of the adapted model.
        trainable: parameters.
        stored_bytes: of the saved adapter.
        seconds: the median step.
        memory: bytes of a step by category.
        losses: of every step.
        recipe: its fields, where it is ours.
        note: a remark for the table.
    """

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
    """Texts as batches of whole windows that begin with BOS, none across two documents.

    Args:
        tokenizer: of transformers.
        texts: one or more documents.
        length: tokens of a window, BOS among them.
        batch: windows in a batch.
        seed: of their order.
    """
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


def settings(lr: float, steps: int) -> TrainSettings:
    """What all runs of a comparison are trained with."""
    return TrainSettings(lr=lr, steps=steps, schedule="cosine", warmup=0.1, max_grad_norm=CLIP)


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
    """Train one recipe and measure it; the model is left as it was.

    Args:
        model: the base.
        recipe: of the adapter.
        batches: taken in turn.
        score: of the model under the view in force; the lower the better.
        name: of the row and the adapter.
        steps: optimiser steps.
        lr: peak learning rate.
        before: the base's score.
        progress: called with the steps so far.
        keep: where to save the adapter; None: it is not kept.
    """
    torch.manual_seed(recipe.seed)
    adapter = attach(model, recipe, calibration=[batches[i % len(batches)] for i in range(8)], name=name)
    try:
        model.train()
        session = Session(model, adapter, **settings(lr, steps).for_session(steps))
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
            files = [p for p in Path(path).rglob("*") if p.is_file()] or [Path(path)]
            stored = sum(p.stat().st_size for p in files)
        median = statistics.median(times[1:] or times)
        return Row(name, "rankwise", before, after, adapter.numel(), stored, median, memory, losses, recipe.to_json())
    finally:
        adapter.detach()
        model.eval()


def peft_config(recipe: Recipe) -> Any:
    """The recipe as PEFT's LoraConfig; None where PEFT has no twin of it, or is not installed."""
    form, init = build("form", recipe.form or "lora"), build("init", recipe.init) if recipe.init else None
    fields = form.peft_fields
    if init is not None:  # of inits, those that PEFT has for a plain LoRA
        fields = init.peft_fields if fields == {} and form.scaling() is None else None
    more = (recipe.budget, recipe.router, recipe.losses, recipe.parts, recipe.modules_to_save, recipe.layers, recipe.rank_pattern)
    if fields is None or any(more) or recipe.alpha_pattern or recipe.exclude or recipe.dropout:
        return None
    if _named(recipe.optimizer) != "adamw" or recipe.policy not in ("alpha/r", "alpha/sqrt_r"):
        return None
    try:
        import peft
    except ImportError:
        return None
    alpha: Any = recipe.alpha if recipe.alpha is not None else recipe.r  # PEFT divides any number, though its hint says int
    scaled = recipe.policy == "alpha/sqrt_r"
    return peft.LoraConfig(r=recipe.r, lora_alpha=alpha, target_modules=recipe.targets, use_rslora=scaled, **fields)


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
    """The same recipe by HF PEFT on a copy of the model, or None where PEFT has no twin of it or is not installed.

    Args:
        model, recipe, batches, score, name, steps, lr, before: as of :func:`run_recipe`.
    """
    config = peft_config(recipe)
    if config is None:
        return None
    import peft

    torch.manual_seed(recipe.seed)
    net = peft.get_peft_model(copy.deepcopy(model), config).train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, settings(lr, steps).lr_lambda(steps))
    losses, times = [], []
    for n in range(steps):
        start = time.perf_counter()
        out = net(**batches[n % len(batches)])
        out.loss.backward()
        nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
        losses.append(float(out.loss.detach()))
    with saved_bytes(net) as saved:
        net(**batches[0])
    trainable = sum(p.numel() for p in params)
    base = sum(p.numel() * p.element_size() for p in net.parameters() if not p.requires_grad)
    sizes = {"adapter": 4 * trainable, "gradients": 4 * trainable, "optimiser": 8 * trainable}
    memory = {"base": base, **sizes, "saved activations": saved["bytes"]}
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
    """Every recipe in turn; returns rows and the refusals, one sentence each.

    Args:
        model: the base; left as it was.
        recipes: name → (recipe, peak learning rate).
        batches: taken in turn, the same for all.
        score: of the model under the view in force; the lower the better.
        steps: optimiser steps of each.
        with_peft: run PEFT's twin too, where it has one.
        keep: a folder for the adapters; None: they are not kept.
        progress: called with a recipe's name and its steps so far.
    """
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
