"""kohya's LoRA files (sd-scripts, and the web interfaces): module paths with underscores for dots, down, up and alpha.

``lora_unet_<module with _ for .>.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` (a number) and LyCORIS's
``.dora_scale``.  The multiplier is α/r with the tensor's own r, always: LyCORIS writes a rank-stabilised run's α as
α·√r, so a file never says which it was, and neither does this writer.  Without ``.alpha`` (or with 0) it is 1.

Underscores cannot be turned back into dots by a rule: names are looked up among the model's own, and two modules with
one name are refused.  SDXL files name the U-Net's blocks as its first code did; both names lead to the module.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import ArtefactError, OptionError, nearest
from rankwise.store import interchange as core
from rankwise.store.interchange import Factors
from rankwise.store.peft import pack as packing
from rankwise.store.sgm import layout, old_names

if TYPE_CHECKING:
    from rankwise.delta.state import AdapterState
    from rankwise.store.peft.info import PeftInfo

FILE = "lora.safetensors"
#: component → the prefixes that files use for it, the one written first
PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet", "lora_transformer"),
    "prior": ("lora_prior_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
_ALL = tuple(dict.fromkeys(p for ps in PREFIXES.values() for p in ps))
_KEY = re.compile(r"^(?P<name>lora_[^.]+)\.(?P<what>lora_down\.weight|lora_up\.weight|alpha|dora_scale)$")
_OTHER = re.compile(r"\.(hada_w\d|lokr_w\d|oft_|boft_|diff|on_input|lora_mid|a1\.|b1\.)")


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether these are a kohya file's tensor names."""
    return any(k.startswith("lora_") and k.partition(".")[2].startswith(("lora_", "hada_", "lokr_")) for k in keys)


def export_kohya(
    path: str | os.PathLike[str],
    state: AdapterState,
    specs: Mapping[str, Any],
    *,
    magnitude: Mapping[str, Tensor] | None = None,
    component: str = "unet",
    prefix: str | None = None,
) -> Path:
    """Write ``state`` as one kohya file (``path``, or ``lora.safetensors`` in it); returns the file's path.

    Args:
        magnitude: DoRA's row norms (out,) by site, as LyCORIS's ``dora_scale`` (out, 1…).
        component: what the model is in the pipeline; "" where the modules' names begin with it already.
        prefix: instead of the component's own, e.g. ``lora_te1`` for SDXL's first text encoder.

    Raises:
        ArtefactError: two modules with one name, a change that is not low-rank, a place the format cannot hold.
    """
    table = _table(core.by_module(specs))
    tensors: dict[str, Tensor] = {}
    for p in core.pieces(state, specs, magnitude or {}, "kohya's format"):
        name = _name(p.spec.module, component, prefix)
        _one(table[name], name)
        packed, rank = packing.to_peft(p.spec, p.A, p.B)
        tensors |= {
            f"{name}.lora_down.weight": packed["lora_A.weight"],
            f"{name}.lora_up.weight": packed["lora_B.weight"],
            f"{name}.alpha": torch.tensor(p.scale * rank, dtype=torch.float32),
        }
        if p.magnitude is not None:
            tensors[f"{name}.dora_scale"] = p.magnitude.reshape(-1, 1, *[1] * len(p.spec.kernel))
    file = core.target(path, ".safetensors", FILE)
    return core.write_tensors(file, tensors, {"ss_network_module": "networks.lora"})


