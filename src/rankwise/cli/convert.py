"""``rankwise convert``: an adapter in another library's format, in ours, or coded; what it costs is printed."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.cli.common import _put, _value, emit_json, load_model, out, size
from rankwise.cli.plan import Model
from rankwise.errors import OptionError


def add(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    adapter: Annotated[str, typer.Argument(help="Adapter folder.")],
    model: Model,
    to: Annotated[str, typer.Option("--out", "-o", help="Folder to write.")],
    format: Annotated[str | None, typer.Option(help="peft (the default), native, diffusers, kohya or gguf.")] = None,
    rank: Annotated[int | None, typer.Option(help="Cut every place to this rank first.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="Write natively, its matrices coded: compeft, ternary, intk, nf4, lossless or delta.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="option=value of the codec (density=0.2, k=8, inner=intk, inner.k=4).")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The other adapter, of codec delta: to write it, or to read a folder so coded.")
    ] = None,
    search_data: Annotated[
        str | None, typer.Option(help="compeft, ternary: choose alpha by the loss on this file or shipped domain.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Turn an adapter into another library's format, into ours, or into a small coded file; a coded one back into either.

    Example: rankwise convert run/adapter --model base --codec compeft --set density=0.2 --out run/small
    """
    import rankwise as rw

    named = _codec(codec, settings or [], format, search_data)
    _check_reference(adapter, codec, reference)
    net, reader = load_model(model)
    loaded = rw.load(net, adapter, reference=reference if codec != "delta" else None)
    if rank is not None:
        loaded = _cut(net, loaded, rank, quiet=json)
    if named is None:
        path = loaded.export(to, format=format or "peft")
        files = [Path(path)] if Path(path).is_file() else [p for p in Path(path).rglob("*") if p.is_file()]
        total = sum(p.stat().st_size for p in files)
        if json:
            emit_json({"path": str(path), "bytes": total})
        else:
            out.print(f"wrote {path} ({size(total)})", highlight=False)
        return
    found: dict[str, Any] = {}
    if search_data is not None:
        found = _searched(named, net, reader, loaded, model, search_data)
        named = {**named, "alpha": found["alpha"]}
    show(write(net, loaded, to, named, reference) | found, json)


def _codec(codec: str | None, settings: list[str], format: str | None, search_data: str | None) -> dict[str, Any] | None:
    """The codec as a mapping, checked before any model is loaded; None where none is asked for."""
    from rankwise.codecs.weights import adapter_codec

    if codec is None:
        for flag, given in (("--set", settings), ("--search-data", search_data)):
            if given:
                raise OptionError(f"{flag} is about a codec, and none is asked for; give --codec, or leave it out.")
        return None
    if format not in (None, "native"):
        raise OptionError(f"--codec writes the native format; it cannot be had as {format!r}. Leave one of the two out.")
    named: dict[str, Any] = {"name": codec}
    for setting in settings:
        key, sep, raw = setting.partition("=")
        if not sep or not key or key.strip() == "name":
            raise OptionError(f"--set takes option=value of the codec (density=0.2); it got {setting!r}.")
        _put_option(named, key.strip(), _value(raw.strip()))
    made = adapter_codec(named)
    if search_data is not None and not made.searchable:
        raise OptionError(f"--search-data chooses alpha, which {codec!r} does not have; it is for compeft and ternary.")
    if search_data is not None and "alpha" in named:
        raise OptionError("--search-data chooses alpha, and --set gives it; leave one of the two out.")
    return named


def _put_option(named: dict[str, Any], key: str, value: Any) -> None:
    if "." in key:
        _put(named, key, value)  # delta's inner.k
    elif key == "inner" and isinstance(named.get("inner"), dict):
        raise OptionError("--set inner=… comes before its options (inner.k=4).")
    else:
        named[key] = value


def _check_reference(adapter: str, codec: str | None, reference: str | None) -> None:
    if codec == "delta" and reference is None:
        raise OptionError("--codec delta stores the difference from another adapter; give its folder with --reference.")
    if codec == "delta" and Path(adapter).resolve() == Path(str(reference)).resolve():
        raise OptionError(f"--reference {reference} is the adapter itself; give another one.")


def _cut(net: Any, loaded: Any, rank: int, quiet: bool) -> Any:
    from rankwise.merge.engine.files import attach_state

    widest = max((d.component_count() for d in loaded.sites.values()), default=0)
    if not 1 <= rank <= widest:
        raise OptionError(
            f"--rank {rank} is no cut: the adapter's places have up to {widest} components; give 1 … {widest}, or leave it out."
        )
    state = loaded.lower(rank=rank)
    worst = max(state.meta["errors"].values(), default=0.0)
    loaded.detach()
    if not quiet:
        out.print(f"cut to rank {rank}: largest relative error {worst:.3g}", highlight=False)
    return attach_state(net, state, name="cut")


