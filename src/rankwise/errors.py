"""Every error a user can cause: what came, what was expected, what to do.

All derive from :class:`RankwiseError`, so a caller can catch the family; the command line turns each
into one line and exit status 2.  A refusal is a feature: `RecipeError` names the two parts that cannot
live together, `ArtefactError` is the only thing a bad file may raise.

A message that advises an option holds an :class:`Option` there, not its name as text, so that each face can spell it
as its users type it: ``max_length`` in Python, ``--max-length`` on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Callable, Iterable
from typing import Any


class _No(enum.Enum):
    """The value of an option that is only named (an enum, so that it is itself after pickling)."""

    VALUE = enum.auto()


@dataclasses.dataclass(frozen=True)
class Option:
    """An option inside a message; as text, it is spelled as a Python argument.

    Attributes:
        name: of the argument, as the Python functions have it.
        value: what to give it; without one the option is only named.  ``...`` stands for what only the user knows.

    Example:
        >>> str(Option("truncation", True)), str(Option("exclude", [...])), str(Option("max_length"))
        ('truncation=True', 'exclude=[…]', 'max_length')
    """

    name: str
    value: Any = _No.VALUE

    @property
    def valued(self) -> bool:
        return self.value is not _No.VALUE

    def __str__(self) -> str:
        return self.name if not self.valued else f"{self.name}={_python(self.value)}"


def _python(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return "…" if value is ... else repr(value)


class RankwiseError(Exception):
    """Base of every error with a user-facing cause.  The message is complete sentences.

    Its arguments are the message in pieces: text, and an :class:`Option` where one is advised.

    Example:
        >>> error = OptionError("The row is too long; raise ", Option("max_length"), ".")
        >>> str(error), error.option, error.told(lambda o: "--max-length")
        ('The row is too long; raise max_length.', 'max_length', 'The row is too long; raise --max-length.')
    """

    def __str__(self) -> str:
        return self.told(str)

    @property
    def option(self) -> str | None:
        """The name of the first option that the message advises; None where it advises none."""
        return next((part.name for part in self.args if isinstance(part, Option)), None)

    def told(self, spell: Callable[[Option], str]) -> str:
        """The message, each option in it as ``spell`` has it."""
        return "".join(spell(part) if isinstance(part, Option) else str(part) for part in self.args)


class UnknownName(RankwiseError):
    """A method, option, target, adapter or key that does not exist; the message lists the nearest names."""


class OptionError(RankwiseError):
    """An option's value is outside what its method can take (rank 0, negative alpha, …)."""


class RecipeError(RankwiseError):
    """Parts of a recipe that cannot live together; names both, the reason and the change to make."""


class TargetError(RankwiseError):
    """A target matched nothing, or matched a layer that the form cannot adapt."""


class AttachError(RankwiseError):
    """The model is not in a state in which an adapter can be put in, switched or taken out."""


class ViewError(RankwiseError):
    """A view asks for something this call cannot give (unknown adapter, rows that do not fit)."""


class ArtefactError(RankwiseError):
    """A file from outside is damaged, hostile, for another base, or of an unknown version."""


class DataError(RankwiseError):
    """Training data that cannot be used; carries the file and line where known."""


class TrainingError(RankwiseError):
    """Training had to stop (non-finite loss, dead gradients); the last good state is kept."""


class MergeError(RankwiseError):
    """A merge that would not compute what its parts compute."""


class MissingExtra(RankwiseError, ImportError):
    """An optional library is not installed; the message gives the `pip install` line."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A half-sentence with the names closest to ``name``: ``"did you mean 'lora' or 'dora'?"``."""
    choices = sorted(set(known))
    close = difflib.get_close_matches(name, choices, n=n, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return f"known: {shown or 'none'}."


def unknown(what: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for an unknown ``name`` of sort ``what``, with its nearest names."""
    return UnknownName(f"No {what} is called {name!r}; {nearest(name, known)}")


def need(module: str, extra: str, why: str | Option) -> MissingExtra:
    """The error for an optional library that is not installed."""
    return MissingExtra(why, f" needs {module!r}, which is not installed; run: pip install 'rankwise[{extra}]'.")
