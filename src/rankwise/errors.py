"""Every error a user can cause: what came, what was expected, what to do.

All derive from :class:`RankwiseError`, so a caller can catch the family; the command line turns each
into one line and exit status 2.  A refusal is a feature: `RecipeError` names the two parts that cannot
live together, `ArtefactError` is the only thing a bad file may raise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """Base of every error with a user-facing cause.  The message is complete sentences."""


class UnknownName(RankwiseError):
    """A method, option, target, adapter or key that does not exist; the message lists the nearest names."""


class OptionError(RankwiseError):
    """An option's value is outside what its method can take (rank 0, negative alpha, …)."""


class RecipeError(RankwiseError):
    """Parts of a recipe that cannot live together; names both, the reason and the change to make."""


class TargetError(RankwiseError):
    """A target matched nothing, or matched a place that the form cannot adapt."""


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


def need(module: str, extra: str, why: str) -> MissingExtra:
    """The error for an optional library that is not installed."""
    return MissingExtra(f"{why} needs {module!r}, which is not installed; run: pip install 'rankwise[{extra}]'.")
