"""Old spellings of public names: they work, with one DeprecationWarning each, until the release that `CHANGELOG.md` names.

Old modules are found by a finder at the end of ``sys.meta_path``; old classes by the module ``__getattr__`` of where they stood.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

#: old module → where its names are now, first match first
MODULES: dict[str, tuple[str, ...]] = {
    "rankwise.attach": ("rankwise.adapter", "rankwise.runtime.build", "rankwise.runtime.install", "rankwise.runtime.switch"),
    "rankwise.files": ("rankwise.adapter", "rankwise.runtime.write", "rankwise.runtime.read", "rankwise.runtime.tensors"),
    "rankwise.merging": ("rankwise.runtime.fold",),
    "rankwise.place": ("rankwise.runtime.forward", "rankwise.runtime.module_state"),
    "rankwise.roster": ("rankwise.runtime.registry", "rankwise.runtime.record"),
    "rankwise.view": ("rankwise.runtime.view", "rankwise.runtime.switch", "rankwise.runtime.context"),
    "rankwise.forms.fast": ("rankwise.runtime.fast",),
    "rankwise.merge.base": ("rankwise.merge.engine.base", "rankwise.merge.engine.result"),
    "rankwise.merge.stack": ("rankwise.merge.engine.stack",),
    "rankwise.merge.files": ("rankwise.merge.engine.files",),
    "rankwise.merge.folders": ("rankwise.merge.engine.folders",),
    "rankwise.merge.oracle": ("rankwise.merge.judge.evaluator", "rankwise.merge.judge.state_values"),
    "rankwise.merge.functional": ("rankwise.merge.judge.functional",),
    "rankwise.merge.held_out": ("rankwise.merge.judge.held_out",),
    "rankwise.merge.overlap": ("rankwise.merge.judge.overlap",),
    "rankwise.merge.interpolation": ("rankwise.merge.methods.interpolation",),
    "rankwise.merge.quality_diversity": ("rankwise.merge.methods.quality_diversity",),
    "rankwise.merge.signatures": ("rankwise.merge.methods.signatures",),
    "rankwise.merge.soups": ("rankwise.merge.methods.soups",),
    "rankwise.merge.straggler": ("rankwise.merge.methods.straggler",),
    "rankwise.merge.decoding": ("rankwise.decoding.model",),
    "rankwise.merge.logits": ("rankwise.decoding.combine",),
    "rankwise.store.peft_config": ("rankwise.store.peft.config",),
    "rankwise.store.peft_pack": ("rankwise.store.peft.pack",),
    "rankwise.store.peft_read": ("rankwise.store.peft.read", "rankwise.store.peft.folder"),
}

#: old class or function → new name, wherever it stands
NAMES: dict[str, str] = {
    "Bank": "SharedTensors",
    "HERE": "forward_context",
    "HeldOut": "HeldOutData",
    "Magnitude": "DoraLayer",
    "Oracle": "Evaluator",
    "Pair": "LoraLayer",
    "Place": "AdaptedModuleState",
    "Record": "AdapterRecord",
    "Roster": "AdapterRegistry",
    "SiteDelta": "AdapterLayer",
    "Tap": "AdapterBranch",
    "Voice": "DecodingModel",
    "roster_of": "registry_of",
}


def warn(old: str, new: str, stacklevel: int = 2) -> None:
    """One line that names the old and the new spelling."""
    warnings.warn(f"{old} is now {new}; the old spelling goes in rankwise 0.3.", DeprecationWarning, stacklevel=stacklevel + 1)


def old_names(module: str, *names: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that knows these old names.

    Args:
        module: ``__name__`` of the module.
        names: keys of :data:`NAMES` that stood there.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", f"{module}.{NAMES[name]}")
        return getattr(sys.modules[module], NAMES[name])

    return find


def renamed_attribute(cls: type, moved: Mapping[str, str]) -> None:
    """Take what a class of another package says under an old attribute as said under the new one."""
    for old, new in moved.items():
        if old in cls.__dict__ and new not in cls.__dict__:
            warn(f"{cls.__qualname__}.{old}", f"{cls.__qualname__}.{new}", stacklevel=3)
            setattr(cls, new, cls.__dict__[old])


def renamed_argument(old: str, new: str, values: Mapping[Any, Any] | None = None) -> Callable[[F], F]:
    """A decorator: the keyword ``old`` is taken as ``new``, with one warning; both at once are a TypeError, as Python has it.

    Args:
        old, new: spellings of the keyword.
        values: old value → new value, where values were renamed too; others stay.
    """

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{function.__qualname__}() got {new!r} twice: {old!r} is its old name")
                warn(f"The argument {old!r}", repr(new))
                given = kwargs.pop(old)
                kwargs[new] = (values or {}).get(given, given) if isinstance(given, str) else given
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return wrap


class _Old(types.ModuleType):
    """An old module: each name is fetched from where it is now."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for place in MODULES[self.__name__]:
                module = importlib.import_module(place)
                for spelled in (name, NAMES.get(name, name)):
                    if hasattr(module, spelled):
                        return getattr(module, spelled)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``rankwise.attach`` and ``rankwise.view`` are functions too, and importing the module binds it over the function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        warn(spec.name, MODULES[spec.name][0])
        return _Old(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def install() -> None:
    """Let Python find old modules; once."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.append(_Finder())