def _searched(named: dict[str, Any], net: Any, reader: Any, loaded: Any, model: str, data: str) -> dict[str, Any]:
    """{alpha, tried} by the loss on ``data``; the adapter's tensors are as before afterwards."""
    import torch

    from rankwise.cli.train import _scorer
    from rankwise.codecs.search import search
    from rankwise.codecs.weights import adapter_codec

    score, _ = _scorer(net, reader, model, data, "auto", None, 512)
    mine = {n: t for n, t in (loaded.named_parameters() or loaded.tensors(buffers=False)).items() if t.dim() >= 2}
    starts = {n: loaded.tensors().get(n + "0") for n in mine}
    before = {n: t.detach().clone() for n, t in mine.items()}
    tau = {n: t if starts[n] is None else t - starts[n] for n, t in before.items()}

    @torch.no_grad()
    def loss(tensors: dict[str, Any]) -> float:
        for n, t in tensors.items():
            mine[n].copy_(t if starts[n] is None else t + starts[n])
        return next(v for k, v in score().items() if k == "loss")

    try:
        found = search(adapter_codec(named), tau, loss)  # type: ignore[arg-type]
    finally:
        with torch.no_grad():
            for n, t in before.items():
                mine[n].copy_(t)
    return {"alpha": found.codec.alpha, "tried": [{"alpha": a, "loss": s} for _, a, s in found.tried]}


def write(net: Any, loaded: Any, to: str, named: dict[str, Any], reference: str | None = None) -> dict[str, Any]:
    """Code ``loaded`` (which is taken off the model) into folder ``to``, read it back, and say what it costs.

    Args:
        net: the base.
        loaded: the adapter's handle.
        to: folder to write.
        named: the codec, ``{"name": …, options…}``.
        reference: of the codec ``delta``, the other adapter's folder.

    Returns bytes of the coded file, of the plain native file, of the bare tensors as fp32 and bf16, and each layer's relative error.
    """
    import rankwise as rw

    reference = reference if named["name"] == "delta" else None
    numel = sum(t.numel() for t in loaded.tensors().values())
    with tempfile.TemporaryDirectory() as folder:
        plain = loaded.save(folder).stat().st_size
    path = loaded.save(to, codec=named, reference=reference)
    # a wrapped block (bottleneck) is no change of a weight, so it has no such error
    was = {n: loaded.delta(n) for n, d in loaded.sites.items() if d.site.spec.mode != "block"}
    loaded.detach()
    back = rw.load(net, to, name="coded", reference=reference)
    errors = {n: _distance(was[n], back.delta(n), d.site) for n, d in back.sites.items() if n in was}  # dense one place at a time
    back.detach()
    return {
        "path": str(path),
        "codec": named,
        "bytes": path.stat().st_size,
        "native": plain,
        "fp32": 4 * numel,
        "bf16": 2 * numel,
        "errors": errors,
    }


def _distance(was: Any, now: Any, site: Any) -> float:
    """‖now − was‖/‖was‖ of two changes of a site; 0 of equal ones, infinite where something came of nothing."""
    a, b = ((d.dense(site.untouched()) if d.needs_weight else d.dense()).double() for d in (was, now))
    gap, base = float((b - a).norm()), float(a.norm())
    return gap / base if base else (0.0 if gap == 0 else math.inf)


def show(report: dict[str, Any], json: bool) -> None:
    """The report of :func:`write` as two lines, or as JSON."""
    if json:
        emit_json(report)
        return
    if "tried" in report:
        tried = ", ".join(f"{t['alpha']:g}: {t['loss']:.4g}" for t in report["tried"])
        out.print(f"alpha {report['alpha']:g} has the least loss ({tried})", highlight=False, soft_wrap=True)
    got, native = report["bytes"], report["native"]
    out.print(
        f"wrote {report['path']}: {size(got)}, {native / got:.3g} times smaller than the native safetensors ({size(native)}); "
        f"its tensors alone take {size(report['fp32'])} as fp32, {size(report['bf16'])} as bf16",
        highlight=False,
        soft_wrap=True,
    )
    errors = report["errors"]
    if not errors:
        return
    worst = max(errors, key=errors.__getitem__)
    out.print(
        f"relative error of ΔW over {len(errors)} places: mean {sum(errors.values()) / len(errors):.3g}, largest {errors[worst]:.3g} ({worst})",
        highlight=False,
        soft_wrap=True,
    )
