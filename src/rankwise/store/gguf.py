"""GGUF adapters: the file that llama.cpp's ``--lora`` takes, as its own converter writes it from a PEFT folder.

``general.type`` = adapter, ``adapter.type`` = lora, ``general.architecture``, and one ``adapter.lora.alpha``; a weight's pair
is ``<gguf name>.weight.lora_a`` (r×in) and ``.lora_b`` (out×r).  llama.cpp multiplies by α/r with the tensor's own r and
knows nothing else: whatever does not fit one α (rsLoRA, patterns) is in B.

Two layouts differ from ours.  In the ``llama`` architecture the rows of q and k lie as RoPE's pairs (2i, 2i+1) instead of
halves, so B's rows are permuted head by head; ``token_embd``'s A is stored as vocab×r.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import ArtefactError, OptionError, need
from rankwise.store import interchange as core
from rankwise.store.atomic import replace_file
from rankwise.store.interchange import Factors

if TYPE_CHECKING:
    from rankwise.delta.state import AdapterState
    from rankwise.sites.spec import SiteSpec
    from rankwise.store.peft.info import PeftInfo

FILE = "adapter.gguf"
#: transformers' model_type → (GGUF's architecture, whether q and k are permuted)
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False),
    "gemma": ("gemma", False), "gemma2": ("gemma2", False), "gemma3_text": ("gemma3", False), "phi3": ("phi3", False),
}  # fmt: skip
_DTYPES = {"f32": (torch.float32, 0), "f16": (torch.float16, 1)}


def export_gguf(
    path: str | os.PathLike[str],
    state: AdapterState,
    specs: Mapping[str, Any],
    config: Any,
    *,
    magnitude: Mapping[str, Tensor] | None = None,
    dtype: str = "f32",
) -> Path:
    """Write ``state`` as one GGUF adapter (``path``, or ``adapter.gguf`` in it), read it again, and return the file's path.

    Args:
        config: the model's config; its ``model_type`` decides the architecture, its heads the order of rows.
        dtype: "f32" or "f16", of all factors.

    Raises:
        ArtefactError: DoRA, whole tensors, tied embeddings, an architecture or a module without a name in GGUF.
        MissingExtra: the package ``gguf`` is not installed.
    """
    gguf = _gguf()
    if dtype not in _DTYPES:
        raise OptionError(f"A GGUF adapter's dtype is f32 or f16, not {dtype!r}.")
    if magnitude:
        raise ArtefactError(
            f"GGUF has no place for DoRA's magnitudes ({sorted(magnitude)[0]!r} …); merge the adapter, or lower it to a rank first."
        )
    arch, names = _names(gguf, config)
    found = core.pieces(state, specs, {}, "GGUF", kinds=("linear", "embedding"))
    alpha = _alpha(found)
    tensors: list[tuple[str, Tensor]] = []
    for p in found:
        name = _gguf_name(names, p.spec)
        factor = p.scale * p.rank / alpha
        B = p.B if abs(factor - 1) < 1e-6 else (p.B.double() * factor).to(p.B.dtype)
        rows = _rows(p.spec, config)
        A, B = p.A.mT if p.spec.kind == "embedding" else p.A, B if rows is None else B[rows]
        for side, t in (("a", A), ("b", B)):
            cast = t.detach().cpu().to(_DTYPES[dtype][0]).contiguous()
            if not bool(torch.isfinite(cast).all()):
                raise ArtefactError(f"The factors of {p.spec.name!r} do not fit {dtype}; write dtype='f32'.")
            tensors.append((f"{name}.lora_{side}", cast))
    file = core.target(path, ".gguf", FILE)
    replace_file(file, [_bytes(gguf, arch, alpha, tensors, _DTYPES[dtype][1])])
    read_gguf(file, specs, config)
    return file


def read_gguf(path: str | os.PathLike[str], specs: Mapping[str, Any], config: Any) -> tuple[AdapterState, PeftInfo]:
    """(state, info) of a GGUF adapter for the model of ``config``: fp32 factors in our layout, quantised ones decoded.

    Raises:
        ArtefactError: no GGUF adapter, another architecture, tensors that lead to no module.
        MissingExtra: the package ``gguf`` is not installed.
    """
    gguf = _gguf()
    where = os.fspath(path)
    arch, names = _names(gguf, config)
    try:
        reader = gguf.GGUFReader(where)
        said = {k: f.contents() if (f := reader.get_field(k)) else None for k in _KEYS}
        tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()).float() for t in reader.tensors}
    except Exception as error:  # a parser of C structs: whatever it trips over is the file's fault
        raise ArtefactError(f"{where} is no readable GGUF file: {error}") from error
    if said["general.type"] != "adapter" or said["adapter.type"] != "lora":
        raise ArtefactError(f"{where} is a GGUF {said['general.type'] or 'model'}, not a LoRA adapter.")
    if said["general.architecture"] != arch:
        raise ArtefactError(f"{where} is for the architecture {said['general.architecture']!r}; this model is {arch!r}.")
    if said["adapter.alora.invocation_tokens"]:
        raise ArtefactError(
            f"{where} acts only after its invocation tokens (activated LoRA); rankwise cannot read such an adapter."
        )
    alpha = core.scalar(torch.tensor(float(said["adapter.lora.alpha"] or 0.0)), f"{where}: adapter.lora.alpha")
    modules = {names.get_name(f"{m}.weight", try_suffixes=(".weight",)): m for m in core.by_module(specs)}
    known = core.by_module(specs)
    found: dict[str, Factors] = {}
    for name, t in tensors.items():
        base, _, side = name.rpartition(".lora_")
        if side not in ("a", "b") or base not in modules:
            raise ArtefactError(f"{where}: the tensor {name!r} belongs to no module of this model.")
        spec = known[modules[base]]
        f = found.setdefault(spec.module, Factors())
        if side == "a":
            f.A = t.mT.contiguous() if spec.kind == "embedding" else t
        else:
            rows = _rows(spec, config)
            if rows is not None and rows.numel() == t.shape[0]:
                t = torch.empty_like(t).index_copy_(0, rows, t)
            f.B = t
    return core.on_sites(found, specs, lambda _, rank, f: alpha / rank if alpha else 1.0, where)


_KEYS = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha", "adapter.alora.invocation_tokens")


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise need("gguf", "gguf", "A GGUF adapter") from error
    return gguf


def _names(gguf: Any, config: Any) -> tuple[str, Any]:
    """(architecture, gguf's own map of tensor names) of the model of ``config``."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ArtefactError(
            f"rankwise knows no GGUF architecture for a model of type {kind!r}; it knows {', '.join(ARCHITECTURES)}. Merge the adapter "
            "and convert the whole model instead."
        )
    arch = ARCHITECTURES[kind][0]
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    return arch, gguf.get_tensor_name_map(number, config.num_hidden_layers)


