"""diffusers' LoRA files: PEFT's factors under a component's name, the config of each component in the file's header.

``unet.<module>.lora_A.weight`` and ``…lora_B.weight``; the header's ``lora_adapter_metadata`` is a JSON of
``unet.r``, ``unet.lora_alpha``, ``unet.rank_pattern`` ….  Without it diffusers takes α = r, whatever a file was trained
with: written files have the scale in B and say α = r, so that a reader with or without the header is right.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rankwise.errors import ArtefactError, OptionError
from rankwise.store import interchange as core
from rankwise.store import tensorfile
from rankwise.store.interchange import COMPONENTS, Factors
from rankwise.store.peft import config as cfg
from rankwise.store.peft import pack as packing

if TYPE_CHECKING:
    from rankwise.delta.state import AdapterState
    from rankwise.store.peft.info import PeftInfo

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

_KEY = re.compile(
    r"^(?P<module>.+?)\.(?P<what>lora_A\.weight|lora_B\.weight|lora\.down\.weight|lora\.up\.weight|lora_linear_layer\.down\.weight"
    r"|lora_linear_layer\.up\.weight|lora_magnitude_vector(?:\.weight)?|alpha)$"
)
#: the oldest scheme: factors in an attention's processor
_PROCESSOR = re.compile(r"^(?P<at>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<side>down|up)\.weight$")
_FIRST = ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
_SECOND = ("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight")


def is_diffusers(keys: Mapping[str, Any]) -> bool:
    """Whether these are a diffusers file's tensor names (PEFT's own begin with ``base_model.``)."""
    return any(_split(k)[1] in (*_FIRST, *_SECOND) for k in keys) and not any(k.startswith("base_model.") for k in keys)


def export_diffusers(
    path: str | os.PathLike[str],
    state: AdapterState,
    specs: Mapping[str, Any],
    *,
    magnitude: Mapping[str, Tensor] | None = None,
    component: str = "unet",
) -> Path:
    """Write ``state`` as diffusers' ``load_lora_weights`` and ``load_lora_adapter`` read it; returns the file's path.

    Args:
        path: a folder, or a ``.safetensors`` file.
        magnitude: DoRA's row norms (out,) by site.
        component: what the model is called in the pipeline; "" where the modules' names begin with it already.

    Raises:
        ArtefactError: a change that is not low-rank, or a place that the format cannot hold.
    """
    if component and component not in COMPONENTS:
        raise OptionError(f"There is no component {component!r}; a pipeline has {', '.join(COMPONENTS)}.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = defaultdict(dict)
    normed: dict[str, bool] = defaultdict(bool)
    for p in core.pieces(state, specs, magnitude or {}, "diffusers' format"):
        part, inner = (component, p.spec.module) if component else _component(p.spec.module)
        B = p.B if p.scale == 1.0 else (p.B.double() * p.scale).to(p.B.dtype)
        packed, rank = packing.to_peft(p.spec, p.A, B)
        key = f"{part}.{inner}"
        tensors |= {f"{key}.{suffix}": t for suffix, t in packed.items()}
        ranks[part][inner] = rank
        normed[part] |= p.magnitude is not None
        if p.magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = packing.magnitude_to_peft(p.spec, p.magnitude)
    config: dict[str, Any] = {}
    for part, own in ranks.items():
        r = Counter(own.values()).most_common(1)[0][0]
        patterns = cfg.patterns_of(own, r)
        config |= {
            f"{part}.{k}": v
            for k, v in {
                "peft_type": "LORA",
                "r": r,
                "lora_alpha": r,
                "rank_pattern": patterns,
                "alpha_pattern": patterns,
                "target_modules": sorted(own),
                "use_dora": normed[part],
                "use_rslora": False,
                "lora_bias": False,
            }.items()
        }
    file = core.target(path, ".safetensors", FILE)
    return core.write_tensors(file, tensors, {METADATA: json.dumps(config, sort_keys=True, allow_nan=False)})


def read_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], specs: Mapping[str, Any], where: str
) -> tuple[AdapterState, PeftInfo]:
    """(state, info) of a diffusers file's tensors; the scale is the header's, else the ``.alpha`` beside a pair, else 1.

    Args:
        tensors: of the file.
        metadata: of the file.
        specs: every site of the model, in module order.
        where: what to call the file in messages.

    Raises:
        ArtefactError: keys that are not understood, several components for a model that is one of them.
    """
    found: dict[str, Factors] = defaultdict(Factors)
    for key, tensor in tensors.items():
        module, what = _split(key)
        if not what:
            raise ArtefactError(f"{where}: {key!r} is no key of a diffusers LoRA file; rankwise cannot read such an adapter.")
        f = found[module]
        field = "A" if what in _FIRST else "B" if what in _SECOND else "alpha" if what == "alpha" else "magnitude"
        if getattr(f, field) is not None:
            raise ArtefactError(f"{where}: {module!r} has its {field} twice.")
        setattr(f, field, core.scalar(tensor, f"{where}: {key!r}") if field == "alpha" else tensor)
    known = core.by_module(specs)
    parts = {_component(m)[0] for m in found}
    if len(parts - {""}) > 1 and not any(m in known for m in found):
        raise ArtefactError(
            f"{where} adapts {', '.join(sorted(parts))}, and this model is one of them at most; put them under one module with "
            "children of these names (torch.nn.ModuleDict) and load the file there."
        )
    configs = _configs(metadata, parts, where)
    rename = core.align(found, known)
    real = {rename(m): m for m in found}
    if len(real) != len(found):
        raise ArtefactError(f"{where}: two names in the file lead to one module of the model.")

    def scale_of(module: str, rank: int, f: Factors) -> float:
        part, inner = _component(real[module])
        if part not in configs:
            return 1.0 if f.alpha in (None, 0.0) else f.alpha / rank  # type: ignore[operator]
        said, scale = cfg.scale_of(configs[part], inner)
        if said != rank:
            raise ArtefactError(f"{where}: {real[module]!r} has rank {rank}, and the file's header says {said}.")
        if f.alpha is not None and abs(f.alpha / rank - scale) > 1e-6 * abs(scale):
            raise ArtefactError(
                f"{where}: {real[module]!r} is scaled by {scale:g} in the header and by {f.alpha / rank:g} beside it."
            )
        return scale

    return core.on_sites({r: found[m] for r, m in real.items()}, specs, scale_of, where)


def _split(key: str) -> tuple[str, str]:
    """(module, what the tensor is) of a key; ("", "") for one of another scheme."""
    old = _PROCESSOR.match(key)
    if old:
        leaf = "to_out.0" if old["which"] == "out" else f"to_{old['which']}"
        return f"{old['at']}.{leaf}", f"lora.{old['side']}.weight"
    match = _KEY.match(key)
    return (match["module"], match["what"]) if match else ("", "")


def _component(module: str) -> tuple[str, str]:
    """("unet", the rest) where a name begins with a component's, else ("", the name)."""
    head, _, rest = module.partition(".")
    return (head, rest) if head in COMPONENTS and rest else ("", module)


def _configs(metadata: Mapping[str, str], parts: set[str], where: str) -> dict[str, dict[str, Any]]:
    """Each component's checked config, where the header has one."""
    if METADATA not in metadata:
        return {}
    data = tensorfile.strict_json(metadata[METADATA].encode("utf-8", "surrogatepass"), where)
    split: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in data.items():
        part, inner = _component(key)
        split[part][inner] = value
    if "" in split and parts != {""}:
        split = defaultdict(dict, {part: split[""] | split.get(part, {}) for part in parts})
    return {p: cfg.parse_config(json.dumps({"peft_type": "LORA", **c}).encode(), f"{where}'s header") for p, c in split.items()}
