"""Optimiser state as nested dicts: merge, free, count, copy, without knowing which transform made it.

Everything under a key that is a parameter's name belongs to that parameter (a coordinate ``name::part`` to ``name``);
all other keys are structure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor

from rankwise.optim.base import PART, State


def owner(key: str, names: Collection[str]) -> str | None:
    """The parameter that a key of the tree belongs to, or None for structure."""
    if key in names:
        return key
    head = key.split(PART)[0]
    return head if PART in key and head in names else None


def merge(tree: State, new: State) -> None:
    """Add the entries of ``new`` that ``tree`` lacks, in place."""
    for key, value in new.items():
        if key not in tree:
            tree[key] = value
        elif isinstance(value, dict) and isinstance(tree[key], dict):
            merge(tree[key], value)


def free(tree: State, gone: Collection[str], names: Collection[str]) -> None:
    """Delete all that belongs to the parameters ``gone``, in place."""
    for key in list(tree):
        who = owner(key, names)
        if who in gone:
            del tree[key]
        elif who is None and isinstance(tree[key], dict):
            free(tree[key], gone, names)


def tensors(tree: State, names: Collection[str], who: str | None = None) -> Iterator[tuple[str | None, Tensor]]:
    """Every (owner, tensor) of the tree."""
    for key, value in tree.items():
        mine = who or owner(key, names)
        if isinstance(value, dict):
            yield from tensors(value, names, mine)
        elif isinstance(value, Tensor):
            yield mine, value


def elements(tree: State, names: Collection[str]) -> dict[str, int]:
    """How many tensor elements each parameter's state holds (Python numbers are not counted)."""
    out: dict[str, int] = {}
    for who, tensor in tensors(tree, names):
        out[who or ""] = out.get(who or "", 0) + tensor.numel()
    return out


def copied(tree: Any, names: Collection[str], place: Callable[[str | None, Tensor], Tensor], who: str | None = None) -> Any:
    """A deep copy of the tree with each tensor replaced; other leaves are kept.

    Args:
        tree: nested dicts.
        names: of all parameters.
        place: (owner or None, tensor) → the tensor's copy.
        who: the owner of the tree itself, where there is one.
    """
    if isinstance(tree, dict):
        return {k: copied(v, names, place, who or owner(k, names)) for k, v in tree.items()}
    return place(who, tree) if isinstance(tree, Tensor) else tree
