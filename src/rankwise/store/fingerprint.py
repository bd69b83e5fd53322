"""Which base an adapter belongs to, in a few hundred bytes: class, configuration, shapes, and a sample of the weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
        content: also hash a sample of the values.
    """
    shapes: dict[str, list[Any]] = {}
    names, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(tensors if tensors is not None else base_tensors(model), key=lambda item: item[0]):
        line = f"{name}\0{list(tensor.shape)}\0{_dtype(tensor)}\n"
        names.update(line.encode())
        _count(shapes, name, tensor)
        if content:
            values.update(name.encode() + b"\0" + _sample(tensor))
    return {
        "architecture": _architecture(model),
        "config": _config_hash(model),
        "names": names.hexdigest(),
        "content": values.hexdigest() if content else "",
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
    if same and a.get("content") and b.get("content") and a["content"] != b["content"]:
        out.append("content: the weights' values differ, though every shape is equal (another checkpoint, or a merged base)")
    return out


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
