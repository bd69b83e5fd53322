"""Two Triton kernels, shrink and expand, each for pieces of one row (decode) or of sixteen (prefill).

Weights are addressed as (buffer, offset of the page), never as pointers of their own, so that relocated pages, the
interpreter and captured graphs all work.  The grid is fixed by maxima: a program beyond the pieces of this step,
or beyond the pages of its piece, ends at once.  Products are summed in fp32; v stays in fp32.  WIDEN casts both sides of a
product first: for single rows, for sides of two dtypes, and in the interpreter, whose bf16 products are wrong.

A piece is four int32: its first row, its rows, the first of its pages in the list, its pages.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def shrink_kernel(
    x: Any, ldx: Any, stepx: Any, weights: Any, v: Any, pieces: Any, pages: Any, count: Any, inp: Any,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
) -> None:  # fmt: skip
    """v[pair, row, columns] = x[row] · A[page], one program a (piece, page)."""
    piece, c = tl.program_id(0), tl.program_id(1)
    if piece >= tl.load(count):
        return
    if c >= tl.load(pieces + piece * 4 + 3):
        return
    start, n = tl.load(pieces + piece * 4), tl.load(pieces + piece * 4 + 1)
    pair = tl.load(pieces + piece * 4 + 2) + c
    weights += tl.load(pages + pair).to(tl.int64) * inp * COLUMNS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(0, inp, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = tl.load(
            weights + i[:, None] * COLUMNS + columns[None, :], mask=(i < inp)[:, None] & (columns < COLUMNS)[None, :], other=0.0
        )
        at = x + (start + rows)[:, None].to(tl.int64) * ldx + i[None, :] * stepx
        b = tl.load(at, mask=(rows < n)[:, None] & (i < inp)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if ROWS == 1:
            total += tl.sum(tl.trans(b) * a, 0)[None, :]
        else:
            total += tl.dot(b, a, input_precision="ieee")
    out = v + (pair.to(tl.int64) * ROWS + rows[:, None]) * COLUMNS + columns[None, :]
    tl.store(out, total, mask=(rows < n)[:, None] & (columns < COLUMNS)[None, :])


@triton.jit
def expand_kernel(
    v: Any, weights: Any, y: Any, ldy: Any, stepy: Any, pieces: Any, pages: Any, count: Any, out: Any, module: Any, first: Any,
    page_numel: Any, chunk: Any, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """y[row, o] += Σ over the piece's pages of v[pair, row, module's components] · B[page], one program a (piece, block of o)."""
    piece = tl.program_id(0)
    if piece >= tl.load(count):
        return
    start, n = tl.load(pieces + piece * 4), tl.load(pieces + piece * 4 + 1)
    pair, many = tl.load(pieces + piece * 4 + 2), tl.load(pieces + piece * 4 + 3)
    rows, k = tl.arange(0, ROWS), tl.arange(0, PADDED)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # chunks lie one after the other, in each the components as rows
    inside = first * WIDTH * chunk + ((o // chunk) * WIDTH * chunk + o % chunk)[None, :] + k[:, None] * chunk
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for c in range(many):
        a = tl.load(
            v + ((pair + c).to(tl.int64) * ROWS + rows[:, None]) * COLUMNS + module * WIDTH + k[None, :],
            mask=(rows < n)[:, None] & (k < WIDTH)[None, :], other=0.0,
        )  # fmt: skip
        at = weights + tl.load(pages + pair + c).to(tl.int64) * page_numel + inside
        b = tl.load(at, mask=(k < WIDTH)[:, None] & (o < out)[None, :], other=0.0)
        if ROWS == 1:
            total += tl.sum(tl.trans(a) * b.to(tl.float32), 0)[None, :]
        else:
            total += tl.dot(a, b.to(tl.float32), input_precision="ieee")
    at = y + (start + rows)[:, None].to(tl.int64) * ldy + o[None, :] * stepy
    mask = (rows < n)[:, None] & (o < out)[None, :]
    tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + total).to(y.dtype.element_ty), mask=mask)
