"""What an evaluator needs of a value: exactly low-rank, its factors by tensor name, a digest of its content."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from rankwise.delta.lowrank import LowRank
from rankwise.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor

    from rankwise.delta.state import AdapterState


def plain(state: AdapterState) -> AdapterState:
    """Every site exactly low-rank, no whole tensors, or a refusal."""
    if state.full:
        raise MergeError(
            f"An evaluator judges changes of weights, and this value also holds {next(iter(state.full))!r} whole; leave it out."
        )
    return state.map(lambda d: _narrow(d if isinstance(d, LowRank) else d.to_lowrank()[0]))


def _narrow(d: LowRank) -> LowRank:
    """The same change in no more components than the matrix has rows or columns; differentiable, unlike an SVD of it."""
    out, inp = d.shape[-2:]
    if d.r <= min(out, inp):
        return d
    eye = torch.eye(min(out, inp), dtype=d.dtype, device=d.device)
    return LowRank(eye, d.dense()) if inp <= out else LowRank(d.dense(), eye)


def factors(state: AdapterState) -> dict[str, Tensor]:
    """A (r, in) and B·scale (out, r) of every site, named as the attached adapter names them; keeps the graph."""
    out: dict[str, Tensor] = {}
    for n, d in state.sites.items():
        out[f"{n}::A"], out[f"{n}::B"] = d.factors()  # type: ignore[attr-defined]
    return out


def digest(state: AdapterState) -> str:
    """A hash of what a value holds: kinds, scales, and every tensor's bytes."""
    h = hashlib.sha256()
    held = [(n, t) for n, t in state.full.items()]
    for n, d in state.sites.items():
        h.update(repr((n, d.kind, sorted(d.meta().items()))).encode())
        held += [(k, t) for k, t in sorted(d.tensors().items())]
    for n, t in held:
        h.update(repr((n, tuple(t.shape), t.dtype)).encode())
        h.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
