"""The delta operators by name; a file is read when its operator is asked for, so none needs another's libraries."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rankwise.errors import OptionError, unknown

if TYPE_CHECKING:
    from rankwise.serve.ops.base import LoraPages
    from rankwise.serve.ops.step import Op

OPS = {
    "auto": "auto:Auto",
    "reference": "reference:ReferenceOp",
    "bags": "bags:Bags",
    "grouped": "grouped:Grouped",
    "cat": "cat:ConcatOp",
    "native": "native:Native",
    "triton": "triton:Triton",
}


def make_op(name: str, pages: LoraPages, native: bool | None = None) -> Op:
    """The operator ``name`` on ``pages``; ``native`` lets "auto" build and use the C operator (None: as $RANKWISE_NATIVE says).

    Raises:
        UnknownName: no operator of that name.
        OptionError, MissingExtra: this machine, or the pages' dtype, cannot run it; the message says why.
    """
    if native is not None and name != "auto":
        raise OptionError(f"`native` is a choice of the operator 'auto'; here {name!r} was named, which is used as it is.")
    if name not in OPS:
        raise unknown("delta operator", name, OPS)
    module, _, cls = OPS[name].partition(":")
    make = getattr(importlib.import_module(f"{__package__}.{module}"), cls)
    op: Op = make(pages, native) if name == "auto" else make(pages)
    return op
