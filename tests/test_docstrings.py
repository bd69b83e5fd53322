"""Docstrings: examples run, and what takes four or more parameters says what they are."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rankwise
from rankwise.errors import MissingExtra

ROOT = Path(rankwise.__file__).parent
FROM = 4


def names() -> list[str]:
    """Every module of the package, by its file, so that none is left out for failing to import."""
    return ["rankwise", *sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "rankwise.", onerror=_raise))]


def _raise(name: str) -> None:
    raise AssertionError(f"the package {name} cannot be imported")


def file_of(name: str) -> Path:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


WITH_EXAMPLES = [n for n in names() if re.search(r"^\s*>>> ", file_of(n).read_text(encoding="utf-8"), re.MULTILINE)]
EXAMPLES = [
    pytest.param(test, id=test.name.removeprefix("rankwise."))
    for name in WITH_EXAMPLES
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)
    if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_runs(example: doctest.DocTest) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 0, "every line is skipped, so nothing is shown to work"


def test_each_module_with_an_example_has_one_that_runs() -> None:
    """A ``>>>`` outside a docstring would look like an example and never run."""
    ran = [f"rankwise.{p.id}." for p in EXAMPLES]
    assert WITH_EXAMPLES and not [n for n in WITH_EXAMPLES if not any(r.startswith(f"{n}.") for r in ran)]


# --- parameters -----------------------------------------------------------------------------------------------
def imported(name: str) -> ModuleType | None:
    """The module, or None where it needs a library that this machine lacks (Ray; Triton where there is none)."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lacking = error.__cause__ if isinstance(error, MissingExtra) else error
        if not isinstance(lacking, ModuleNotFoundError) or (lacking.name or "rankwise").split(".")[0] == "rankwise":
            raise
        return None


def public() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, function, what is said of it) of each public function, method and class that its own module defines."""
    for name in names():
        if any(part.startswith("_") for part in name.split(".")):
            continue
        module = imported(name)
        if module is None:
            continue
        for thing in vars(module).values():
            if getattr(thing, "__module__", None) != name or getattr(thing, "__name__", "_").startswith("_"):
                continue
            if inspect.isfunction(thing):
                yield f"{name}.{thing.__qualname__}", thing, thing.__doc__ or ""
            elif inspect.isclass(thing):
                yield from _of_class(f"{name}.{thing.__qualname__}", thing)


def _of_class(name: str, cls: type) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """What a class itself defines.  Of its ``__init__`` the class's docstring may tell; of a method also the seam that it fills."""
    for attribute, value in vars(cls).items():
        value = getattr(value, "__func__", value)  # of class and static methods
        function = inspect.unwrap(value) if callable(value) else value
        if not inspect.isfunction(function) or function.__module__ != cls.__module__:
            continue
        if attribute == "__init__":
            fields = dataclasses.is_dataclass(cls) and "Attributes:" in (cls.__doc__ or "")
            yield name, function, f"{cls.__doc__ or ''}\n{function.__doc__ or ''}" + ("\nArgs:" if fields else "")
        elif not attribute.startswith("_"):
            said = [getattr(vars(c).get(attribute), "__doc__", None) or "" for c in cls.__mro__]
            yield f"{name}.{attribute}", function, "\n".join(said)


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names but self and cls, with ``*args`` and ``**kwargs``."""
    found = list(inspect.signature(function).parameters)
    return found[1:] if found[:1] in (["self"], ["cls"]) else found


def helped(function: Callable[..., Any]) -> bool:
    """Whether each parameter has a ``help`` of its own: the command line's verbs, whose docstring is what ``--help`` prints."""
    hints = typing.get_type_hints(function, include_extras=True) if "rankwise.cli" in function.__module__ else {}
    return all(any(getattr(m, "help", None) for m in getattr(hints.get(n), "__metadata__", ())) for n in parameters(function))


def offenders() -> list[str]:
    """Public functions of four or more parameters without an ``Args:`` section."""
    many = {n: (f, doc) for n, f, doc in public() if len(parameters(f)) >= FROM}
    return sorted(n for n, (f, doc) in many.items() if not re.search(r"^\s*Args:\s*$", doc, re.MULTILINE) and not helped(f))


def test_the_check_sees_what_it_should() -> None:
    found = {n: (parameters(f), doc) for n, f, doc in public()}
    assert parameters(rankwise.attach) == ["model", "recipe", "calibration", "name", "activate"]
    session, attach = found["rankwise.train.session.Session"], next(v for k, v in found.items() if k.endswith(".attach"))
    assert "lr" in session[0] and "Args:" in session[1] and "recipe" in attach[0] and "Args:" in attach[1]
    assert len(found) > 1000, len(found)


def test_four_parameters_are_told_of() -> None:
    found = offenders()
    assert not found, "no 'Args:' section: " + ", ".join(found)
