"""Which base an adapter belongs to, in a few hundred bytes: class, configuration, shapes, and checksums of its values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: what a fingerprint holds: 1 (no such key) a sample of each tensor; 2 also checksums of all of it and of the buffers
VERSION = 2
#: elements of every tensor that the content hash looks at
SAMPLE = 64
#: configuration keys that say nothing about the weights
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "architectures",
        "tie_word_embeddings",
        "problem_type",
        "loss_type",
    }
)


def fingerprint(model: nn.Module, tensors: Iterable[tuple[str, Tensor]] | None = None, *, content: bool = True) -> dict[str, Any]:
    """What identifies ``model`` as a base: JSON-able, equal before and after an adapter was attached.

    Args:
        model: the base (adapted or not); only its class, its configuration and its own parameters are read.
        tensors: (name, base tensor) pairs to use instead of the model's parameters, where a merge or `full`
            has changed them in place.
        content: also hash the values: a sample of each tensor, exact integer checksums of every plain one (the same on any
            device; of sharded bases none, of quantised weights the sample alone), and the persistent float buffers.
    """
    shapes: dict[str, list[Any]] = {}
    names, values, whole, buffers = (hashlib.sha256() for _ in range(4))
    known = content
    for name, tensor in sorted(tensors if tensors is not None else base_tensors(model), key=lambda item: item[0]):
        line = f"{name}\0{list(tensor.shape)}\0{_dtype(tensor)}\n"
        names.update(line.encode())
        _count(shapes, name, tensor)
        if content:
            values.update(name.encode() + b"\0" + _sample(tensor))
            known = known and tensor.device.type != "meta" and not hasattr(tensor, "full_tensor")
            if known:
                whole.update(name.encode() + b"\0" + _checksum(tensor))
    for name, buffer in base_buffers(model) if known else ():
        buffers.update(name.encode() + b"\0" + _checksum(buffer))
    return {
        "architecture": _architecture(model),
        "config": _config_hash(model),
        "names": names.hexdigest(),
        "content": values.hexdigest() if content else "",
        "version": VERSION,
        "whole": whole.hexdigest() if known else "",
        "buffers": buffers.hexdigest() if known else "",
        "shapes": shapes,
    }


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters as they are stored (past properties of adapted classes), each storage once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if path == "rankwise" or path.startswith("rankwise."):
            continue
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield (f"{path}.{name}" if path else name), p


def base_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's persistent floating buffers (a BatchNorm's running statistics), by name."""
    for path, module in model.named_modules():
        if path == "rankwise" or path.startswith("rankwise."):
            continue
        for name, b in sorted(module._buffers.items()):
            if (
                b is not None
                and name not in module._non_persistent_buffers_set
                and b.is_floating_point()
                and b.device.type != "meta"
            ):
                yield (f"{path}.{name}" if path else name), b


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Differences between two fingerprints as sentences; empty where an adapter of ``a`` fits ``b`` exactly.

    They name shapes and places; where every shape is equal, the sentences begin with ``content``.
    """
    out = []
    if a.get("architecture") != b.get("architecture"):
        out.append(f"the class is {b.get('architecture')!r}, not {a.get('architecture')!r}")
    left, right = a.get("shapes", {}), b.get("shapes", {})
    for key in sorted(set(left) | set(right)):
        if key not in right:
            out.append(f"{key} {_say(left[key])} is missing")
        elif key not in left:
            out.append(f"{key} {_say(right[key])} is new")
        elif list(left[key]) != list(right[key]):
            out.append(f"{key} is {_say(right[key])}, not {_say(left[key])}")
    if not out and a.get("names") != b.get("names"):
        out.append("the parameters' names or shapes differ")
    same = not out
    if same and a.get("config") != b.get("config"):
        out.append("content: the configuration differs, though every shape is equal")
    if same and any(a.get(k) and b.get(k) and a[k] != b[k] for k in ("content", "whole")):
        out.append("content: the weights' values differ, though every shape is equal (another checkpoint, or a merged base)")
    if same and a.get("buffers") and b.get("buffers") and a["buffers"] != b["buffers"]:
        out.append("content: the buffers' values differ (running statistics that training moved, or another checkpoint)")
    return out


def _checksum(tensor: Tensor, width: int = 1024) -> bytes:
    """Row and column sums (wrapping int64, so exact in any order and on any device) of all bytes as an n/1024 × 1024 table of int32."""
    if hasattr(tensor, "__tensor_flatten__") or getattr(tensor, "quant_state", None) is not None:
        return _sample(tensor)  # a device may round codes its own way
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = data.numel() // (4 * width) * 4 * width
    table = data[:whole].view(torch.int32).view(-1, width)
    sums = [table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64), data[whole:]]
    return b"".join(s.cpu().contiguous().numpy().tobytes() for s in sums)


def _count(shapes: dict[str, list[Any]], name: str, tensor: Tensor) -> None:
    """Group equal layers: ``layers.#.q_proj.weight`` → [shape, dtype, how many]."""
    template = re.sub(r"(?<![^.])\d+(?![^.])", "#", name)
    key = template
    extra = 1
    while key in shapes and shapes[key][:2] != [list(tensor.shape), _dtype(tensor)]:
        extra += 1
        key = f"{template} ({extra})"  # layers of unequal shape
    entry = shapes.setdefault(key, [list(tensor.shape), _dtype(tensor), 0])
    entry[2] += 1


def _say(entry: Any) -> str:
    shape, dtype, count = entry
    return f"{count}× {'×'.join(map(str, shape)) or 'scalar'} {dtype}"


def _sample(tensor: Tensor) -> bytes:
    """The bytes of up to SAMPLE evenly spaced elements, the first and the last among them."""
    n = tensor.numel()
    if n == 0 or tensor.device.type == "meta":
        return b""
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "full_tensor"):  # torchao's: codes and scales, not a DTensor
        return b"".join(_sample(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # bitsandbytes': codes alone do not tell the weight; its scales may be coded once more
        nested = getattr(state, "state2", None)
        scales = [state.absmax, getattr(state, "offset", None), getattr(nested, "absmax", None)]
        plain = tensor.detach().as_subclass(Tensor)
        return _sample(plain) + b"".join(_sample(t) for t in scales if isinstance(t, Tensor))
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().contiguous().reshape(-1)
    index = torch.linspace(0, n - 1, min(n, SAMPLE), dtype=torch.float64).long().to(flat.device)
    picked = flat[index].cpu().contiguous()
    return picked.view(torch.uint8).numpy().tobytes()


def _architecture(model: nn.Module) -> str:
    """The class's name; a class made by attaching names the one it was made from."""
    return next((c.__name__ for c in type(model).__mro__ if not c.__module__.startswith("rankwise")), type(model).__name__)


def _config_hash(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict):
        return ""
    kept = {k: v for k, v in to_dict().items() if k not in _VOLATILE and not k.startswith("_attn")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
