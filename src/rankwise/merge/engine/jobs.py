"""The tensors of a merged model as jobs, run in turn while their shards are written: only the tensor at hand is held."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import MergeError, Option, OptionError
from rankwise.merge.engine.stack import TensorStack
from rankwise.store import tensorfile
from rankwise.store.atomic import write_folder

if TYPE_CHECKING:
    from rankwise.merge.engine.base import Merge
    from rankwise.merge.engine.model_folder import Checkpoint

Read = Callable[[], Tensor]
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}


@dataclasses.dataclass(frozen=True)
class TensorJob:
    """One tensor of the result; ``rule`` None: it is the first source's, as it is.

    ``sources`` and ``base`` are read when the job is run; ``on`` is "changes" (from ``base``) or "weights".

    Args:
        name: in the result.
        shape: of the result.
        dtype: of the result.
        sources: readers; None where a source lacks it.
        weights: one a source.
        rule: the merge, or None.
        on: "changes" or "weights".
        base: its reader; None: there is no base.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[Read | None, ...]
    weights: tuple[float, ...]
    rule: Merge | None
    on: str = "weights"
    base: Read | None = None


@dataclasses.dataclass
class CheckpointReport:
    """What a merge did, by tensor: ``errors`` ‖merged − Σ w·x‖/‖Σ w·x‖, ``moved`` ‖result − base‖/‖base‖ where there is one.

    ``weights``: those used, one a source or by tensor; ``score``: of a soup, what it was chosen by; ``search``: of options, every place
    and its scores.

    Args:
        path: the folder written.
        method: the merge.
        errors: by tensor.
        moved: by tensor; empty without a base.
        copied: tensors taken over unmerged.
        changed: whether any bit differs from the base.
        weights: those used.
        score: of a soup.
        search: of options.
    """

    path: Path
    method: str
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    moved: dict[str, float] = dataclasses.field(default_factory=dict)
    copied: list[str] = dataclasses.field(default_factory=list)
    changed: bool = False
    weights: Any = None
    score: dict[str, Any] = dataclasses.field(default_factory=dict)
    search: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a model is stored: ``dtype`` (None: each tensor's own), and the bytes of one file at the most."""

    dtype: torch.dtype | None = None
    bytes: int = 5 * 10**9


def write(
    jobs: Sequence[TensorJob],
    out: str | Path,
    template: Checkpoint,
    changes: Mapping[str, Any],
    shards: Shards,
    *,
    method: str,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> CheckpointReport:
    """Run the jobs while their shards are written; config and tokenizer are ``template``'s, with ``changes`` in the config.

    Args:
        jobs: the result's tensors.
        out: a new or empty folder.
        template: whose config and tokenizer go along.
        changes: keys of the config that differ.
        shards: dtype and size of the files.
        method: for the report.
        seed: of random draws.
        force: keep a result that equals its base.
        progress: called with each tensor's name when it is done.
    """
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OptionError(f"{path} exists and is not an empty folder; give a new one.")
    report = CheckpointReport(path, method)
    dtype = shards.dtype
    kept = [dataclasses.replace(j, dtype=dtype) if dtype is not None and j.dtype.is_floating_point else j for j in jobs]
    parts = _shards(kept, shards.bytes)
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = names if len(parts) > 1 else ["model.safetensors"]
    contents: dict[str, Any] = {f: _copied(template, f, changes, dtype) for f in _companions(template)}
    for i, (file, part) in enumerate(zip(names, parts, strict=True)):
        contents[file] = _bytes(part, report, seed, progress, last=i == len(parts) - 1 and not force)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(_nbytes(j) for j in kept)},
            "weight_map": {j.name: f for f, part in zip(names, parts, strict=True) for j in part},
        }
        contents["model.safetensors.index.json"] = json.dumps(index, indent=2, sort_keys=True).encode()
    write_folder(path, contents)
    return report


def by_tensor(weights: Mapping[str, Tensor], names: Iterable[str], count: int) -> dict[str, tuple[float, ...]]:
    """The weights of each tensor in the files; even ones for what no weight was learnt for (buffers).

    Raises:
        OptionError: files whose tensors have other names than the loaded model's, which transformers converted.
    """
    known = list(names)
    if lost := sorted(set(weights) - {*known}):
        raise OptionError(
            f"The model holds {lost[0]!r}, which its files store under another name, so weights by tensor cannot be applied to them; "
            "use per=model."
        )
    return {n: tuple(weights[n].tolist()) if n in weights else (1 / count,) * count for n in known}


def _nbytes(job: TensorJob) -> int:
    return torch.Size(job.shape).numel() * job.dtype.itemsize


def _shards(jobs: Sequence[TensorJob], limit: int) -> list[list[TensorJob]]:
    out: list[list[TensorJob]] = [[]]
    size = 0
    for job in jobs:
        if out[-1] and size + _nbytes(job) > limit:
            out.append([])
            size = 0
        out[-1].append(job)
        size += _nbytes(job)
    return out


def _companions(template: Checkpoint) -> list[str]:
    """Names of the files that go along: config, tokenizer, chat template."""
    found = (p for p in sorted(template.folder.iterdir()) if p.is_file() and p.suffix in _COPIED)
    return [p.name for p in found if not p.name.endswith(".index.json")]


