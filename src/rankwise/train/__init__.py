"""Sessions, trainers, data and evaluation.  The package is callable: ``rw.train(model, tokenizer, data, recipe, …)``."""

from __future__ import annotations

import sys
import types
from typing import Any

from rankwise.train.run import train as _train


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
