"""How the product with a frozen weight runs: plain, packed once for oneDNN, or widened to fp32; a probe decides.

A frozen weight never changes, so its reordering for the matrix kernels can be paid once instead of at each
call.  Whether that gains anything depends on the processor (half the time on some, a few percent on others), so
:func:`probe` times it.  Processors without bf16 arithmetic run bf16 products in scalar loops, 10–60 times slower
than casting both sides to fp32 first: there ``widen`` is chosen, which holds no copy at all.

The weight itself always stays: its bits are what is read, saved and given back at detach.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLAIN, PACKED, WIDEN = "plain", "packed", "widen"
PACK_GAIN = 0.9  # packing holds up to two copies of W, so it must save at least a tenth of the time
WIDEN_GAIN = 0.8
SMALL = 1 << 16  # numbers of W below which the call itself is the time
WIDEN_BLOCK = 1 << 25  # numbers of W widened at a time (128 MiB in fp32)
SIDES, ROWS = (256, 512, 1024), (1, 16, 128, 1024)
NARROW = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class ProductChoice:
    """What :func:`probe` chose: ``kind`` (plain, packed, widen), its time over the plain product's, and why."""

    kind: str
    ratio: float
    why: str


class PackedWeight:
    """A frozen fp32 weight W (out×in) as oneDNN wants it: W for the output, Wᵀ for the input's gradient.

    Both are made when first needed, so a model that only infers never holds Wᵀ.  Either takes as many bytes as W.
    :meth:`holds` compares the very tensor, its memory and its version; a write through ``.data`` shows in none of
    them, so whoever writes W that way calls :meth:`release`.

    Args:
        weight: the frozen weight, fp32 on the CPU.
        rows: rows of a usual call, a hint for the layout; any number is computed rightly.
    """

    def __init__(self, weight: Tensor, rows: int = 1024):
        self.rows = rows
        self._weight = weakref.ref(weight)
        self._seen = _stamp(weight)
        self._forward: Tensor | None = None
        self._backward: Tensor | None = None

    def holds(self, weight: Tensor) -> bool:
        """True while ``weight`` is the tensor that was packed, unchanged."""
        return self._weight() is weight and self._seen == _stamp(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x·Wᵀ + bias for x: N×in; equal to the plain product within 1e-5 of its size."""
        if self._forward is None:
            self._forward = _pack(weight, self.rows)
        return _run(x, self._forward, bias)

    def dx(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy·W for dy: N×out."""
        if self._backward is None:
            self._backward = _pack(weight.detach().t().contiguous(), self.rows)
        return _run(dy, self._backward, None)

    def release(self, *, backward_only: bool = False) -> None:
        """Let the copies go (Wᵀ only, as in evaluation); the next call makes what it needs afresh."""
        self._backward = None
        if not backward_only:
            self._forward = None
            weight = self._weight()
            if weight is not None:
                self._seen = _stamp(weight)

    def nbytes(self) -> int:
        """Bytes the copies hold now, beside W itself."""
        return sum(4 * t.numel() for t in (self._forward, self._backward) if t is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied model packs its own weight, or stays plain

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None:
    return None


def _stamp(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def _run(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def packable(weight: Tensor) -> bool:
    """True for a frozen, plain fp32 matrix on the CPU, with oneDNN's operators in this torch."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not weight.requires_grad
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype, packed: PackedWeight | None) -> Tensor:
    """x·Wᵀ + bias in ``compute``; W is cast in blocks where it is stored narrower.

    Args:
        x: N×in.
        weight: out×in.
        bias: (out,) or None.
        compute: dtype of the product and of what is returned.
        packed: W packed for fp32, used where it still holds ``weight``.
    """
    x = x.to(compute)
    bias = bias if bias is None else bias.to(compute)
    if packed is not None and compute == torch.float32 and x.shape[0] and packed.holds(weight):
        return packed.linear(x, weight, bias)
    if weight.dtype == compute or weight.numel() <= WIDEN_BLOCK:
        return nn.functional.linear(x, weight.to(compute), bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in _blocks(weight):
        torch.mm(x, weight[rows].to(compute).t(), out=y[:, rows])
    return y if bias is None else y.add_(bias)


def dx(dy: Tensor, weight: Tensor, compute: torch.dtype, packed: PackedWeight | None) -> Tensor:
    """dy·W, the gradient of the input through the frozen weight.

    Args:
        dy: N×out in ``compute``.
        weight: out×in.
        compute: dtype of the product.
        packed: W packed for fp32, used where it still holds ``weight``.
    """
    if packed is not None and compute == torch.float32 and dy.shape[0] and packed.holds(weight):
        return packed.dx(dy, weight)
    if weight.dtype == compute or weight.numel() <= WIDEN_BLOCK:
        return dy @ weight.to(compute)
    out = dy.new_zeros(dy.shape[0], weight.shape[1])
    for rows in _blocks(weight):
        out.addmm_(dy[:, rows], weight[rows].to(compute))
    return out


def _blocks(weight: Tensor) -> list[slice]:
    step = max(1, WIDEN_BLOCK // weight.shape[1])
    return [slice(i, min(i + step, weight.shape[0])) for i in range(0, weight.shape[0], step)]


_choices: dict[tuple[Any, ...], ProductChoice] = {}


def probe(out: int, inp: int, dtype: torch.dtype, rows: int = 1024, *, training: bool = True, device: str = "cpu") -> ProductChoice:
    """How a frozen out×in product of ``rows`` rows runs best here; timed once per process, size class and thread count.

    The candidate and the plain product run in turn, so a busy neighbour slows both; the
    candidate must win by a margin (10 % packed, 20 % widened) in the median and in the best run, and agree in value.

    Args:
        out, inp: the weight's shape (timed at 256, 512 or 1,024 a side).
        dtype: the dtype the product would run in: the weight's, or autocast's.
        rows: rows of a call (timed at 1, 16, 128 or 1,024; at most 128 where bf16 may be slow).
        training: the input's gradient is needed too.
    """
    size = (_class(out, SIDES), _class(inp, SIDES), _class(rows, ROWS[:-1] if dtype in NARROW else ROWS))
    key = (*size, dtype, training, device, torch.get_num_threads())
    if key not in _choices:
        _choices[key] = _probe(*size, dtype, training, device)
    return _choices[key]


def chosen() -> list[list[Any]]:
    """What this process has chosen so far, as plain data: a run's state keeps it, for packed and plain products differ in their last bit."""
    return [[*key[:3], str(key[3]).removeprefix("torch."), *key[4:], c.kind, c.ratio] for key, c in _choices.items()]


def choose_again(kept: Iterable[Sequence[Any]]) -> None:
    """Take over the choices of :func:`chosen` instead of timing them anew, so that a resumed run gives the same bits."""
    for out, inp, rows, dtype, training, device, threads, kind, ratio in kept:
        if kind == PACKED and not packable(torch.zeros(1, 1)):
            continue  # another machine, which cannot; its bits were other ones already
        key = (out, inp, rows, getattr(torch, dtype), training, device, threads)
        _choices[key] = ProductChoice(kind, ratio, f"{kind}, as when the run began")


def _class(n: int, classes: tuple[int, ...]) -> int:
    """The smallest class that holds ``n``, or the largest."""
    return next((c for c in classes if n <= c), classes[-1])


@torch.no_grad()
def _probe(out: int, inp: int, rows: int, dtype: torch.dtype, training: bool, device: str) -> ProductChoice:
    if device != "cpu" or dtype not in (torch.float32, *NARROW):
        return ProductChoice(PLAIN, 1.0, f"{dtype} on {device} is left to torch")
    g = torch.Generator().manual_seed(0)
    W = torch.randn(out, inp, generator=g).div_(inp**0.5).to(dtype)
    x, dy = (torch.randn(rows, n, generator=g).to(dtype) for n in (inp, out))
    kind, margin = (WIDEN, WIDEN_GAIN) if dtype in NARROW else (PACKED, PACK_GAIN)
    if kind == PACKED and not packable(W):
        return ProductChoice(PLAIN, 1.0, "this torch has no packed oneDNN products")
    packed = PackedWeight(W, rows) if kind == PACKED else None

    def plain() -> Tensor:
        y = nn.functional.linear(x, W)
        return dy @ W if training else y

    def other() -> Tensor:
        y = linear(x, W, None, torch.float32, packed).to(dtype)
        return dx(dy.float(), W, torch.float32, packed).to(dtype) if training else y

    try:
        gap = float((other().float() - plain().float()).norm() / plain().float().norm())
    except RuntimeError as e:
        return ProductChoice(PLAIN, 1.0, f"the {kind} product failed: {str(e).splitlines()[0]}")
    if not gap <= (1e-5 if kind == PACKED else 1e-2):
        return ProductChoice(PLAIN, 1.0, f"the {kind} product is off by {gap:.1e}")
    ratio = _ratio(other, plain)
    chosen = kind if ratio <= margin else PLAIN
    return ProductChoice(
        chosen, ratio if chosen == kind else 1.0, f"{kind} takes {ratio:.2f} of the plain time at {out}×{inp}, {rows} rows"
    )


def _ratio(other: Any, plain: Any, most: int = 15, seconds: float = 0.6) -> float:
    """Time of ``other`` over ``plain``, run in turn, three rounds at least.

    The larger of the median ratio and the ratio of the fastest runs: a busy neighbour spoils one, rarely both.
    """
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < 3 or (len(times) < most and time.perf_counter() - start < seconds):
        t = time.perf_counter()
        other()
        middle = time.perf_counter()
        plain()
        times.append((middle - t, time.perf_counter() - middle))
    fastest = min(a for a, _ in times) / min(b for _, b in times)
    return max(statistics.median(a / b for a, b in times), fastest)


def choose(weight: Tensor, dtype: torch.dtype, rows: int = 1024, *, training: bool = True) -> ProductChoice:
    """:func:`probe` for one weight; plain for what is not a plain frozen matrix.

    Args:
        weight: out×in.
        dtype: of the product.
        rows: of x.
        training: whether the input's gradient is needed too.
    """
    if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2 or weight.requires_grad:
        return ProductChoice(PLAIN, 1.0, "not a plain frozen matrix")
    if weight.numel() < SMALL:
        return ProductChoice(PLAIN, 1.0, f"{weight.shape[0]}×{weight.shape[1]} is too small to gain")
    return probe(weight.shape[0], weight.shape[1], dtype, rows, training=training, device=weight.device.type)


class Product:
    """How one frozen weight's product runs in each dtype and number of rows, decided when first met; see :func:`probe`.

    Attributes:
        packed: the weight's copies, once a choice needed them.
        choices: what was chosen for (dtype, rows class, training), to be told.
    """

    def __init__(self) -> None:
        self.packed: PackedWeight | None = None
        self.choices: dict[tuple[torch.dtype, int, bool], ProductChoice] = {}

    def how(self, weight: Tensor, dtype: torch.dtype, rows: int, training: bool) -> tuple[PackedWeight | None, bool]:
        """(the packed weight or None, whether to widen) for :func:`rankwise.forms.fused.lora_linear`.

        Args:
            weight: out×in.
            dtype: of the product.
            rows: of x.
            training: whether the input's gradient is needed too.
        """
        key = (dtype, _class(rows, ROWS), training)
        choice = self.choices.get(key)
        if choice is None:
            choice = self.choices[key] = choose(weight, dtype, rows, training=training)
        if choice.kind != PACKED:
            return None, choice.kind == WIDEN
        if self.packed is None or not self.packed.holds(weight):
            self.packed = PackedWeight(weight, rows)
        if not training and not torch.is_grad_enabled():
            self.packed.release(backward_only=True)
        return self.packed, False

    def release(self) -> None:
        """Let every copy go: at detach, and whenever the weight was written through ``.data``."""
        self.packed = None

    def nbytes(self) -> int:
        return 0 if self.packed is None else self.packed.nbytes()

    def __deepcopy__(self, memo: dict[int, Any]) -> Product:
        return Product()

    def __reduce__(self) -> Any:
        return Product, ()