def _gguf_name(names: Any, spec: SiteSpec) -> str:
    if spec.tie_group:
        raise ArtefactError(
            f"{spec.name!r} is tied to another module; llama.cpp would put its factors, laid out for one end, into the other too. "
            "Merge the adapter instead."
        )
    name = names.get_name(f"{spec.module}.weight", try_suffixes=(".weight",))
    if name is None:
        raise ArtefactError(f"GGUF has no name for {spec.module!r} in this architecture; leave it out of the adapter, or merge.")
    return str(name)


def _rows(spec: SiteSpec, config: Any) -> Tensor | None:
    """Which of our rows stands at each row of GGUF's q or k: halves of a head become pairs; None where they are equal."""
    leaf = spec.module.rpartition(".")[2]
    if not ARCHITECTURES[config.model_type][1] or leaf not in ("q_proj", "k_proj"):
        return None
    heads = config.num_attention_heads if leaf == "q_proj" else (config.num_key_value_heads or config.num_attention_heads)
    return torch.arange(spec.out).reshape(heads, 2, spec.out // heads // 2).transpose(1, 2).reshape(-1)


def _alpha(found: list[core.WeightChange]) -> float:
    """The commonest α = s·r, as fp32 holds it: its modules are written to the bit."""
    common = Counter(round(p.scale * p.rank, 6) for p in found if p.scale > 0).most_common(1)
    return float(torch.tensor(common[0][0], dtype=torch.float32)) if common else 1.0


def _bytes(gguf: Any, arch: str, alpha: float, tensors: list[tuple[str, Tensor]], file_type: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        writer = gguf.GGUFWriter(file, arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(file_type)
        for name, t in sorted(tensors):
            writer.add_tensor(name, t.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()
