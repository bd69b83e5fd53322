"""PEFT's LoRA folders as an AdapterState: every key accounted for, every shape checked, every odd setting refused."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.delta.lowrank import LowRank
from rankwise.delta.state import AdapterState
from rankwise.errors import ArtefactError, nearest
from rankwise.store.hub import local_folder
from rankwise.store.peft import config as cfg
from rankwise.store.peft import pack as packing
from rankwise.store.peft.folder import read_pair
from rankwise.store.peft.info import PeftInfo
from rankwise.store.peft.keys import guess_specs, join, sort_keys

if TYPE_CHECKING:
    from rankwise.sites.spec import SiteSpec

#: names of one expert's linears in files from before the experts were fused → (stack, half of its rows)
_EXPERT = re.compile(r"^(?P<stack>.*\.experts)\.(?P<index>\d{1,6})\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)$")
_FUSED = {name: ("gate_up_proj", half) for half, names in enumerate((("gate_proj", "w1"), ("up_proj", "w3"))) for name in names}
_FUSED |= dict.fromkeys(("down_proj", "w2"), ("down_proj", -1))


def read_peft(
    path: str | os.PathLike[str],
    specs: Mapping[str, Any] | None = None,
    *,
    hub: bool = True,
    revision: str | None = None,
    allow_nonfinite: bool = False,
    collapse_ties: bool = True,
) -> tuple[AdapterState, PeftInfo]:
    """The LoRA adapter in folder (or hub repository) ``path``.

    Args:
        specs: every site of the model in module order (:class:`SiteSpec` or :class:`Site`).  None: sites are made up
            from the file's names and shapes, which serves for looking at linear adapters without a model.
        hub: allow ``owner/name`` to be fetched; a server gives False.
        revision: of the hub repository.
        collapse_ties: one delta at the owner where both ends of a tie have the same change.

    Returns:
        (state, info): state.sites holds LowRank values, state.full whole tensors by parameter name.

    Raises:
        ArtefactError: not such a folder, damage, settings that are not supported, or keys that do not fit the model
            (the message lists both sides and the nearest names).
    """
    folder = local_folder(path, (cfg.CONFIG, cfg.WEIGHTS), hub=hub, revision=revision)
    config, tensors = read_pair(folder, allow_nonfinite)
    return PeftReader(config, tensors, specs, os.fspath(path)).read(collapse_ties)


class PeftReader:
    """The work of one reading: keys → modules → sites.

    Args:
        config: checked (:func:`~rankwise.store.peft.config.parse_config`).
        tensors: by the file's keys; on "meta" for their shapes alone.
        specs: every site of the model, in module order; None: made up from the shapes.
        where: what to call the file in messages.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], specs: Mapping[str, Any] | None, where: str):
        self.config, self.tensors, self.where = config, tensors, where
        self.found, self.plain = sort_keys(tensors, where)
        self.specs = (
            {n: getattr(s, "spec", s) for n, s in specs.items()}
            if specs is not None
            else guess_specs(self.found, self.plain, where)
        )
        self.whole: dict[str, dict[str, SiteSpec]] = defaultdict(dict)  # module → {parameter: spec}, as declared
        for spec in self.specs.values():
            if spec.rows is None:
                self.whole[spec.module].setdefault(spec.param, spec)
        self.sites: dict[str, LowRank] = {}
        self.magnitude: dict[str, Tensor] = {}
        self.bias: dict[str, Tensor] = {}

    def read(self, collapse_ties: bool) -> tuple[AdapterState, PeftInfo]:
        self._align_paths()
        experts: dict[tuple[str, str], dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
        for (module, nest), parts in sorted(self.found.items()):
            old = _EXPERT.match(module)
            if old and module not in self.whole and old["stack"] in self.whole:
                experts[old["stack"], old["leaf"]][int(old["index"])] = self._plain_pair(module, parts)
            else:
                self._module(module, nest, parts)
        self._old_experts(experts)
        self._check_targets()
        full, base_layers = self._full()
        if not self.sites and not full:
            raise ArtefactError(f"{self.where} holds no adapter: no tensor in it is a LoRA factor.")
        untied = self._collapse_ties() if collapse_ties else []
        c = self.config
        info = PeftInfo(
            config=c,
            base_model=c.get("base_model_name_or_path"),
            task_type=c.get("task_type"),
            dropout=float(c.get("lora_dropout") or 0.0),
            magnitude=self.magnitude,
            bias=self.bias,
            base_layers=base_layers,
            untied=untied,
            modules_to_save=sorted(c["modules_to_save"] or []),
        )
        return AdapterState(self.sites, full, {"source": "peft"}), info

    def _align_paths(self) -> None:
        """Rename the file's modules to the model's where only a leading ``model.`` (or such) differs, all alike."""
        modules = {m for m, _ in self.found} | {n.rpartition(".")[0] for n in self.plain}
        best, hits = (lambda m: m), -1
        for change in (
            lambda m: m,
            lambda m: f"model.{m}",
            lambda m: m.removeprefix("model."),
            lambda m: m.removeprefix("base_model.model."),
        ):
            known = sum(change(m) in self.whole or bool(_EXPERT.match(change(m))) for m in modules)
            if known > hits:
                best, hits = change, known
        self.found = defaultdict(dict, {(best(m), n): parts for (m, n), parts in self.found.items()})
        self.plain = {join(best(k.rpartition(".")[0]), k.rpartition(".")[2]): v for k, v in self.plain.items()}

    # --- modules -------------------------------------------------------------------------------------------
    def _spec(self, module: str, nest: int) -> SiteSpec:
        """The whole weight that a module's factors belong to."""
        own = self.whole.get(module)
        if not own:
            shown = sorted({m for m, _ in self.found} - set(self.whole))
            raise ArtefactError(
                f"{self.where}: {len(shown)} of {len(self.found)} adapted modules are not in this model: {shown[:5]}; "
                f"{nearest(module, self.whole)} It was made for another base, or its names need another prefix."
            )
        listed = [p for p in own if any(cfg.ends_with(f"{module}.{p}", t) for t in self.config["target_parameters"] or ())]
        weights = [p for p, s in own.items() if s.kind in ("linear", "conv", "embedding")]
        if not listed and not weights:  # PEFT rewrote module targets to parameters: all that it has, in order
            listed = [p for p, s in own.items() if s.kind == "experts"]
        choices = listed or weights[:1]
        depth = len(choices) - 1 - nest  # the first declared nests deepest
        if not 0 <= depth < len(choices):
            raise ArtefactError(f"{self.where}: {module!r} has factors nested {nest} deep, but {len(choices)} adapted parameters.")
        if len([1 for m, _ in self.found if m == module]) != len(choices):
            raise ArtefactError(f"{self.where}: {module!r} should have factors for {choices}, but some are missing.")
        return own[choices[depth]]

    def _module(self, module: str, nest: int, parts: dict[str, Tensor]) -> None:
        spec = self._spec(module, nest)
        where = f"{self.where}: {module}"
        wanted = {"lora_A", "lora_B"}
        if self.config["use_dora"]:
            wanted.add("lora_magnitude_vector")
        if self.config["lora_bias"]:
            wanted.add("lora_B.bias")
        if set(parts) != wanted:
            raise ArtefactError(f"{where}: expected {sorted(wanted)}, found {sorted(parts)}.")
        path = f"{module}.{spec.param}" if spec.kind == "experts" or spec.param != "weight" else module
        listed = any(cfg.ends_with(f"{module}.{spec.param}", t) for t in self.config["target_parameters"] or ())
        rank, scale = cfg.scale_of(self.config, f"{module}.{spec.param}" if listed else path)
        A, B = packing.from_peft(spec, parts["lora_A"], parts["lora_B"], rank, where)
        self.sites[spec.name] = LowRank(A, B, scale)
        if "lora_magnitude_vector" in parts:
            m = parts["lora_magnitude_vector"].reshape(-1)
            packing.expect(m, (spec.out,), f"{where}: the magnitude", spec)
            self.magnitude[spec.name] = m
        if "lora_B.bias" in parts:
            packing.expect(parts["lora_B.bias"], (spec.out,), f"{where}: the bias", spec)
            self.bias[spec.name] = parts["lora_B.bias"] * scale

    def _plain_pair(self, module: str, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(A, s·B) of one old-style expert linear."""
        if set(parts) != {"lora_A", "lora_B"}:
            raise ArtefactError(f"{self.where}: {module}: expected A and B, found {sorted(parts)}.")
        rank, scale = cfg.scale_of(self.config, module)
        A, B = parts["lora_A"], parts["lora_B"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise ArtefactError(f"{self.where}: {module}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit rank {rank}.")
        return A, B * scale

    def _old_experts(self, experts: Mapping[tuple[str, str], dict[int, tuple[Tensor, Tensor]]]) -> None:
        """Per-expert factors of older files onto the fused stacks."""
        grouped: dict[tuple[str, str], list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for (stack, leaf), found in sorted(experts.items()):
            param, half = _FUSED[leaf]
            spec = self.whole[stack].get(param)
            if spec is None:
                raise ArtefactError(f"{self.where}: the file adapts {stack}.*.{leaf}, but this model's experts have no {param!r}.")
            A, B = packing.stack_experts(found, spec.stack, f"{self.where}: {stack}.*.{leaf}")
            grouped[stack, param].append((half, A, B))
        for (stack, param), halves in grouped.items():
            spec = self.whole[stack][param]
            rows = spec.out // 2 if halves[0][0] >= 0 else spec.out
            for _, A, B in halves:
                if A.shape[-1] != spec.inp or B.shape[-2] != rows:
                    raise ArtefactError(
                        f"{self.where}: the experts' factors {tuple(A.shape)}, {tuple(B.shape)} do not fit {spec.name!r} {spec.shape}."
                    )
            parts = [(_rows(spec, half), A, B) for half, A, B in sorted(halves, key=lambda h: h[0])]
            A, B = packing.fuse(parts, spec)
            self.sites[spec.name] = LowRank(A, B, 1.0)

    # --- completeness --------------------------------------------------------------------------------------
    def _check_targets(self) -> None:
        """Whatever the config targets must have factors, or PEFT and we would compute different things in silence."""
        targets = self.config["target_modules"]
        if not targets or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return
        adaptable = {m for m, own in self.whole.items() if any(s.kind in ("linear", "conv", "embedding") for s in own.values())}
        missing = sorted(cfg.targeted(self.config, adaptable) - {m for m, _ in self.found})
        if missing:
            raise ArtefactError(
                f"{self.where}: the config targets {len(missing)} modules that have no tensors in the file: {missing[:5]}. "
                "The file is incomplete, or it was made for a smaller model."
            )

    def _full(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(whole tensors by parameter name, base weights saved beside an adapted embedding)."""
        full, base = {}, {}
        saved = self.config["modules_to_save"] or []
        for name, tensor in self.plain.items():
            module, _, param = name.rpartition(".")
            inner, _, last = module.rpartition(".")
            if last == "base_layer" and any(m == inner for m, _ in self.found):
                if param == "bias" and self.config["bias"] != "none":
                    full[f"{inner}.bias"] = tensor
                else:
                    base[f"{inner}.{param}"] = tensor
                continue
            spec = self.whole.get(module, {}).get(param)
            expected = any(f".{s}." in f".{module}." for s in saved) or (param == "bias" and self.config["bias"] == "all")
            if spec is None or not (expected or spec.kind == "embedding" or spec.role == "head"):
                known = [f"{m}.{p}" for m, own in self.whole.items() for p in own]
                raise ArtefactError(
                    f"{self.where}: the tensor {name!r} belongs to nothing in this model and config; {nearest(name, known)}"
                )
            full[name] = tensor
        for s in saved:
            missing = not any(f".{s}." in f".{n}." for n in full) and any(f".{s}." in f".{m}." for m in self.whole)
            if missing and s not in ("classifier", "score", "qa_outputs"):
                raise ArtefactError(f"{self.where}: modules_to_save names {s!r}, but the file holds no tensor of it.")
        self._check_full(full)
        return full, base

    def _check_full(self, full: Mapping[str, Tensor]) -> None:
        for name, tensor in full.items():
            module, _, param = name.rpartition(".")
            spec = self.whole[module].get(param)
            if spec is None or spec.name not in self.specs or spec.parent == "":
                continue
            shape: tuple[int, ...] | None = (spec.out,) if spec.kind == "plain" and tensor.dim() < 2 else None
            if spec.kind == "linear":
                shape = (spec.inp, spec.out) if spec.transposed else (spec.out, spec.inp)
            elif spec.kind == "embedding":
                shape = (spec.inp, spec.out)
            if shape is not None and tuple(tensor.shape) != shape and not spec.quantised:
                raise ArtefactError(f"{self.where}: {name!r} is {tuple(tensor.shape)}; this model has {shape} there.")

    def _collapse_ties(self) -> list[str]:
        """One delta for both ends of a tie where the file's two are each other's transposes; else name the lone ends."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.sites:
            if self.specs[name].tie_group:
                groups[self.specs[name].tie_group].append(name)
        untied = []
        for names in groups.values():
            names.sort(key=lambda n: f"{self.specs[n].module}.{self.specs[n].param}" != self.specs[n].tie_group)  # the owner first
            first = self.sites[names[0]]
            rest = [n for n in names[1:] if not _same_change(first, self.sites[n])]
            if len(names) > 1 and not rest and not any(n in self.magnitude for n in names):
                for name in names[1:]:
                    del self.sites[name]
            else:
                untied += names
        return sorted(untied)


def _same_change(a: LowRank, b: LowRank) -> bool:
    """Whether b is a, or a transposed, bit for bit."""
    if a.scale != b.scale:
        return False
    return any(
        A.shape == b.A.shape and B.shape == b.B.shape and torch.equal(A, b.A) and torch.equal(B, b.B)
        for A, B in ((a.A, a.B), (a.B.mT, a.A.mT))
    )


def _rows(spec: SiteSpec, half: int) -> SiteSpec:
    """The rows of a fused gate+up stack: its first half (0), its second (1), or the whole (-1)."""
    if half < 0:
        return spec
    n = spec.out // 2
    return dataclasses.replace(spec, name=f"{spec.name}[{half}]", rows=(half * n, (half + 1) * n), out=n)
