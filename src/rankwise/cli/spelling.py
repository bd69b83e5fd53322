"""A library's sentence as a user of the command line can follow it: Python arguments become options."""

from __future__ import annotations

import re

#: argument → option, where a verb has one of its own
_OPTIONS = {
    "stage": "--stage", "fmt": "--format", "overlong": "--overlong", "max_length": "--max-length", "split": "--split",
    "eval_split": "--eval-split", "eval_data": "--eval-data", "rank": "--rank", "score": "--score", "seed": "--seed",
}  # fmt: skip
#: switches: (argument, value) → option
_SWITCHES = {("packing", "False"): "--no-packing", ("resume", "True"): "--resume", ("overwrite", "True"): "--overwrite"}
#: an option of a part → where --set finds it
_PARTS = {"keep": "form.keep", "adapters": "router.adapters"}
_WORDS = {
    "exclude", "targets", "layers", "rank_pattern", "alpha_pattern", "modules_to_save", "separate_tied", "optimizer", "losses", "normalize", "r", "alpha",
    "scale",
}  # fmt: skip
_GIVEN = re.compile(r"\b([a-z_]+)=('[^']*'|\"[^\"]*\"|\[[^\]]*\]|\{[^}]*\}|True|False|None|…|\.\.\.|-?\d[\w.]*)")
_TWICE = re.compile(r"(--[\w-]+(?: \S+?)?) \(\1\)")


def as_options(sentence: str) -> str:
    """``give packing=False`` → ``give --no-packing``; ``exclude=[…]`` → ``--set exclude=…``; what is no argument stays."""
    told = _GIVEN.sub(_option, sentence)
    for name, option in (("max_length", "--max-length"), ("eval_data", "--eval-data")):
        told = re.sub(rf"\b{name}\b(?! ?=)", option, told)
    told = re.sub(r"\bset --set\b", "give --set", told)
    told = re.sub(r"\boverwrite \(--overwrite\)", "--overwrite", told)
    told = re.sub(r"(--[\w-]+), \1", r"\1", told)
    return _TWICE.sub(r"\1", told)


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    if (name, value) in _SWITCHES:
        return _SWITCHES[name, value]
    plain = value.strip("'\"")
    if name in _OPTIONS:
        return f"{_OPTIONS[name]} {plain}"
    if name in _PARTS or name in _WORDS:
        return f"--set {_PARTS.get(name, name)}={_yaml(plain)}"
    return found[0]


def _yaml(value: str) -> str:
    """A Python value as --set takes it."""
    if value in ("True", "False", "None"):
        return {"True": "true", "False": "false", "None": "null"}[value]
    if value.startswith("{"):
        return "'" + value.replace("'", "").replace('"', "") + "'"
    return value.strip("[]").replace("'", "").replace(", ", ",") if value.startswith("[") else value
