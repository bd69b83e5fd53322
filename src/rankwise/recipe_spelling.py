"""Other spellings of a recipe's fields: PEFT's, the trainers', and our own older ones."""

from __future__ import annotations

from typing import Any

from rankwise._renamed import warn
from rankwise.errors import RecipeError

#: PEFT's and the trainers' spellings → ours
ALIASES = {
    "additional_target": "modules_to_save",
    "exclude_modules": "exclude",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target": "targets",
    "lora_target_modules": "targets",
    "optim": "optimizer",
    "optimiser": "optimizer",
    "target_modules": "targets",
}
#: fields that had another name before: taken with a warning from people, without one from files
RENAMED = {"untie": "separate_tied"}
#: PEFT's switches → the fields they set
SWITCHES: dict[str, dict[str, Any]] = {"use_rslora": {"scale": "alpha/sqrt_r"}, "use_dora": {"form": "dora"}}
#: the form of what PEFT calls modules_to_save: a trained difference of the weight's own shape
MODULES_TO_SAVE = "dense"


def warned(fields: dict[str, Any]) -> dict[str, Any]:
    """Our older spellings as the new ones, with a warning each."""
    for old, new in RENAMED.items():
        if old in fields:
            warn(f"The recipe's field {old!r}", repr(new), stacklevel=3)
    return {RENAMED.get(k, k): v for k, v in fields.items()}


def renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as PEFT and the trainers spell them, in ours."""
    out: dict[str, Any] = {}
    for key, value in fields.items():
        if key in SWITCHES:
            if value:
                out |= SWITCHES[key]
            continue
        name = ALIASES.get(key, key)
        if name in out:
            raise RecipeError(f"{key!r} is another spelling of {name!r}; give one of them.")
        if key == "init_lora_weights":
            value = {True: None, "true": None, False: None}.get(value, value)
        out[name] = value
    return out


def lifted(fields: dict[str, Any]) -> dict[str, Any]:
    """Take rank, alpha, scale and dropout out of ``form={"name": …, "r": 16}``: they are the part's."""
    form = fields.get("form")
    if isinstance(form, dict):
        form = dict(form)
        for key in ("r", "alpha", "scale", "dropout", "lora_alpha", "lora_dropout"):
            if key in form:
                name = ALIASES.get(key, key)
                if name in fields and fields[name] != form[key]:
                    raise RecipeError(f"{name} is {fields[name]!r} in the recipe and {form[key]!r} inside form; give it once.")
                fields = {**fields, name: form.pop(key)}
        fields = {**fields, "form": form}
    return fields
