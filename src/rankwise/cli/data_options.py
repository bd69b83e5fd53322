"""Options of how data is read that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from rankwise.cli.common import err
from rankwise.errors import OptionError

Truncating = Annotated[
    str,
    typer.Option(
        help="Records longer than that: true (cut to it, as transformers' truncation), false (refused), split (windows of a text), "
        "auto (texts are split, others refused)."
    ),
]
Overlong = Annotated[str | None, typer.Option("--overlong", hidden=True, help="The old spelling of --truncation.")]
_VALUES: dict[str, Any] = {"auto": "auto", "split": "split", "true": True, "false": False}
_OLD = {"truncate": "true", "error": "false"}


def truncating(truncation: str, overlong: str | None) -> Any:
    """What ``--truncation`` says, or ``--overlong``, as it was called, with one line that it is old.

    Raises:
        OptionError: another value, or both.
    """
    if overlong is not None:
        if truncation != "auto":
            raise OptionError("--overlong is the old spelling of --truncation; give one of them.")
        truncation = _OLD.get(overlong, overlong)
        line = f"--overlong {overlong} is now --truncation {truncation}; the old spelling goes in rankwise 0.3."
        err.print(escape(line), style="yellow", highlight=False, soft_wrap=True)
    if truncation.lower() not in _VALUES:
        raise OptionError(f"--truncation is auto, true, false or split; it is {truncation!r}.")
    return _VALUES[truncation.lower()]
