"""Strict reading and deterministic writing of safetensors: every claim of a header is checked before it is believed.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the raw C-order data.  A file is data, never code:
there is no unpickler here, and pickled files are refused by name and by their first bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ArtefactError
from rankwise.store.names import open_at, open_inside

MAX_HEADER = 16 << 20
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
MAX_DIMS = 32
MAX_BYTES = 1 << 40  # of one tensor to be saved; a stride-0 view of 2^62 elements is a lie, not a tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)  # possessive: linear in the header, whatever it holds


def read_tensors(
    folder: str | os.PathLike[str], name: str, *, allow_nonfinite: bool = False, mapped: bool = False, at: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one safetensors file in ``folder``.

    Peak memory is one file (``mapped=True``: pages as they are touched, private to this process).  ``at`` is the
    folder's descriptor where several of its files must be of one version.

    Args:
        folder: of the file.
        name: of the file.
        allow_nonfinite: take NaN and infinities.
        mapped: map the file instead of reading it.
        at: the folder's descriptor; None: it is opened.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError: everything else that can be wrong with it.
    """
    refuse_pickle(name, b"")
    fd = open_inside(folder, name) if at is None else open_at(at, folder, name)
    where = f"{os.fspath(folder)}/{name}"
    try:
        size = os.fstat(fd).st_size
        if mapped and size:
            buffer: Any = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
        else:
            buffer = _read_all(fd, size, where)
    except OSError as e:
        raise ArtefactError(f"{where} cannot be read: {e.strerror or e}.") from e
    finally:
        os.close(fd)
    return parse(buffer, where, allow_nonfinite=allow_nonfinite)


def read_small(folder: str | os.PathLike[str], name: str, limit: int, *, at: int | None = None) -> bytes:
    """The bytes of a small file in ``folder``; ArtefactError beyond ``limit`` bytes.

    Args:
        folder: of the file.
        name: of the file.
        limit: bytes at the most.
        at: the folder's descriptor; None: it is opened.
    """
    fd = open_inside(folder, name) if at is None else open_at(at, folder, name)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ArtefactError(f"{name} has {size} bytes; the limit is {limit}.")
        return bytes(_read_all(fd, size, name))
    except OSError as e:
        raise ArtefactError(f"{name} cannot be read: {e.strerror or e}.") from e
    finally:
        os.close(fd)