def read_kohya(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], specs: Mapping[str, Any], where: str
) -> tuple[AdapterState, PeftInfo]:
    """(state, info) of a kohya file's tensors.

    Args:
        tensors: of the file.
        metadata: of the file.
        specs: every site of the model, in module order.
        where: what to call the file in messages.

    Raises:
        ArtefactError: other LyCORIS forms (LoHa, LoKr …), names that no module or several modules of the model have.
    """
    files: dict[str, Factors] = defaultdict(Factors)
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            form = _OTHER.search(key)
            what = f"a tensor of another LyCORIS form ({form[1]})" if form else "no key of a kohya LoRA file"
            raise ArtefactError(f"{where}: {key!r} is {what}; rankwise reads lora_down, lora_up, alpha and dora_scale.")
        f, what = files[match["name"]], match["what"]
        if what == "alpha":
            f.alpha = core.scalar(tensor, f"{where}: {key!r}")
        elif what == "dora_scale":
            f.magnitude = _norms(tensor, files[match["name"]], tensors.get(f"{match['name']}.lora_up.weight"), key, where)
        else:
            setattr(f, "A" if what.startswith("lora_down") else "B", tensor)
    table = _table(core.by_module(specs))
    found: dict[str, Factors] = {}
    for name, f in files.items():
        if name not in table:
            raise ArtefactError(
                f"{where} adapts {name!r}, which no module of this model is called; {nearest(name, table)} Several components "
                "in one file load on one module with children of these names (torch.nn.ModuleDict)."
            )
        module = _one(table[name], name)
        if module in found:
            raise ArtefactError(f"{where}: {module!r} is adapted twice, under two names.")
        found[module] = f
    return core.on_sites(found, specs, lambda _, rank, f: f.alpha / rank if f.alpha else 1.0, where)


def _name(module: str, component: str, prefix: str | None) -> str:
    """What a file calls ``module``."""
    head, _, rest = module.partition(".")
    if not component and head in PREFIXES:
        component, module = head, rest
    if component not in PREFIXES:
        raise OptionError(
            f"kohya's format has no component {component!r} for {module!r}; give component= one of {', '.join(PREFIXES)}."
        )
    if prefix is not None and prefix not in _ALL:
        raise OptionError(f"kohya's format has no prefix {prefix!r}; it knows {', '.join(_ALL)}.")
    return f"{prefix or PREFIXES[component][0]}_{module.replace('.', '_')}"


def _table(modules: Iterable[str]) -> dict[str, list[str]]:
    """File name → modules of the model that bear it: under their component's prefixes, or all where it is a component itself."""
    modules = list(dict.fromkeys(modules))
    parted = {m.partition(".")[0] for m in modules} & set(PREFIXES)
    layouts = {part: layout([m.removeprefix(f"{part}.") for m in modules if m.startswith(part)]) for part in parted or {""}}
    out: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        head, _, rest = module.partition(".")
        if parted and head not in parted:
            continue
        inner = rest if parted else module
        for prefix in PREFIXES[head] if parted else _ALL:
            names = [inner]
            if prefix == "lora_unet":
                names += old_names(inner, layouts[head if parted else ""])
            elif prefix.startswith("lora_te"):  # transformers 5 dropped this segment of CLIP's names
                names.append(inner.removeprefix("text_model.") if inner.startswith("text_model.") else f"text_model.{inner}")
            for n in names:
                known = out[f"{prefix}_{n.replace('.', '_')}"]
                if module not in known:
                    known.append(module)
    return dict(out)


def _one(modules: list[str], name: str) -> str:
    if len(modules) > 1:
        raise ArtefactError(f"The name {name!r} stands for {' and for '.join(map(repr, modules[:3]))}: underscores hide the dots.")
    return modules[0]


def _norms(tensor: Tensor, f: Factors, up: Tensor | None, key: str, where: str) -> Tensor:
    """DoRA's norm of each output row; LyCORIS's norms of the inputs are another method."""
    out = up.shape[0] if up is not None and up.dim() else -1
    if tensor.dim() < 2 or tensor.shape[0] != out or tensor.numel() != out:
        raise ArtefactError(
            f"{where}: {key!r} is {tuple(tensor.shape)}; rankwise reads one norm an output row, ({out}, 1…). "
            "Norms of the inputs (LyCORIS without wd_on_output) are another method."
        )
    return tensor.reshape(-1)
