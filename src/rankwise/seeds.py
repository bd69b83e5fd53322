"""Random draws that depend on a name, never on the order of calls.

Every random draw uses a generator seeded by (run seed, purpose, name): two sites built in another
order, on another device or in another process get the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, purpose: str, name: str = "") -> int:
    """A 63-bit integer from (seed, purpose, name), stable across processes and platforms.

    >>> seed_of(0, "init", "layer.0") == seed_of(0, "init", "layer.0")
    True
    """
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """A CPU generator for one purpose and one name; draw on the CPU, then move."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, name))