def parse(buffer: Any, where: str, *, allow_nonfinite: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (views of ``buffer``, which must be writable) and metadata of safetensors bytes."""
    table, metadata, start = read_header(buffer, where)
    tensors = {n: _tensor(buffer, dtype, shape, start + begin, end - begin) for n, (dtype, shape, begin, end) in table.items()}
    if not allow_nonfinite:
        for dtype, begin, end, names in _runs(table):
            run = _tensor(buffer, dtype, (-1,), start + begin, end - begin)
            for name in names if not all_finite(run) else ():  # one look at many tensors; only a bad run is looked at singly
                _check_values(tensors[name], f"{where}: tensor {name!r}", False)
    return tensors, metadata


def _runs(table: Mapping[str, Entry]) -> list[tuple[torch.dtype, int, int, list[str]]]:
    """Stretches of bytes whose tensors are of one floating dtype: (dtype, begin, end, names)."""
    out: list[tuple[torch.dtype, int, int, list[str]]] = []
    for name, (dtype, _, begin, end) in sorted(table.items(), key=lambda item: item[1][2:]):
        if end == begin or not dtype.is_floating_point:
            continue
        if out and out[-1][0] == dtype and out[-1][2] == begin:
            out[-1][3].append(name)
            out[-1] = (dtype, out[-1][1], end, out[-1][3])
        else:
            out.append((dtype, begin, end, [name]))
    return out


Entry = tuple[torch.dtype, tuple[int, ...], int, int]


def read_header(buffer: Any, where: str) -> tuple[dict[str, Entry], dict[str, str], int]:
    """({name: (dtype, shape, begin, end)}, metadata, start of the data), all checked against the real size."""
    size = len(buffer)
    bad = _complain(where)
    if size < 10:
        raise bad(f"it has {size} bytes, too few for a safetensors file")
    if bytes(buffer[8:9]) != b"{":  # a length of 640 begins like a pickle; a header does not
        refuse_pickle("", bytes(buffer[:8]), where)
    length = int.from_bytes(buffer[:8], "little")
    if length > MAX_HEADER:
        raise bad(f"its header claims {length} bytes; the limit is {MAX_HEADER}")
    if 8 + length > size:
        raise bad(f"its header claims {length} bytes, but only {size - 8} follow: it is cut short")
    raw = bytes(buffer[8 : 8 + length])
    if not raw.startswith(b"{"):
        raise bad("its header does not begin with '{'")
    skeleton = _STRING.sub(b"", raw)  # what JSON will allocate is bounded before it is parsed
    entries = skeleton.count(b"{")
    if entries > MAX_TENSORS + 2 or skeleton.count(b"[") > 2 * entries or skeleton.count(b",") > 8 * entries + 1000:
        raise bad(f"its header lists more than it could hold (the limit is {MAX_TENSORS} tensors)")
    header = strict_json(raw, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise bad("its metadata is not a map of strings to strings")
    if len(header) > MAX_TENSORS:
        raise bad(f"it lists {len(header)} tensors; the limit is {MAX_TENSORS}")
    table = {name: _entry(name, value, bad) for name, value in header.items()}
    _check_offsets(table, size - 8 - length, bad)
    return table, metadata, 8 + length


def strict_json(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object; duplicate keys, NaN, bad UTF-8 and bottomless nesting are errors."""
    bad = _complain(where)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            raise bad("its JSON has a key twice")
        return out

    def constant(text: str) -> Any:
        raise bad(f"its JSON holds {text}")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise bad(f"its JSON cannot be read ({type(e).__name__})") from e
    if not isinstance(value, dict):
        raise bad("its JSON is not an object")
    return value


def refuse_pickle(name: str, first: bytes, where: str = "") -> None:
    """ArtefactError for files that other tools would unpickle, by their suffix or their first bytes."""
    magic = first[:4] in {b"PK\x03\x04", b"PK\x05\x06"} or first[:2] in {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
    if name.lower().endswith(_PICKLED) or magic or first[:6] == b"\x93NUMPY":
        raise ArtefactError(
            f"{where or name} is a pickled file, which can run code when it is opened; rankwise reads only .safetensors. "
            "Ask its author for one, or convert it on a machine you can afford to lose."
        )


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Safetensors bytes in pieces; the same tensors and metadata give the same bytes in every process.

    Raises:
        ArtefactError: a tensor that has no plain bytes (sparse, meta, quantised, complex, nested, a subclass that
            hides its storage) or a name or count beyond the limits.
    """
    if len(tensors) > MAX_TENSORS:
        raise ArtefactError(f"{len(tensors)} tensors cannot be saved in one file; the limit is {MAX_TENSORS}.")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pieces: list[bytes | memoryview] = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-_itemsize(*item), item[0])):
        if not isinstance(name, str) or not name or name == "__metadata__" or len(_utf8(name)) > MAX_NAME_BYTES:
            raise ArtefactError(f"{name!r} cannot name a tensor in a file.")
        if tensor.dim() > MAX_DIMS:
            raise ArtefactError(f"Tensor {name!r} has {tensor.dim()} dimensions; the limit is {MAX_DIMS}.")
        data = tensor_bytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + len(data)]}
        pieces.append(data)
        offset += len(data)
    raw = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise ArtefactError(f"The header of the file would take {len(raw)} bytes; the limit is {MAX_HEADER}.")
    return [len(raw).to_bytes(8, "little"), raw, *pieces]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The C-order bytes of a plain tensor (a view of its memory where it is contiguous on the CPU)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def digest(tensors: Mapping[str, Tensor], salt: str = "") -> str:
    """SHA-256 over ``salt`` and every tensor's name, dtype, shape and bytes, by sorted name."""
    h = hashlib.sha256(salt.encode())
    for name in sorted(tensors):
        t = tensors[name]
        h.update(f"\0{name}\0{_NAMES[t.dtype]}\0{list(t.shape)}\0".encode())
        h.update(tensor_bytes(t))
    return h.hexdigest()


def _itemsize(name: str, tensor: Any) -> int:
    """Bytes an element; refuses what is not a plain dense tensor."""
    if not isinstance(tensor, Tensor):
        raise ArtefactError(f"{name!r} is a {type(tensor).__name__}, not a tensor.")
    why = ""
    if tensor.layout != torch.strided:
        why = f"it is {str(tensor.layout).removeprefix('torch.')}"
    elif tensor.device.type == "meta":
        why = "it is on the meta device and has no values (it was not gathered before saving)"
    elif tensor.is_quantized or tensor.is_nested or type(tensor) not in (Tensor, torch.nn.Parameter):
        why = f"it is a {type(tensor).__name__} that hides its storage"
    elif tensor.dtype not in _NAMES:
        why = f"its dtype {tensor.dtype} has no place in the format"
    elif tensor.numel() * tensor.element_size() > MAX_BYTES:
        why = f"it claims {tensor.numel()} elements"
    if why:
        raise ArtefactError(f"Tensor {name!r} cannot be saved: {why}.")
    return tensor.element_size()


def _entry(name: str, value: Any, bad: Callable[[str], ArtefactError]) -> Entry:
    """One tensor's line of the header, shape against bytes."""
    if not name or len(_utf8(name)) > MAX_NAME_BYTES:
        raise bad(f"a tensor's name has {len(_utf8(name))} bytes; 1 to {MAX_NAME_BYTES} are allowed")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad(f"tensor {name!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise bad(f"tensor {name!r} has no valid shape (at most {MAX_DIMS} dimensions)")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"tensor {name!r} has no valid offsets")
    if max(shape, default=0) >= 1 << 62 or math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise bad(f"tensor {name!r} of {dtype} {shape[:8]} does not fill its {offsets[1] - offsets[0]} bytes")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _check_offsets(table: Mapping[str, Entry], size: int, bad: Callable[[str], ArtefactError]) -> None:
    """No holes, no overlaps, no tail."""
    at = 0
    for name, (_, _, begin, end) in sorted(table.items(), key=lambda item: (item[1][2], item[1][3])):
        if begin != at:
            raise bad(f"tensor {name!r} begins at byte {begin} where {at} was expected")
        at = end
    if at != size:
        raise bad(f"its tensors end at byte {at} of {size}: it is {'cut short' if at > size else 'followed by something else'}")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...], at: int, nbytes: int) -> Tensor:
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=nbytes, offset=at)
    if dtype == torch.bool and int(raw.max()) > 1:
        raise ArtefactError("A tensor of booleans holds other bytes than 0 and 1.")
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(shape)


