"""rankwise: the whole life of a low-rank adapter, as one algebra.  See docs/design.md for the map."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankwise._renamed import install as _find_old_modules
from rankwise._version import __version__
from rankwise.adapter import attach
from rankwise.runtime.context import keep_view
from rankwise.runtime.switch import activate_adapters as activate
from rankwise.runtime.switch import view

_find_old_modules()

#: public name → module, read when first used, so that importing the package stays light; attach and view are read at
#: once, for a module and a function share those names
_PUBLIC = {
    "Adapter": "rankwise.adapter",
    "AdapterState": "rankwise.delta",
    "Recipe": "rankwise.recipe",
    "RankwiseError": "rankwise.errors",
    "Session": "rankwise.train.session",
    "adapters": "rankwise.adapter",
    "load": "rankwise.adapter",
    "methods": "rankwise.catalogue",
    "register": "rankwise.catalogue",
    "train": "rankwise.train.run",
}

__all__ = [*_PUBLIC, "__version__", "activate", "attach", "keep_view", "view"]

if TYPE_CHECKING:
    from rankwise.adapter import Adapter as Adapter
    from rankwise.adapter import adapters as adapters
    from rankwise.adapter import load as load
    from rankwise.catalogue import methods as methods
    from rankwise.catalogue import register as register
    from rankwise.delta import AdapterState as AdapterState
    from rankwise.errors import RankwiseError as RankwiseError
    from rankwise.recipe import Recipe as Recipe
    from rankwise.train.run import train as train
    from rankwise.train.session import Session as Session


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    path, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(path), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
