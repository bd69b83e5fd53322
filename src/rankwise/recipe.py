"""One validated description of which parts a run uses; the same words in Python, YAML and on the command line.

A recipe names its parts (form, init, router, budget, optimizer, losses) as strings or as ``{"name": …, options…}``.
Parts are checked against each other by declared needs before anything is built: what a part *needs* must be in
what the form *gives*.  Nothing is silently ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from rankwise import catalogue
from rankwise.errors import OptionError, RankwiseError, RecipeError, nearest, unknown
from rankwise.recipe_spelling import ALIASES, MODULES_TO_SAVE, RENAMED, lifted, renamed, warned

if TYPE_CHECKING:
    from rankwise.sites.site import Site

Named = str | dict[str, Any] | None

#: combinations of parts that a paper names as one method: preset → the recipe's fields
PRESETS: dict[str, dict[str, Any]] = {}


def preset(name: str, title: str, **fields: Any) -> None:
    """Enter a method that consists of several parts (AdaLoRA: form, budget, loss)."""
    PRESETS[name] = {"title": title, **fields}


class Part(pydantic.BaseModel):
    """What is put at one set of layers: form, init and router with rank and scale."""

    model_config = pydantic.ConfigDict(extra="forbid", validate_assignment=True)

    form: Named = "lora"
    r: int = 8
    alpha: float | None = None
    scale: Literal["alpha/r", "alpha/sqrt_r", "constant"] = "alpha/r"
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    exclude: list[str] = []
    layers: list[int] | None = None
    init: Named = None
    router: Named = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    separate_tied: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_older_files(cls, fields: Any) -> Any:
        return {RENAMED.get(k, k): v for k, v in fields.items()} if isinstance(fields, dict) else fields

    @pydantic.model_validator(mode="after")
    def _sane(self) -> Part:
        if self.r < 1:
            raise OptionError(f"r = {self.r}; a rank is at least 1.")
        for word, r in self.rank_pattern.items():
            if r < 1:
                raise OptionError(f"rank_pattern[{word!r}] = {r}; a rank is at least 1.")
        for word, a in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if a is not None and not (0 < a < float("inf")):
                raise OptionError(f"{word} = {a}; alpha is a positive number.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout = {self.dropout}; it lies in [0, 1).")
        return self

    @property
    def policy(self) -> str:
        """The scale policy in force: the form's own where it stands for one, else ``scale``."""
        return build("form", self.form).scaling() or self.scale

    def rank_of(self, path: str, role: str) -> int:
        """The rank of a layer: the first pattern that is its role or matches the end of its path, else r."""
        return _by_pattern(self.rank_pattern, path, role, self.r)

    def alpha_of(self, path: str, role: str) -> float:
        """Alpha of a layer; where none is given, the rank (scale 1 under alpha/r)."""
        fallback = self.alpha if self.alpha is not None else float(self.r if self.scale != "constant" else 1.0)
        return _by_pattern(self.alpha_pattern, path, role, fallback)

    def refuse_ignored(self, form: str, ranked: bool, sites: Sequence[Site]) -> None:
        """Refuse what was set but would change nothing at the chosen ``sites``.

        Raises:
            OptionError: a pattern that matches no layer; rank or scale for a form that has none; dropout where no input
                passes through the form; ``separate_tied`` where nothing is tied.
        """
        for field in ("rank_pattern", "alpha_pattern"):
            for word in getattr(self, field):
                if not any(_by_pattern({word: True}, s.spec.module, s.spec.role, False) for s in sites):
                    ends = {s.spec.role for s in sites} | {s.spec.module.rpartition(".")[2] for s in sites}
                    raise OptionError(f"{field}[{word!r}] matches none of the {len(sites)} chosen layers; {nearest(word, ends)}")
        if not ranked:
            given = [f for f in ("r", "rank_pattern", "alpha", "alpha_pattern", "scale") if _is_set(self, f)]
            if given:
                raise OptionError(
                    f"{given[0]} = {getattr(self, given[0])!r} means nothing to the form {form!r}, which has no rank and no scale; drop it."
                )
        if self.dropout:
            deaf = next((s for s in sites if not ranked or s.spec.mode not in ("called", "block")), None)
            if deaf is not None:
                raise OptionError(
                    f"dropout = {self.dropout} cannot act at {deaf.name!r} ({deaf.spec.kind}) with the form {form!r}, where no input passes "
                    "through the adapter; give that layer a part of its own with dropout 0, or exclude it."
                )
        if self.separate_tied and not any(s.spec.tie_group for s in sites):
            raise OptionError(
                "separate_tied = True, but none of the chosen layers has tied weights; drop it, or target a tied one."
            )


