"""mergekit's YAML: its methods as rows of ours, with its own conventions for signs, divisors and rescaling.

    merge_method: ties                  # linear, task_arithmetic, dare_*, della*, breadcrumbs*, sce, slerp, nuslerp, …
    base_model: path/to/base
    models:
      - model: path/to/a
        parameters: {weight: 0.5, density: [0.2, 0.8]}        # a list is a gradient over the layers
    parameters:
      lambda: 0.9
      weight: [{filter: mlp, value: 1.0}, {value: 0.5}]       # the first filter that is part of the tensor's name
    dtype: bfloat16

or ``slices``, each with ``sources`` of a ``model`` and a ``layer_range``.  A gradient's position is the layer's in its slice,
0 … 1, and 0 outside the layers.  What is not listed here is refused by name.  Where the two part ways: sums are fp32
whatever ``dtype``, weights that add up to 0 are refused instead of left undivided, SCE's energies are used however small.
Source: the README and behaviour of mergekit 0.1.5.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import MergeError, OptionError, nearest, need
from rankwise.merge.checkpoints import Aligned
from rankwise.merge.engine.jobs import CheckpointReport, Shards, TensorJob, write
from rankwise.merge.engine.model_folder import EMBEDDING, Checkpoint
from rankwise.merge.mergekit_methods import METHODS, Method, resolve

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LAYER = re.compile(r"^(?P<before>.*?(?:^|\.)(?:layers|h|blocks|layer))\.(?P<index>\d+)\.(?P<after>.*)$")


_KEYS = {"merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source"}
Loaded = Callable[[str], Checkpoint]


@dataclasses.dataclass(frozen=True)
class Input:
    """A source of a slice: its model, its first layer there, its own settings."""

    model: str
    start: int
    parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some layers of the result and what they are made of."""

    sources: tuple[Input, ...]
    layers: int
    settings: tuple[Mapping[str, Any], ...]  # of the slice, then of the whole file


