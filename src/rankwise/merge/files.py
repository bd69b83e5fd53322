"""Merged values and the model: read an adapter's folder as a value, attach a value as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rankwise.delta import AdapterState
from rankwise.errors import MergeError, OptionError
from rankwise.merge.base import merge_states

if TYPE_CHECKING:
    from rankwise.adapter import Adapter


def read_state(model: nn.Module, folder: str | Path, *, rank: int | None = None) -> AdapterState:
    """A folder's adapter as a value against the untouched base of ``model``, which is left as it was.

    ``rank`` cuts every site to it; without, a change that is not exactly low-rank (DoRA …) is refused.
    """
    from rankwise.files import load

    name = f"__reading {folder}".replace("/", " ").replace("\\", " ")[:120]
    adapter = load(model, folder, name=name, activate=False)
    try:
        return adapter.lower(rank=rank)
    except OptionError as error:
        raise MergeError(f"{folder}: {error}") from error
    finally:
        adapter.detach()


def attach_state(model: nn.Module, state: AdapterState, *, name: str = "merged", activate: bool = True) -> Adapter:
    """Attach a low-rank value as an ordinary ``lora`` adapter of uneven ranks.

    A sum of so many adapters that its factors are wider than the matrix is written in as few as that has rows or columns.
    """
    from rankwise.files import rebuild
    from rankwise.recipe import Recipe

    wide = {n for n, d in state.sites.items() if (d.exact_rank or 0) > min(d.shape[-2:])}
    if wide:
        cut = {n: d.to_lowrank(rank=min(d.shape[-2:]))[0] if n in wide else d for n, d in state.sites.items()}
        state = AdapterState(cut, state.full, state.meta)

    ranks = {n: int(d.exact_rank or 0) for n, d in state.sites.items()}
    recipe = Recipe(form="lora", targets=list(ranks), r=max(ranks.values()))
    entry = {
        "part": {"form": "lora", "targets": list(ranks), "r": max(ranks.values())},
        "ranks": ranks,
        "scales": dict.fromkeys(ranks, 1.0),
    }
    tensors: dict[str, Tensor] = {}
    for n, d in state.sites.items():
        A, B = d.factors()  # type: ignore[attr-defined]
        tensors |= {f"{n}::A": A, f"{n}::B": B}
    return rebuild(model, recipe, {"parts": [entry], "states": {}}, tensors, name, activate)


def attach_merged(
    model: nn.Module,
    folders: Sequence[str],
    method: str = "cat",
    weights: Sequence[float] | None = None,
    *,
    name: str = "merged",
    source_rank: int | None = None,
    **options: Any,
) -> Adapter:
    """Read adapter folders (cut to ``source_rank`` where given), merge them, attach the result."""
    states = [read_state(model, f, rank=source_rank) for f in folders]
    return attach_state(model, merge_states(states, weights, method, **options), name=name)
