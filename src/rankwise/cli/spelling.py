"""How the command line spells an option that a message advises: the flag of the verb, or ``--set field=value``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.errors import Option

#: option → the flag that says it, where the verb has that flag
FLAGS = {
    "base": "--base",
    "codec": "--codec",
    "dtype": "--dtype",
    "eval_data": "--eval-data",
    "eval_split": "--eval-split",
    "fmt": "--format",
    "force": "--force",
    "max_length": "--max-length",
    "overwrite": "--overwrite",
    "packing": "--packing",
    "rank": "--rank",
    "reference": "--reference",
    "resume": "--resume",
    "split": "--split",
    "stage": "--stage",
    "together": "--together",
    "truncation": "--truncation",
}
#: option of a recipe or a method → the field of --set that says it, where the verb has --set
FIELDS = {
    "adapters": "router.adapters",
    "exclude": "exclude",
    "keep": "form.keep",
    "normalize": "normalize",
    "optimizer": "optimizer",
    "rank_pattern": "rank_pattern",
}
#: option → why no verb says it
PYTHON_ONLY = {"energy": "convert cuts to a rank"}


def spelled(option: Option, flags: Mapping[str, bool]) -> str:
    """An option as it is typed after a verb; the Python argument where the verb has none for it.

    Args:
        option: inside a message.
        flags: the verb's flags, and whether each is a switch.
    """
    flag, field = FLAGS.get(option.name), FIELDS.get(option.name)
    if flag is not None and flag in flags:
        if not option.valued:
            return flag
        if not flags[flag]:
            return f"{flag} {_typed(option.value)}"
        switch = flag if option.value else "--no-" + flag.removeprefix("--")
        return switch if switch in flags else str(option)
    if field is not None and "--set" in flags:
        return f"--set {field}={_typed(option.value)}" if option.valued else f"--set {field}"
    return str(option)


def flags_of(command: Any) -> dict[str, bool]:
    """The flags of a verb, and whether each is a switch."""
    found = {}
    for parameter in command.params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            found[flag] = bool(getattr(parameter, "is_flag", False))
    return found


def _typed(value: Any) -> str:
    """A Python value as it is typed: YAML, without what a shell would take."""
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{k}: {_typed(v)}" for k, v in value.items()) + "}'"
    if isinstance(value, list):
        return ",".join(map(_typed, value))
    plain = {True: "true", False: "false", None: "null", ...: "…"}
    return plain[value] if isinstance(value, bool) or value is None or value is ... else str(value)
