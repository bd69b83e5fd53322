"""What every verb needs: the model, the recipe from flags, and output as a table or as JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rankwise.errors import OptionError, RankwiseError, need

out = Console()
err = Console(stderr=True)
#: endings of pictures that every matplotlib writes
PICTURES = (".png", ".svg", ".pdf")


def quiet() -> None:
    """Keep other libraries' notices about kernels they lack off the terminal; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree", "transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"torch\..*|transformers\..*|torchao\..*")


def load_model(name: str, *, task: str = "causal") -> tuple[Any, Any]:
    """(model in fp32, its tokenizer or image processor, or None) from a folder, a hub id, or ``base`` / ``digits`` for the shipped ones.

    Raises:
        RankwiseError: no such folder or id; the message has the loader's own reason.
    """
    from rankwise import assets
    from rankwise.codecs.library import keep_stored

    try:
        import transformers
    except ImportError as error:
        raise need("transformers", "hf", "Loading a model") from error
    transformers.utils.logging.disable_progress_bar()
    if name == "base":
        return assets.load_base()
    if name == "digits":
        # its pixels lie in 0…1, unlike a ViT's
        return assets.load_digits_vit(), transformers.ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)
    path = Path(name)
    if not path.exists() and name.count("/") != 1:
        raise OptionError(f"The model {name!r} is neither a folder here, nor a hub id (owner/name), nor 'base' or 'digits'.")
    if path.is_dir() and (path / "rankwise.safetensors").exists():
        raise OptionError(f"{name} holds an adapter, not a model; give its base with --model and this folder with --adapter.")
    if path.is_dir() and not (path / "config.json").exists():
        raise OptionError(
            f"{name} has no config.json, so it is not a model's folder; it holds {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        cls = _class_for(transformers, config, task)
        model = cls.from_pretrained(name, dtype="float32")
        keep_stored(model)
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"The model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    reader = transformers.AutoImageProcessor if model.main_input_name == "pixel_values" else transformers.AutoTokenizer
    try:
        return model, reader.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return model, None


def load_text_model(name: str) -> tuple[Any, Any]:
    """:func:`load_model` for a verb that reads or writes text.  Raises OptionError where the model has no tokenizer."""
    model, tokenizer = load_model(name)
    if tokenizer is None or model.main_input_name == "pixel_values":
        raise OptionError(f"{name} has no tokenizer, so text cannot be read for it; images are for train and eval.")
    return model, tokenizer


def _class_for(transformers: Any, config: Any, task: str) -> Any:
    architectures = list(getattr(config, "architectures", None) or [])
    if architectures and hasattr(transformers, architectures[0]):
        return getattr(transformers, architectures[0])
    return {"causal": transformers.AutoModelForCausalLM, "image": transformers.AutoModelForImageClassification}[task]


def recipe_from(
    file: str | None, form: str | None = None, init: str | None = None, settings: Sequence[str] = (), **fields: Any
) -> Any:
    """A Recipe from ``--recipe`` and the flags that override it; ``--set form.r=16`` reaches any field.

    A field after a dot is an option of the part before it (``form.shards=2``) or the part's own (``form.r``).

    Args:
        file: a recipe's file.
        form: a form's or preset's name.
        init: an init's name.
        settings: field=value each.
        fields: of the recipe; those that say nothing are left out.
    """
    from rankwise.recipe import PRESETS, Recipe, catalogue

    data: dict[str, Any] = {}
    if file:
        loaded = Recipe.load(file)
        data = loaded.to_json()
    catalogue.methods()
    if form:
        if form in PRESETS:
            data["preset"] = form
        else:
            data["form"] = _merge_name(data.get("form"), form)
    if init:
        data["init"] = _merge_name(data.get("init"), init)
    data |= {k: v for k, v in fields.items() if v not in (None, [], ())}
    for setting in settings:
        key, sep, raw = setting.partition("=")
        if not sep or not key:
            raise OptionError(f"--set takes field=value (form.r=16, targets=q_proj,v_proj); it got {setting!r}.")
        _put(data, key.strip(), _value(raw.strip()))
    return Recipe(**data)


def _merge_name(old: Any, name: str) -> Any:
    return {**old, "name": name} if isinstance(old, dict) and old.get("name") == name else name


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    part, _, option = key.partition(".")
    if not option:
        data[part] = value
        return
    if option in ("r", "alpha", "dropout", "scale", "targets") and part == "form":
        data[option] = value
        return
    now = data.get(part, "lora" if part == "form" else None)
    if now is None:
        raise OptionError(f"--set {key}: the recipe has no {part} to set an option of; give --set {part}=NAME first.")
    data[part] = {**(now if isinstance(now, dict) else {"name": now}), option: value}


def _value(raw: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise OptionError(f"{raw!r} is not a value: {error}") from error
    if isinstance(value, str) and "," in raw:
        return raw.split(",")
    # YAML 1.1 reads 1e-4, without a point, as a word
    return float(raw) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", raw) else value


def picture_path(path: str | None) -> str | None:
    """The path, where a picture can be written there; checked before the work is done.  Raises OptionError."""
    if path is None:
        return None
    target = Path(path)
    if target.suffix.lower() not in PICTURES:
        raise OptionError(f"--picture writes {', '.join(PICTURES)}; {path!r} ends in {target.suffix or 'no suffix'}.")
    if not target.parent.is_dir():
        raise OptionError(f"--picture {path!r}: the folder {str(target.parent)!r} does not exist; make it first.")
    return path


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Print rows as a table.

    Args:
        title: above it.
        columns: their heads.
        rows: cells, in the order of the columns.
        right: heads of the columns that are set to the right.
    """
    out.print(title, style="italic", highlight=False, markup=False)  # a title of the table's own is folded to its width
    t = Table(header_style="bold", box=None, pad_edge=False)
    for c in columns:
        t.add_column(c, justify="right" if c in right else "left", overflow="fold")
    for row in rows:
        t.add_row(*(fmt(v) for v in row))
    out.print(t)


def fmt(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def emit_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """JSON on standard output, alone, so that it can be piped."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def count(n: int) -> str:
    """A number of parameters: 224 k, 4.42 M."""
    return f"{n:,}" if n < 10_000 else f"{n / 1e3:.3g} k" if n < 1e6 else f"{n / 1e6:.3g} M" if n < 1e9 else f"{n / 1e9:.3g} B"


def size(n: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return ""


__all__ = [
    "RankwiseError",
    "count",
    "emit_json",
    "err",
    "fmt",
    "load_model",
    "load_text_model",
    "out",
    "picture_path",
    "quiet",
    "recipe_from",
    "size",
    "table",
]
