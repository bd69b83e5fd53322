"""What the first device tells the others between collectives: plain values, pickled over a pipe between our own processes."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import NonLoraChange
    from rankwise.serve.batch import Span
    from rankwise.serve.ops.base import Pairs


@dataclasses.dataclass(frozen=True, slots=True)
class Build:
    """Sizes and choices, the same on all devices.

    Attributes:
        blocks, page, max_rows, row_tokens: of the key-value cache and its tables, as a runner takes them.
        lora_pages: how many there are.
        split, op, native: see :class:`.device.DevicePages`.
        pack, loop: as a runner takes them.
    """

    blocks: int
    page: int
    max_rows: int
    lora_pages: int
    split: str
    op: str
    native: bool | None
    pack: bool | None
    loop: bool | None
    row_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """An adapter enters ``pages``; ``pairs`` are the receiver's slices."""

    pages: tuple[int, ...]
    split: bool
    pairs: Mapping[str, Pairs]


@dataclasses.dataclass(frozen=True, slots=True)
class Acts:
    """What acts on one slot's rows: its pages, the groups its adapter touches, and the receiver's part of what is no pair."""

    pages: tuple[int, ...]
    groups: tuple[str, ...]
    non_lora_changes: Mapping[str, tuple[NonLoraChange, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class StepMessage:
    """One step: its spans in packed order, the slots in it that are new to the receiver, and those that it may forget."""

    spans: tuple[Span, ...]
    slots: Mapping[int, Acts]
    gone: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """Nothing more comes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """From another device to the first: ``loaded``, ``ready`` or, with why, ``failed``."""

    what: str
    why: str = ""


def packed(message: Any) -> bytes:
    """As it goes through a pipe; a tensor goes by value."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def tell(to: Connection, message: Any) -> None:
    """Send.  OSError where nobody is there to receive."""
    to.send_bytes(packed(message))


def hear(source: Connection) -> Any:
    """The next message; EOFError where none can come any more."""
    return pickle.loads(source.recv_bytes())
