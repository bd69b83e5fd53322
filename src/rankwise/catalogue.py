"""The registry of methods: :func:`register` is a class decorator; other packages use the entry-point group ``rankwise.methods``.

A kind (form, init, …) is a folder; a method is a file in it.  Folders are imported when a kind is first asked
for, so ``import rankwise`` stays light and a new file needs no edit anywhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import math
import numbers
import pkgutil
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from rankwise._renamed import warn
from rankwise.errors import OptionError, RankwiseError, nearest, unknown

#: kind → the folder whose files hold its methods
FOLDERS = {
    "form": "rankwise.forms",
    "init": "rankwise.inits",
    "router": "rankwise.routers",
    "optimizer": "rankwise.optim",
    "budget": "rankwise.budgets",
    "loss": "rankwise.losses",
    "merge": "rankwise.merge.methods",
    "logits": "rankwise.decoding",
    "codec": "rankwise.codecs",
    "policy": "rankwise.serve.policies",
}

T = TypeVar("T", bound=type)


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One registered method.

    Attributes:
        name, kind: "lora", "form".
        title: one line.
        paper: arXiv number or citation.
        reference: the three-digit number that ``docs/methods`` lists it under, or None.
        requires: words that the form's ``provides`` must hold (see :mod:`rankwise.recipe`).
        mergeable: whether it can be merged into the base weights.
        exports_to_peft: whether PEFT loads what it exports.
        options: name → default.
        doc: the class's docstring.
        cls: the class.
    """

    name: str
    kind: str
    title: str
    paper: str | None = None
    reference: str | None = None
    requires: tuple[str, ...] = ()
    mergeable: bool = True
    exports_to_peft: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    doc: str = ""
    cls: type = dataclasses.field(default=object, repr=False)


_methods: dict[tuple[str, str], MethodInfo] = {}
_read: set[str] = set()
_lock = threading.RLock()


def register(
    kind: str,
    name: str,
    *,
    title: str,
    paper: str | None = None,
    reference: str | None = None,
    requires: Iterable[str] = (),
    mergeable: bool = True,
    exports_to_peft: bool = False,
    needs: Iterable[str] | None = None,
) -> Callable[[T], T]:
    """Class decorator: register a dataclass as method ``name`` of ``kind``; its fields are the method's options.

    Where the class has ``typed = True``, :func:`make` checks each option's value against its annotation.

    Args:
        kind: "form", "init", "router", "optimizer", "budget", "loss", "merge", "logits", "codec" or "policy".
        name: what recipes and the command line call it.
        title: one line for ``rankwise methods``.
        paper: arXiv number or citation.
        reference: its number in ``docs/methods``.
        requires: words that the form's ``provides`` must hold.
        mergeable: whether it can be merged into the base weights.
        exports_to_peft: whether PEFT loads what it exports.
        needs: old spelling of ``requires``.

    Raises:
        RankwiseError: the name is taken by another class, or the class is not a dataclass.
    """

    if needs is not None:
        warn("register(needs=…)", "register(requires=…)")
        requires = needs

    def enter(cls: T) -> T:
        if not dataclasses.is_dataclass(cls):
            raise RankwiseError(f"{cls.__qualname__} must be a dataclass: its fields are the options of {name!r}.")
        old = _methods.get((kind, name))
        if old is not None and (old.cls.__module__, old.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RankwiseError(f"The {kind} {name!r} is already registered by {old.cls.__module__}; choose another name.")
        facts = (name, kind, title, paper, reference, tuple(requires), mergeable, exports_to_peft)
        info = MethodInfo(*facts, options=_options(cls), doc=(cls.__doc__ or "").strip(), cls=cls)
        _methods[kind, name] = info
        cls.info = info  # type: ignore[attr-defined]
        return cls

    return enter


def _options(cls: type) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if field.default_factory is not dataclasses.MISSING:
            out[field.name] = field.default_factory()
        else:
            out[field.name] = field.default
    return out


def _read_kind(kind: str) -> None:
    if kind not in FOLDERS:
        raise unknown("kind of method", kind, FOLDERS)
    with _lock:
        if kind in _read:
            return
        try:
            package = importlib.import_module(FOLDERS[kind])
        except ModuleNotFoundError as error:
            if error.name != FOLDERS[kind]:
                raise
            _read.add(kind)
            return
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{FOLDERS[kind]}.{module}")
        _read.add(kind)
        if "entry points" not in _read:
            _read.add("entry points")
            for point in importlib.metadata.entry_points(group="rankwise.methods"):
                point.load()


def methods(kind: str | None = None) -> list[MethodInfo]:
    """All registered methods, sorted by kind and name; ``kind`` keeps those of one."""
    for k in FOLDERS if kind is None else [kind]:
        _read_kind(k)
    return [info for (k, _), info in sorted(_methods.items()) if kind is None or k == kind]


def find(kind: str, name: str) -> MethodInfo:
    """The entry of method ``name``; UnknownName with the nearest names if there is none."""
    _read_kind(kind)
    info = _methods.get((kind, name))
    if info is None:
        raise unknown(kind, name, [n for k, n in _methods if k == kind])
    return info


def make(kind: str, name: str, **options: Any) -> Any:
    """An instance of method ``name`` with ``options``; an unknown option is refused with its nearest names."""
    info = find(kind, name)
    for option in options:
        if option not in info.options:
            raise OptionError(f"The {kind} {name!r} has no option {option!r}; {nearest(option, info.options)}")
    missing = [o for o, v in info.options.items() if v is dataclasses.MISSING and o not in options]
    if missing:
        raise OptionError(f"The {kind} {name!r} needs a value for {', '.join(missing)}.")
    if getattr(info.cls, "typed", False):
        for option, value in options.items():
            _fits(info, option, value)
    return info.cls(**options)


def _fits(info: MethodInfo, option: str, value: Any) -> None:
    """Refuse a value of another type than the option's annotation; numbers must be finite."""
    wanted = _annotation(info.cls, option)
    kinds = typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)
    if not any(_is(value, k) for k in kinds):
        said = " or ".join(_WORDS.get(k) or _spelled(k) for k in kinds)
        raise OptionError(f"The {info.kind} {info.name!r} takes {option} as {said}; it got {value!r}.")


def _annotation(cls: type, option: str) -> Any:
    """The type that ``option`` is annotated with where it is declared; other annotations may name types of a type checker only."""
    owner = next(c for c in cls.__mro__ if option in inspect.get_annotations(c))
    alone = types.SimpleNamespace(__annotations__={option: owner.__annotations__[option]})
    return typing.get_type_hints(alone, vars(sys.modules[owner.__module__]))[option]


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a word",
    type(None): "nothing",
}


def _spelled(kind: Any) -> str:
    return "one of " + ", ".join(map(repr, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else str(kind)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if kind in (int, float):
        whole = isinstance(value, numbers.Integral) if kind is int else isinstance(value, numbers.Real) and math.isfinite(value)
        return whole and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)  # what is no plain class the method checks itself