def _copied(template: Checkpoint, file: str, changes: Mapping[str, Any], dtype: torch.dtype | None) -> bytes:
    if file != "config.json":
        return tensorfile.read_small(template.folder, file, 1 << 30)
    config = {**template.config, **changes}
    inner = config.get("text_config")
    if isinstance(inner, dict):  # what a composite model says of its text part it says there
        config["text_config"] = {**inner, **{k: v for k, v in changes.items() if k in inner}}
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _bytes(
    jobs: list[TensorJob], report: CheckpointReport, seed: int, progress: Callable[[str], None], last: bool
) -> Iterator[Any]:
    """One shard's bytes: the header is known before a tensor is read."""
    jobs = sorted(jobs, key=lambda j: (-j.dtype.itemsize, j.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for j in jobs:
        header[j.name] = {"dtype": tensorfile._NAMES[j.dtype], "shape": list(j.shape), "data_offsets": [at, at + _nbytes(j)]}
        at += _nbytes(j)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little") + raw
    for j in jobs:
        yield tensorfile.tensor_bytes(run(j, report, seed))
        progress(j.name)
    if last and report.moved and not report.changed:
        raise MergeError(
            "The result equals its base to the last bit: the sources do not differ from it, the weights are zero, or its dtype rounds "
            "every change away. Nothing was written; force keeps it."
        )


@torch.no_grad()
def run(job: TensorJob, report: CheckpointReport, seed: int) -> Tensor:
    """One tensor of the result, in its dtype."""
    if job.rule is None:
        return _agreed(job, report)
    readers = [_once(r) if r is not None else None for r in job.sources]
    base = job.base() if job.base is not None else None
    wide = torch.float64 if any(r is not None and r().dtype == torch.float64 for r in readers) else torch.float32
    size = (1, torch.Size(job.shape).numel()) if len(job.shape) < 2 else (job.shape[0], torch.Size(job.shape[1:]).numel())
    lifted = base if job.on == "changes" else None
    stack = TensorStack(job.name, job.weights, wide, tuple(readers), lifted, size)
    merged = job.rule.combine(stack, seed)
    value = merged.value
    assert isinstance(value, Tensor)
    report.errors[job.name] = _from_sum(value, stack) if merged.error is None else merged.error
    made = value if lifted is None else _put_back(value, stack, lifted.reshape(size), readers)
    if not _finite(made):
        raise MergeError(
            f"The merge at {job.name!r} is not finite; a source holds values that are not, or its weights are too large."
        )
    result = _cast(made.reshape(job.shape), job)
    if base is not None:
        gap = result.to(wide) - base
        report.moved[job.name] = _relative(gap, base.to(wide))
        report.changed |= not torch.equal(result, base.to(job.dtype))
    return result


def _finite(t: Tensor) -> bool:
    return math.isfinite(float(t.sum())) or bool(torch.isfinite(t).all())  # a sum is a fifth of the look at each


def _cast(t: Tensor, job: TensorJob) -> Tensor:
    """In the result's dtype; refused where finite values would become infinite."""
    made = t.to(job.dtype)
    narrower = t.dtype != job.dtype and (job.dtype == torch.float16 or t.dtype == torch.float64)
    if narrower and not _finite(made) and not torch.equal(made.isfinite(), t.isfinite()):
        raise MergeError(
            f"The result at {job.name!r} reaches {float(t.abs().max()):.3g}, which {job.dtype} cannot hold; give ",
            Option("dtype", "bfloat16"),
            " or ",
            Option("dtype", "float32"),
            ", or smaller weights.",
        )
    return made


def _from_sum(value: Tensor, stack: TensorStack) -> float:
    plain = stack.combination(stack.weights)
    return _relative(value - plain, plain)


def _put_back(change: Tensor, stack: TensorStack, base: Tensor, readers: Sequence[Read | None]) -> Tensor:
    """base + change; where a lone source's own change came through, its own bits: base + (x − base) can be rounded twice."""
    made = change + base
    source = readers[0]
    if len(readers) == 1 and source is not None:
        for rows in stack.blocks():
            kept = change[rows] == stack.block(0, rows)
            made[rows] = torch.where(kept, source().reshape(stack.size)[rows].to(made.dtype), made[rows])
    return made


def _agreed(job: TensorJob, report: CheckpointReport) -> Tensor:
    """A tensor that is copied: of floats the first's, of integers all must agree."""
    first, *rest = (r() for r in job.sources if r is not None)
    if not all(torch.equal(first, t) for t in rest):
        raise MergeError(f"The sources disagree in the integers of {job.name!r}, which cannot be averaged.")
    report.copied.append(job.name)
    return _cast(first, job)


def _once(read: Read) -> Read:
    """A reader that keeps its tensor for as long as the job lasts."""
    kept: list[Tensor] = []

    def get() -> Tensor:
        if not kept:
            kept.append(read())
        return kept[0]

    return get


def _relative(gap: Tensor, whole: Tensor) -> float:
    size = float(torch.linalg.vector_norm(whole, dtype=torch.float64))
    off = float(torch.linalg.vector_norm(gap, dtype=torch.float64))
    return off / size if size else off
