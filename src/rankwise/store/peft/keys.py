"""The keys of a PEFT file: which are factors of which module, and which are tensors of their own."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import TYPE_CHECKING

from rankwise.errors import ArtefactError
from rankwise.sites.spec import SiteSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    #: (module, nesting) → {part: tensor}
    Found = dict[tuple[str, int], dict[str, Tensor]]

PREFIXES = ("base_model.model.", "base_model.", "")
SUFFIX = re.compile(
    r"^(?P<path>.*?)(?P<nest>(\.base_layer)*)\.(?P<what>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?)$"
)
NAMED = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.[^.]+(\.weight|\.bias)?$")


def sort_keys(tensors: Mapping[str, Tensor], where: str) -> tuple[Found, dict[str, Tensor]]:
    """(factors by module and nesting, all other tensors by name); every key is one or the other, or refused."""
    found: Found = defaultdict(dict)
    plain: dict[str, Tensor] = {}
    if not tensors:
        raise ArtefactError(f"{where} holds no tensors at all.")
    prefix = next(p for p in PREFIXES if all(k.startswith(p) for k in tensors))
    for key, tensor in tensors.items():
        if not tensor.numel():
            raise ArtefactError(f"{where}: tensor {key!r} is empty; it was not gathered before saving.")
        name = key.removeprefix(prefix)
        match = SUFFIX.match(name)
        if match:
            what = match["what"].removesuffix(".weight").replace("lora_embedding_", "lora_")
            parts = found[match["path"], match["nest"].count(".base_layer")]
            if what in parts:
                raise ArtefactError(f"{where}: {match['path']!r} has {what} twice.")
            parts[what] = tensor
        elif NAMED.search(name):
            raise ArtefactError(
                f"{where}: key {key!r} has an adapter's name in it; it is a raw state dict. Save it with PEFT's save_pretrained."
            )
        else:
            plain[name] = tensor
    return found, plain


def guess_specs(found: Found, plain: Mapping[str, Tensor], where: str) -> dict[str, SiteSpec]:
    """Sites made up from shapes, where there is no model to ask."""
    out = {}
    for (module, nest), parts in found.items():
        A, B = parts.get("lora_A"), parts.get("lora_B")
        if nest or A is None or B is None or A.dim() < 2 or B.dim() < 2:
            raise ArtefactError(f"{where}: {module!r} cannot be read without the model it belongs to.")
        conv = A.dim() > 2
        if not conv and A.shape[0] != B.shape[1]:
            raise ArtefactError(f"{where}: {module!r} has A of rank {A.shape[0]} and B of rank {B.shape[1]}.")
        spec = SiteSpec(name=module, module=module, out=B.shape[0], inp=A[0].numel(), kernel=tuple(A.shape[2:]))
        out[module] = dataclasses.replace(spec, kind="conv") if conv else spec
    for name in plain:
        module, _, param = name.rpartition(".")
        out[name] = SiteSpec(name=name, module=module, param=param, kind="plain", mode="plain", out=1, inp=1)
    return out


def join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
