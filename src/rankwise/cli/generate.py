"""``rankwise generate``: text under one adapter, a mix of several, or several models whose logits are combined."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.common import _value, load_text_model, out
from rankwise.cli.plan import Model
from rankwise.errors import OptionError


def add(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="Adapter folder, or folder=strength; repeatable, several sum.")
    ] = None,
    fuse: Annotated[
        str | None, typer.Option(help="Combine the logits of the model and the --expert adapters at each step: dynamic or static.")
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option("--expert", help="With --fuse: adapter folder, or folder=weight; repeatable.")
    ] = None,
    expert_model: Annotated[
        str | None, typer.Option(help="The experts' own (smaller) base, of the same vocabulary; default --model.")
    ] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="option=value of the fusion (cap=2, ray=shift).")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to make at the most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="Show the base's text beside.")] = False,
) -> None:
    """Generate text with one adapter, a mix of several, or several models whose logits are combined at each step.

    --adapter adds changes of weights. --fuse adds to the model's logits the difference between each expert's logits and those
    of the expert's base: static with the given weights, dynamic with strengths found at each step; the experts may belong to a
    smaller model.

    Example: rankwise generate --model base --fuse dynamic --expert run/a --expert run/b --prompt 'def main('
    """
    import torch

    net, tokenizer = load_text_model(model)
    strengths = _load(net, adapter or (), "--adapter", "a")
    fusion = _fusion(net, tokenizer, strengths, fuse, expert, expert_model, set)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    length, context = ids["input_ids"].shape[1], getattr(net.config, "max_position_embeddings", None)
    if not length:
        raise OptionError("--prompt is empty; give the text to go on from.")
    if context and length + tokens > context:
        raise OptionError(
            f"The prompt has {length} tokens, which with --tokens {tokens} is beyond the model's {context}; shorten the prompt, or ask for fewer."
        )
    sampling: dict[str, Any] = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})

    def text(view: dict[str, float], fused: bool) -> str:
        torch.manual_seed(seed)
        more = sampling | ({"logits_processor": [fusion.processor()]} if fused else {})
        with torch.no_grad(), _acting(net, view):
            made = net.generate(**ids, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **more)
        return tokenizer.decode(made[0], skip_special_tokens=True)

    if base and (strengths or fusion):
        out.print("[dim]base[/]")
        out.print(text({}, False), markup=False, highlight=False)
        out.print("\n[dim]adapted[/]")
    out.print(text(strengths, fusion is not None), markup=False, highlight=False)


def _acting(net: Any, view: dict[str, float]) -> contextlib.AbstractContextManager[Any]:
    """Exactly these adapters; of a model without any, nothing."""
    import rankwise as rw

    return rw.view(net, view) if hasattr(net, "rankwise") else contextlib.nullcontext()


def _load(net: Any, folders: Sequence[str], flag: str, prefix: str) -> dict[str, float]:
    """Attach folders, or folder=number, as prefix0, prefix1 …: name → number."""
    import rankwise as rw

    numbers: dict[str, float] = {}
    seen: set[Path] = set()
    for i, given in enumerate(folders):
        folder, _, c = given.rpartition("=") if "=" in given else (given, "", "1")
        try:
            number = float(c)
        except ValueError as error:
            raise OptionError(f"{flag} takes folder or folder=number; it got {given!r}.") from error
        if not math.isfinite(number):
            raise OptionError(f"{flag} {given!r}: the strength must be a finite number.")
        if not folder:
            raise OptionError(f"{flag} takes folder or folder=number; {given!r} names no folder.")
        place = Path(folder).resolve()
        if flag == "--adapter" and place in seen:  # of experts a twin is a weight split in two
            raise OptionError(f"{flag} names {folder!r} twice; give it once, with the sum of the strengths.")
        seen.add(place)
        numbers[f"{prefix}{i}"] = number
        rw.load(net, folder, name=f"{prefix}{i}")
    return numbers


def _fusion(
    net: Any,
    tokenizer: Any,
    strengths: dict[str, float],
    fuse: str | None,
    experts: Sequence[str] | None,
    expert_model: str | None,
    settings: Sequence[str] | None,
) -> Any:
    """The fusion asked for, or None; the target acts under --adapter, the experts against their own untouched base."""
    if fuse is None:
        given = {"--expert": experts, "--expert-model": expert_model, "--set": settings}
        if idle := [f for f, v in given.items() if v]:
            raise OptionError(f"{idle[0]} says nothing without --fuse; add --fuse dynamic or --fuse static.")
        return None
    if not experts:
        raise OptionError(f"--fuse {fuse} needs experts: give --expert folder, once for each.")
    from rankwise.decoding.combine import Term
    from rankwise.decoding.model import DecodingModel, Fusion

    owner, reader = (net, tokenizer) if expert_model is None else load_text_model(expert_model)
    weights = _load(owner, experts, "--expert", "e")
    target = DecodingModel(net, strengths if hasattr(net, "rankwise") else None, tokenizer)
    same = owner is net and not strengths
    models = {"base": target} | ({} if same else {"anti": DecodingModel(owner, {}, reader)})
    models |= {n: DecodingModel(owner, {n: 1.0}, reader) for n in weights}
    options = {}
    for s in settings or ():
        key, sep, raw = s.partition("=")
        if not sep:
            raise OptionError(f"--set takes option=value (cap=2); it got {s!r}.")
        options[key] = _value(raw)
    return Fusion(models, [Term(n, w, "base" if same else "anti") for n, w in weights.items()], fuse, **options)