class Recipe(Part):
    """A whole run: one part (or several in ``parts``) and what trains it.

    Example:
        >>> Recipe(form="lora", r=4, targets=["q_proj", "v_proj"]).r
        4
    """

    budget: Named = None
    optimizer: Named = "adamw"
    losses: list[str | dict[str, Any]] = []
    modules_to_save: list[str] = []
    parts: list[Part] = []
    preset: str | None = None
    seed: int = 0

    def __init__(self, **fields: Any):
        fields = renamed(warned(fields))
        if fields.get("preset"):
            fields = _expand(fields)
        if "parts" in fields:
            fields["parts"] = [p if isinstance(p, Part) else lifted(renamed(warned(dict(p)))) for p in fields["parts"]]
        try:
            super().__init__(**lifted(fields))
        except pydantic.ValidationError as error:
            raise _plain(error, type(self)) from None
        self.check()

    def all_parts(self) -> list[Part]:
        """The parts that put something into the model: ``parts``, or this recipe itself."""
        parts: list[Part] = list(self.parts or [self])
        if self.modules_to_save:
            parts.append(Part(form=MODULES_TO_SAVE, targets=self.modules_to_save))
        return parts

    # --- files --------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML or JSON file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"The recipe {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}."
            ) from error
        if str(path).endswith(".json"):
            data = json.loads(text)
        else:
            import yaml

            try:
                data = yaml.safe_load(text)
            except yaml.YAMLError as error:
                mark = getattr(error, "problem_mark", None)
                where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
                raise RecipeError(
                    f"{where} is not valid YAML: {getattr(error, 'problem', None) or 'it cannot be parsed'}."
                ) from error
        if not isinstance(data, dict):
            raise RecipeError(f"{path} must hold a mapping of recipe fields; it holds {type(data).__name__}.")
        return cls(**data)

    @classmethod
    def of(cls, value: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """A recipe from a recipe, a mapping, a file's path, or the name of a form or preset."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Mapping):
            return cls(**value)
        text = str(value)
        if text.endswith((".yaml", ".yml", ".json")):
            return cls.load(text)
        catalogue.methods()
        return cls(preset=text) if text in PRESETS else cls(form=text)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Recipe:
        """The recipe that :meth:`to_json` described, in a file of this or an older version."""
        known = {RENAMED.get(k, k): v for k, v in fields.items()}
        if "parts" in known:
            known["parts"] = [{RENAMED.get(k, k): v for k, v in p.items()} for p in known["parts"]]
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)

    # --- parts --------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Refuse unknown methods and options, and parts that cannot live together, before anything is built."""
        for part in self.all_parts():
            form = build("form", part.form)
            _form_options(part)
            if form.scaling() not in (None, part.scale) and "scale" in part.model_fields_set:
                raise RecipeError(
                    f"The form {form.info.name!r} stands for scale = {form.scaling()!r}, but the recipe says {part.scale!r}; drop it, or use the form 'lora'."
                )
            extra = form.info.requires
            for kind in ("init", "router"):
                named = getattr(part, kind)
                if named is not None:
                    method = build(kind, named)
                    _fits(method, form)
                    method.check(form, part)
            if "block" in extra and part.router:
                raise RecipeError(
                    f"The form {form.info.name!r} wraps whole blocks and has no components for a router; drop router."
                )
        forms = [build("form", p.form) for p in self.all_parts()]
        for kind, named in [
            ("budget", self.budget),
            ("optimizer", self.optimizer),
            *(("loss", n) for n in self.losses),
        ]:
            if named is None:
                continue
            method = build(kind, named)
            if not any(_missing(method, f) is None for f in forms):
                _fits(method, forms[0])
            if hasattr(method, "check"):
                method.check(forms, self)


def _is_set(part: Part, field: str) -> bool:
    """Whether a field was given (r and scale have values of their own otherwise) and says something."""
    return field in part.model_fields_set and getattr(part, field) not in (None, {})


def build(kind: str, named: Named) -> Any:
    """The method object of ``"name"`` or ``{"name": …, options…}``."""
    if isinstance(named, str):
        return catalogue.make(kind, named)
    if not isinstance(named, dict) or "name" not in named:
        raise RecipeError(f"{kind} must be a name or a mapping with 'name'; it is {named!r}.")
    return catalogue.make(kind, named["name"], **{k: v for k, v in named.items() if k != "name"})


def _missing(method: Any, form: Any) -> str | None:
    return next((need for need in method.info.requires if need not in form.provides), None)


def _fits(method: Any, form: Any) -> None:
    word = _missing(method, form)
    if word is None:
        return
    able = [i.name for i in catalogue.methods("form") if word in i.cls.provides]  # type: ignore[attr-defined]
    raise RecipeError(
        f"The {method.info.kind} {method.info.name!r} needs a form that gives {word!r}, but the form {form.info.name!r} does not; "
        f"use {' or '.join(able[:6]) or 'another form'}, or another {method.info.kind}."
    )


def _form_options(part: Part) -> None:
    if isinstance(part.form, dict):
        for key in ("r", "alpha", "dropout", "scale"):
            if key in part.form:
                raise RecipeError(f"{key} is given inside form and has no effect there; write it beside form.")


def _expand(fields: dict[str, Any]) -> dict[str, Any]:
    catalogue.methods()
    name = fields["preset"]
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    base = {k: v for k, v in PRESETS[name].items() if k != "title"}
    for key, value in base.items():
        mine = fields.get(key)
        if mine is not None and _name(mine) != _name(value) and key in ("form", "init", "router", "budget"):
            raise RecipeError(
                f"The preset {name!r} sets {key} to {_name(value)!r}, but the recipe says {_name(mine)!r}; drop one of them."
            )
    return {**base, **fields}


def _name(value: Any) -> Any:
    return value["name"] if isinstance(value, dict) else value


def _by_pattern(patterns: Mapping[str, Any], path: str, role: str, fallback: Any) -> Any:
    for key, value in patterns.items():
        if key == role or re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return fallback


def _plain(error: pydantic.ValidationError, model: type[pydantic.BaseModel]) -> RankwiseError:
    """pydantic's first complaint as one sentence."""
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_field(where, model.model_fields)
    return OptionError(f"{where} = {first.get('input')!r}: {first['msg']}.")


def unknown_field(name: str, known: Iterable[str]) -> RankwiseError:
    return OptionError(f"A recipe has no field {name!r}; {nearest(name, [*known, *ALIASES])}")
