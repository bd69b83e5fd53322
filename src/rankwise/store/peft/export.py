"""Adapters for PEFT: one folder of `adapter_config.json` + `adapter_model.safetensors` that PEFT 0.21 loads to equal logits.

The scale is one plain ``lora_alpha`` wherever every module has the same α = s·r; anything else (rsLoRA, patterns,
mixed) is baked into B, so that a reader that knows only ``lora_alpha`` and a tensor's own rank is right too.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import ArtefactError
from rankwise.store import tensorfile
from rankwise.store.atomic import FILES, Files, write_folder
from rankwise.store.peft import config as cfg
from rankwise.store.peft import pack as packing
from rankwise.store.peft.info import PeftInfo
from rankwise.store.peft.read import read_peft

if TYPE_CHECKING:
    from rankwise.delta.state import AdapterState
    from rankwise.sites.spec import SiteSpec

__all__ = ["PeftInfo", "export_peft", "read_peft"]

PREFIX = "base_model.model."
#: heads that PEFT adds to `modules_to_save` by itself for these tasks, and then expects in the file
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
#: trailing names that PEFT rewrites to fused expert parameters when they stand in `target_modules` of a mixture model
_REWRITTEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def export_peft(
    path: str | os.PathLike[str],
    state: AdapterState,
    specs: Mapping[str, Any],
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    config_extra: Mapping[str, Any] | None = None,
    magnitude: Mapping[str, Tensor] | None = None,
    bias: Mapping[str, Tensor] | None = None,
    modules: Collection[str] | None = None,
    tied: bool = True,
    dtype: torch.dtype | None = None,
    files: Files = FILES,
) -> Path:
    """Write ``state`` as a PEFT LoRA folder, read it again, and return its path.

    Args:
        path: the folder; an older version in it is replaced in one step.
        state: LowRank deltas by site name (their core and scale are honoured), and whole tensors by parameter name
            (``modules_to_save``: every parameter of a module, or the :class:`Site` to complete it from).
        specs: every site of the model in module order, :class:`SiteSpec` or :class:`Site`.  A Site lets the export
            check what a spec cannot know (a convolution's dilation).
        base_model, task_type, config_extra: go into the config.
        magnitude: DoRA's row norms (out,) by site; needed for every adapted site or none.
        bias: change of a site's bias (out,) by site (PEFT's ``lora_bias``).
        modules: every module path of the model; lets ``target_modules`` be short names instead of full paths.
        tied: a site's tie partners get the same change (PEFT adapts the two ends apart).
        dtype: cast the factors; default: as they are.

    Raises:
        ArtefactError: a delta that is no LowRank (lower it first), a place that PEFT cannot adapt, missing
            magnitudes or head tensors, empty tensors, or the system refused.
    """
    export = _Export(state, specs, magnitude or {}, bias or {}, tied, dtype)
    tensors, config = export.build(task_type, modules)
    config |= {"base_model_name_or_path": base_model, "task_type": task_type, **(config_extra or {})}
    if config["lora_dropout"] and config.get("target_parameters"):
        raise ArtefactError("PEFT refuses lora_dropout with adapted parameters (expert stacks); set it to 0.")
    raw = cfg.config_bytes(config)
    salt = cfg.config_salt(cfg.strict_json(raw, cfg.CONFIG))
    metadata = {"format": "pt", "rankwise_sha256": tensorfile.digest(tensors, salt), "rankwise_version": "1"}
    write_folder(path, {cfg.WEIGHTS: b"".join(tensorfile.pack(tensors, metadata)), cfg.CONFIG: raw}, files=files)
    if files is FILES:
        _verify(path, tensors, export, specs)
    return Path(path)


class _Export:
    """The work of one export: sites → modules → tensors and config."""

    def __init__(
        self,
        state: AdapterState,
        specs: Mapping[str, Any],
        magnitude: Mapping[str, Tensor],
        bias: Mapping[str, Tensor],
        tied: bool,
        dtype: torch.dtype | None,
    ):
        self.specs: dict[str, SiteSpec] = {name: getattr(s, "spec", s) for name, s in specs.items()}
        self.live = {name: s.module for name, s in specs.items() if hasattr(s, "module") and hasattr(s, "spec")}
        self.state, self.magnitude, self.bias, self.dtype = state, dict(magnitude), dict(bias), dtype
        self.pairs = {n: packing.pair(d, n) for n, d in state.sites.items() if getattr(d, "exact_rank", 1) != 0}
        for what, names in (("magnitude", magnitude), ("bias", bias), ("state", self.pairs)):
            unknown = sorted(set(names) - set(self.specs if what == "state" else self.pairs))
            if unknown:
                raise ArtefactError(f"The {what} names sites that are not there: {unknown[:5]}.")
        if tied:
            self._add_partners()
        self.whole: dict[tuple[str, str], SiteSpec] = {}
        for spec in self.specs.values():
            if spec.rows is None and (spec.module, spec.param) not in self.whole:
                self.whole[spec.module, spec.param] = spec
        self.parts: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name in self.specs:
            if name in self.pairs:
                self.parts[self.specs[name].module, self.specs[name].param].append(name)
        if not self.parts and not state.full:
            raise ArtefactError("There is nothing to export: no site has a change and no whole tensor is saved.")

    def build(self, task_type: str | None, modules: Collection[str] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        alpha = self._common_alpha()
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for (module, param), names in self.parts.items():
            whole = self.whole.get((module, param))
            if whole is None:
                raise ArtefactError(f"The specs lack the whole weight of {names[0]!r}; give every site of the model.")
            self._check_place(whole)
            parts = []
            for name in names:
                A, B, s = self.pairs[name]
                parts.append((self.specs[name], A, B if alpha else (B.double() * s).to(B.dtype)))
            A, B = packing.fuse(parts, whole)
            packed, rank = packing.to_peft(whole, A, B)
            key = self._key(module, param)
            ranks[self._path(whole)] = rank
            tensors |= {f"{key}.{suffix}": t for suffix, t in packed.items()}
            if self.magnitude:
                tensors[f"{key}.lora_magnitude_vector"] = packing.magnitude_to_peft(whole, self._magnitude(names, whole))
            if self.bias:
                tensors[f"{key}.lora_B.bias"] = self._bias(names, whole, alpha)
        r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
        if max(ranks.values(), default=1) > cfg.MAX_RANK:
            raise ArtefactError(f"A rank of {max(ranks.values())} is beyond the limit of {cfg.MAX_RANK}; lower the adapter first.")
        if not alpha and self.pairs:  # baked: α = r everywhere, said once; B carries r_i/r so that no alpha_pattern is needed
            for (module, param), _ in self.parts.items():
                self._rescale(tensors, self._key(module, param), ranks[self._path(self.whole[module, param])], r)
        saved, full = self._saved(task_type)
        tensors |= full
        config = self._config(ranks, r, alpha or r, modules, saved)
        tensors = {k: self._plain(t) for k, t in tensors.items()}
        return tensors, config

    def _common_alpha(self) -> int:
        """The one whole α = s·r that every *file* module would have, or 0 where scales must be baked into B."""
        alphas = set()
        for names in self.parts.values():
            scales = {self.pairs[n][2] for n in names}
            rank = sum(self.pairs[n][0].shape[-2] for n in names) * (self.specs[names[0]].groups or 1)
            if len(scales) > 1:
                return 0
            alphas.add(round(scales.pop() * rank, 9))
        alpha = alphas.pop() if len(alphas) == 1 else 0.0
        return int(alpha) if alpha > 0 and alpha == int(alpha) else 0

    def _rescale(self, tensors: dict[str, Tensor], key: str, rank: int, r: int) -> None:
        if rank == r:
            return
        for suffix in ("lora_B.weight", "lora_embedding_B", "lora_B.bias"):
            name = f"{key}.{suffix}"
            if name in tensors:
                tensors[name] = (tensors[name].double() * (rank / r)).to(tensors[name].dtype)

    def _config(
        self, ranks: dict[str, int], r: int, alpha: int, modules: Collection[str] | None, saved: list[str]
    ) -> dict[str, Any]:
        called, parameters = set(), []
        for key in self.parts:
            whole = self.whole[key]
            if self._by_parameter(whole):
                parameters.append(f"{whole.module}.{whole.param}")
            else:
                called.add(whole.module)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "inference_mode": True,
            "revision": None,
            "r": r,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": bool(called) and all(self.whole[k].transposed for k in self.parts),
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": bool(self.magnitude),
            "target_modules": cfg.suffixes(called, modules),
            "modules_to_save": saved or None,
            "rank_pattern": cfg.patterns_of(ranks, r),
            "alpha_pattern": {},
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        if parameters:
            config["target_parameters"] = sorted(parameters)
        if self.bias:
            config["lora_bias"] = True
        if not called and not parameters:  # only whole tensors: PEFT needs a target list, an empty one will do
            config["target_modules"] = []
        return config

    def _by_parameter(self, whole: SiteSpec) -> bool:
        """Whether PEFT must adapt the parameter itself (`target_parameters`) instead of the module."""
        if whole.kind == "experts" or whole.mode == "read":
            return True
        mixture = any(s.kind == "experts" for s in self.specs.values())
        return mixture and whole.module.rpartition(".")[2] in _REWRITTEN

    def _path(self, whole: SiteSpec) -> str:
        """What PEFT matches its patterns against."""
        return f"{whole.module}.{whole.param}" if self._by_parameter(whole) else whole.module

    def _key(self, module: str, param: str) -> str:
        """Prefix of the module's tensors; of several parameters of one module the first declared nests deepest."""
        declared = [p for (m, p) in self.whole if m == module and (m, p) in self.parts]
        depth = len(declared) - 1 - declared.index(param)
        return f"{PREFIX}{module}" + ".base_layer" * depth

    def _check_place(self, whole: SiteSpec) -> None:
        what = f"Site {whole.name!r} ({whole.parent or whole.kind})"
        if not whole.module:
            raise ArtefactError(f"{what} is the model itself; PEFT adapts only modules inside a model.")
        if whole.kind not in ("linear", "conv", "embedding", "experts"):
            raise ArtefactError(f"{what} is a {whole.kind} place, which a PEFT LoRA cannot adapt; save it whole (modules_to_save).")
        if whole.kind == "linear" and whole.mode == "read" and whole.role != "router":
            raise ArtefactError(f"{what} is read by another module's forward, where PEFT's LoRA would not act; merge it instead.")
        if whole.kind == "experts" and whole.stack == 1 and whole.transposed:
            raise ArtefactError(f"{what} is a stack of one transposed expert, which PEFT lays out wrongly.")
        if self._by_parameter(whole) and (self.magnitude or self.bias):
            raise ArtefactError(f"{what} is adapted as a parameter, for which PEFT knows neither DoRA nor lora_bias.")
        if whole.kind == "embedding" and self.bias:
            raise ArtefactError(f"{what} is an embedding, for which PEFT knows no lora_bias.")
        conv = self.live.get(whole.name) if whole.kind == "conv" else None
        if conv is not None and (set(conv.dilation) != {1} or conv.padding_mode != "zeros"):
            raise ArtefactError(f"{what} is dilated or padded otherwise than with zeros; PEFT's A ignores that. Merge it instead.")
        if whole.kind == "conv" and self.magnitude and whole.groups > 1:
            raise ArtefactError(f"{what} is a grouped convolution, for which PEFT's DoRA computes another norm.")

    def _magnitude(self, names: list[str], whole: SiteSpec) -> Tensor:
        missing = [n for n in names if n not in self.magnitude]
        if missing:
            raise ArtefactError(f"PEFT applies DoRA to every site or none: the magnitude of {missing[:5]} is missing.")
        m = torch.full((whole.out,), float("nan"))
        for name in names:
            index = self.specs[name].row_index()
            m[index if index is not None else slice(None)] = self.magnitude[name].detach().float().reshape(-1)
        if bool(m.isnan().any()):
            raise ArtefactError(
                f"PEFT's DoRA needs a norm for every row of {whole.module!r}, but only {names} are adapted; pass the "
                "base rows' norms as the magnitude of a zero LowRank on the other parts."
            )
        return m

    def _bias(self, names: list[str], whole: SiteSpec, alpha: int) -> Tensor:
        b = torch.zeros(whole.out)
        for name in names:
            if name in self.bias:
                index = self.specs[name].row_index()
                value = self.bias[name].detach().float()
                b[index if index is not None else slice(None)] += value / self.pairs[name][2] if alpha else value
        return b

    def _add_partners(self) -> None:
        """Give the other end of a tie the same change (transposed where it stores the weight the other way)."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, spec in self.specs.items():
            if spec.tie_group and spec.rows is None:
                groups[spec.tie_group].append(name)
        for names in groups.values():
            own = [n for n in names if n in self.pairs]
            if len(own) != 1:
                continue
            A, B, s = self.pairs[own[0]]
            here = self.specs[own[0]]
            for other in names:
                spec = self.specs[other]
                if other == own[0] or spec.module == here.module:
                    continue
                if own[0] in self.magnitude or own[0] in self.bias:
                    raise ArtefactError(
                        f"{own[0]!r} is tied to {other!r}; a magnitude or bias cannot be shared by both. Untie them."
                    )
                same = spec.shape == here.shape and (spec.kind == "embedding") == (here.kind == "embedding")
                self.pairs[other] = (A, B, s) if same else (B.mT, A.mT, s)

    def _saved(self, task_type: str | None) -> tuple[list[str], dict[str, Tensor]]:
        """(`modules_to_save`, their tensors): PEFT saves a module whole, so every parameter must be there."""
        full = dict(self.state.full)
        paths = {name.rpartition(".")[0] for name in full}
        owned: dict[str, dict[str, SiteSpec]] = defaultdict(dict)
        for (module, param), spec in self.whole.items():
            owned[module][param] = spec
            if module.rpartition(".")[2] in _HEADS.get(task_type or "", ()):
                paths.add(module)
        out: dict[str, Tensor] = {}
        for path in sorted(paths):
            if not path or path not in owned:
                raise ArtefactError(
                    f"{path or 'the model'!r} has whole tensors to save, but is no module with parameters of this model."
                )
            if any(m == path or m.startswith(path + ".") for m, _ in self.parts):
                raise ArtefactError(f"{path!r} is both adapted and saved whole; PEFT does one or the other.")
            for param, spec in owned[path].items():
                name = f"{path}.{param}"
                value = full.pop(name, None)
                if value is None and spec.name in self.live:
                    value = self.live[spec.name]._parameters[param]
                if value is None:
                    raise ArtefactError(f"PEFT saves {path!r} whole: {name!r} is missing. Give the model's sites or the tensor.")
                out[f"{PREFIX}{name}"] = value.detach()
        if full:
            raise ArtefactError(f"These whole tensors are no parameters of the model: {sorted(full)[:5]}.")
        return sorted(paths), out

    def _plain(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        if self.dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
        return tensor.contiguous().clone()


def _verify(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], export: _Export, specs: Mapping[str, Any]) -> None:
    """Read the folder back as a stranger would, before it is declared written."""
    state, _ = read_peft(path, specs, hub=False, collapse_ties=False)
    got = {(export.specs[n].module, export.specs[n].param) for n in state.sites}
    if got != set(export.parts):
        missing = sorted(f"{m}.{p}" for m, p in set(export.parts) ^ got)
        raise ArtefactError(
            f"The export at {os.fspath(path)!r} does not read back: {missing[:5]} differ. This is a bug in rankwise."
        )
    again, _ = tensorfile.read_tensors(path, cfg.WEIGHTS)
    if again.keys() != tensors.keys() or any(not torch.equal(again[k], t) for k, t in tensors.items()):
        raise ArtefactError(f"The export at {os.fspath(path)!r} was changed while it was written.")