def _check_values(tensor: Tensor, what: str, allow_nonfinite: bool) -> None:
    if not allow_nonfinite and tensor.is_floating_point() and not all_finite(tensor):
        raise ArtefactError(f"{what} holds values that are not finite.")


def all_finite(tensor: Tensor) -> bool:
    """Whether every number is finite: a finite sum says so at once; else the numbers are looked at, in pieces, without a second copy."""
    flat = tensor.reshape(-1)
    if bool(torch.isfinite(flat.sum(dtype=torch.float64 if flat.dtype == torch.float64 else torch.float32))):
        return True
    return all(bool(torch.isfinite(p.float() if p.element_size() == 1 else p).all()) for p in flat.split(1 << 20))


def _read_all(fd: int, size: int, where: str) -> bytearray:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        n = os.readv(fd, [view[done:]]) if hasattr(os, "readv") else _read_into(fd, view[done:])
        if n == 0:
            raise ArtefactError(f"{where} became shorter while it was read.")
        done += n
    return buffer


def _read_into(fd: int, view: memoryview) -> int:
    data = os.read(fd, min(len(view), 1 << 24))
    view[: len(data)] = data
    return len(data)


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _complain(where: str) -> Callable[[str], ArtefactError]:
    return lambda what: ArtefactError(f"{where} is not a valid file: {what}.")