def merge_yaml(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    seed: int = 0,
    shard_bytes: int = 5 * 10**9,
    missing: str = "refuse",
    force: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> CheckpointReport:
    """Run a mergekit file (or its content) into the new folder ``out``; paths in it are as the process sees them.

    Args:
        config: the file, or what it holds.
        out: a new or empty folder.
        seed: of random drops.
        shard_bytes: of one file of the result at the most; default 5 GB.
        missing: a tensor that only some have, as :func:`~rankwise.merge.checkpoints.merge_checkpoints` takes it.
        force: keep a result that equals its base.
        progress: called with each tensor's name when it is done.

    Raises:
        OptionError: a method, key or value that is not known here, named.
        MergeError, ArtefactError: as :func:`~rankwise.merge.checkpoints.merge_checkpoints`.
    """
    jobs, template, changes, method, dtype = plan(_loaded(config), missing=missing)
    shards = Shards(dtype, shard_bytes)
    return write(jobs, out, template, changes, shards, method=method, seed=seed, force=force, progress=progress)


def plan(
    data: Mapping[str, Any], *, missing: str = "refuse"
) -> tuple[list[TensorJob], Checkpoint, dict[str, Any], str, torch.dtype | None]:
    """(jobs, whose config and tokenizer, changes of the config, method, dtype) of a mergekit file's content."""
    name = data.get("merge_method")
    if not isinstance(name, str) or name not in METHODS:
        raise OptionError(f"merge_method {name!r} is not known here; {nearest(str(name), METHODS)}")
    if unknown := sorted(set(data) - _KEYS):
        raise OptionError(f"The key {unknown[0]!r} of a mergekit file is not supported here; known: {', '.join(sorted(_KEYS))}.")
    kept: dict[str, Checkpoint] = {}

    def load(model: str) -> Checkpoint:
        if model not in kept:
            kept[model] = _checkpoint(model)
        return kept[model]

    base = data.get("base_model")
    if base is not None and not isinstance(base, str):
        raise OptionError(f"base_model is the path of a model; it got {base!r}.")
    slices = _slices(data, base, load, METHODS[name])
    if len({load(s.model).tied for part in slices for s in part.sources}) > 1:
        raise MergeError("Some of these models tie their output to the embedding and some do not; untie them all first.")
    template = load(base or slices[0].sources[0].model)
    _same_tokenizer(data.get("tokenizer_source"), template, kept)
    made = _Planner(name, base, load, missing)
    jobs = made.outside(slices[0], slices[-1])
    at = 0
    for part in slices:
        for j in range(part.layers):
            jobs += made.layer(part, j, at)
            at += 1
    changes = _depth(template, slices, load) if "slices" in data else {}
    return jobs, template, changes, name, _dtype(data.get("out_dtype") or data.get("dtype"))


class _Planner:
    """Jobs of the tensors of a slice, each with its own values of the parameters."""

    def __init__(self, method: str, base: str | None, load: Loaded, missing: str):
        self.name, self.method, self.base, self.load = method, METHODS[method], base, load
        changes = self.method.base == "changes" or (self.method.base == "optional" and base is not None)
        self.aligned = Aligned(missing, "refuse", "changes" if changes else "weights")

    def outside(self, first: Slice, last: Slice) -> list[TensorJob]:
        """Embeddings from the first slice's sources, norms and heads from the last's."""
        out = []
        for part, wanted in ((first, True), (last, False)):
            names = {n: None for s in part.sources for n in self.load(s.model).table if not _LAYER.match(n)}
            out += [self._job(n, part, [n] * len(part.sources), n, 0.0) for n in names if bool(EMBEDDING.search(n)) == wanted]
        return out

    def layer(self, part: Slice, j: int, at: int) -> list[TensorJob]:
        """Layer ``at`` of the result, the ``j``-th of its slice."""
        t = j / (part.layers - 1) if part.layers > 1 else 1.0
        named: dict[tuple[str, str], None] = {}
        for s in part.sources:
            for n in self.load(s.model).table:
                if (m := _LAYER.match(n)) and int(m["index"]) == s.start + j:
                    named[m["before"], m["after"]] = None
        return [
            self._job(
                f"{a}.{at}.{b}", part, [f"{a}.{s.start + j}.{b}" for s in part.sources], f"{a}.{part.sources[0].start + j}.{b}", t
            )
            for a, b in named
        ]

    def _job(self, name: str, part: Slice, theirs: Sequence[str], in_base: str, t: float) -> TensorJob:
        method = self.method
        placed = list(zip(part.sources, theirs, strict=True))
        if method.base in ("changes", "optional") and self.base is not None:
            placed = [(s, n) for s, n in placed if s.model != self.base]
        elif method.base == "first":
            placed = sorted(placed, key=lambda p: p[0].model != self.base)
        shared = {k: self._value(k, d, name, t, part.settings) for k, d in method.shared.items()}
        own = [{k: self._value(k, d, name, t, (s.parameters, *part.settings)) for k, d in method.own.items()} for s, _ in placed]
        rule = method.rule(shared, own)
        if rule.count is not None and len(placed) != rule.count:
            raise OptionError(f"merge_method {self.name!r} is between {rule.count} models; it got {len(placed)}.")
        weights = [values.get("weight", 1 / len(placed)) for values in own]
        origin = (self.load(self.base), in_base) if self.aligned.on == "changes" and self.base else None
        return self.aligned.job(name, [(self.load(s.model), n) for s, n in placed], origin, rule, weights)

    def _value(self, key: str, default: Any, tensor: str, t: float, levels: Sequence[Mapping[str, Any]]) -> Any:
        """The first level that says something of this tensor; checked against the sort of ``default``."""
        flag = isinstance(default, bool)
        for level in levels:
            if key in level and (found := resolve(level[key], tensor, t, flag, f"{self.name}.{key}")) is not None:
                return round(found) if isinstance(default, int) and not flag else found
        if default is None:
            raise OptionError(
                f"merge_method {self.name!r} needs the parameter {key!r} for {tensor!r}; give a value without a filter."
            )
        return default


# --- the file --------------------------------------------------------------------------------------------------
def _loaded(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    try:
        import yaml
    except ImportError as e:
        raise need("yaml", "cli", "Reading a mergekit file") from e
    try:
        data = yaml.safe_load(Path(config).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise OptionError(f"{config} cannot be read as YAML: {str(e).splitlines()[0]}") from e
    if not isinstance(data, dict):
        raise OptionError(f"{config} is no mergekit file: it has no keys.")
    return data


def _checkpoint(model: str) -> Checkpoint:
    if "+" in model and not Path(model).is_dir():
        raise OptionError(
            f"{model!r} is a model with an adapter on it; write that model first (rankwise merge ADAPTER --model BASE --into-base)."
        )
    if not Path(model).is_dir():
        raise OptionError(f"There is no folder {model!r}; download the model and give its path.")
    return Checkpoint(model)


def _slices(data: Mapping[str, Any], base: str | None, load: Loaded, method: Method) -> list[Slice]:
    """The file's slices; ``models`` are one slice of all layers."""
    name = data["merge_method"]
    whole = _parameters(data, method, name)
    if bool(data.get("models")) == bool(data.get("slices")):
        raise OptionError("A mergekit file has either 'models' or 'slices'.")
    if base is None and method.base in ("changes", "first"):
        raise OptionError(f"merge_method {name!r} needs base_model.")
    made = []
    for part in _each(data["slices"], "slices") if data.get("slices") else [{"sources": data["models"]}]:
        _only(part, {"sources", "parameters"}, "a slice")
        entries, ranges = _each(part.get("sources"), "sources" if data.get("slices") else "models"), []
        for e in entries:
            _only(e, {"model", "parameters"} | ({"layer_range"} if "slices" in data else set()), "a source")
            if not isinstance(e.get("model"), str):
                raise OptionError(f"A source of a mergekit file names its model by a path; it got {e.get('model')!r}.")
            ranges.append(_range(e, load))
        if base is not None and base not in [e["model"] for e in entries]:
            if "slices" not in data and method.base in ("source", "first"):
                entries.append({"model": base})
                ranges.append((0, _layers(load(base))))
            elif "slices" in data and method.base == "first":
                raise OptionError(f"Each slice of {name!r} has the base and one other model; {base!r} is not among its sources.")
        if len({b - a for a, b in ranges}) > 1:
            raise OptionError(f"The sources of a slice have {sorted({b - a for a, b in ranges})} layers; they must be as many.")
        if name == "passthrough" and len(entries) > 1:
            raise OptionError("merge_method 'passthrough' takes one source a slice.")
        if len({e["model"] for e in entries}) < len(entries):
            raise OptionError("A slice names a model twice.")
        sources = tuple(Input(e["model"], a, _parameters(e, method, name)) for e, (a, _) in zip(entries, ranges, strict=True))
        if method.base in ("changes", "optional") and all(s.model == base for s in sources):
            raise OptionError(f"merge_method {name!r} needs a model beside its base.")
        made.append(Slice(sources, ranges[0][1] - ranges[0][0], (_parameters(part, method, name), whole)))
    return made


def _each(entries: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(entries, list) or not entries or not all(isinstance(e, Mapping) for e in entries):
        raise OptionError(f"The key {key!r} of a mergekit file is a list of entries with keys of their own; it got {entries!r}.")
    return list(entries)


def _only(entry: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(entry) - known):
        raise OptionError(f"The key {unknown[0]!r} of {what} is not supported here; known: {', '.join(sorted(known))}.")


def _parameters(entry: Mapping[str, Any], method: Method, name: str) -> Mapping[str, Any]:
    """Its ``parameters``, every one known to the method; those that only one value has here are taken off."""
    said = entry.get("parameters") or {}
    if not isinstance(said, Mapping):
        raise OptionError(f"The key 'parameters' of a mergekit file holds names with values; it got {said!r}.")
    given = dict(said)
    for key, value in list(given.items()):
        if key in method.only:
            if value != method.only[key]:
                raise OptionError(f"merge_method {name!r} with {key}: {value!r} is not supported here (only {method.only[key]!r}).")
            del given[key]
        elif key not in method.shared and key not in method.own:
            known = sorted({*method.shared, *method.own})
            raise OptionError(f"merge_method {name!r} has no parameter {key!r}; {nearest(key, known)}")
    return given


def _range(entry: Mapping[str, Any], load: Loaded) -> tuple[int, int]:
    depth = _layers(load(entry["model"]))
    said = entry.get("layer_range", (0, depth))
    ends = list(said) if isinstance(said, list | tuple) else []
    if len(ends) != 2 or not all(type(n) is int for n in ends) or not 0 <= ends[0] < ends[1] <= depth:
        raise OptionError(
            f"layer_range {said!r} of {entry['model']!r}, which has {depth} layers; give [first, last + 1] among them."
        )
    return ends[0], ends[1]


def _layers(c: Checkpoint) -> int:
    return 1 + max((int(m["index"]) for n in c.table if (m := _LAYER.match(n))), default=-1)


def _depth(template: Checkpoint, slices: Sequence[Slice], load: Loaded) -> dict[str, Any]:
    """What the config says of the number of layers, and of each."""
    inner = template.config.get("text_config")
    said = inner if isinstance(inner, dict) else template.config
    total = sum(s.layers for s in slices)
    out: dict[str, Any] = {k: total for k in ("num_hidden_layers", "n_layer", "num_layers") if k in said}
    if isinstance(said.get("layer_types"), list):
        kinds = [load(s.sources[0].model)._text().get("layer_types", []) for s in slices]
        out["layer_types"] = [k for s, own in zip(slices, kinds, strict=True) for k in own[s.sources[0].start :][: s.layers]]
    return out


def _dtype(name: Any) -> torch.dtype | None:
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        raise OptionError(f"dtype is one of {', '.join(DTYPES)}; it got {name!r}.")
    return None if name is None else DTYPES[name]


def _same_tokenizer(source: Any, template: Checkpoint, models: Mapping[str, Checkpoint]) -> None:
    """The template's tokenizer goes along; asking for "base" is that, where all are the same."""
    if source is None:
        return
    files = {
        (c.folder / "tokenizer.json").read_bytes() if (c.folder / "tokenizer.json").is_file() else b"" for c in models.values()
    }
    if source != "base" or len(files) > 1:
        raise OptionError(
            f"tokenizer_source {source!r} would move the rows of embeddings, which is not supported here; models must share one tokenizer."
        )
