"""``rankwise serve``: an OpenAI-compatible server for one base and any number of adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json as json_
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand

from rankwise.cli.common import _value, err, load_text_model, out, quiet
from rankwise.cli.plan import Model
from rankwise.errors import OptionError, need, unknown

if TYPE_CHECKING:
    from rankwise.serve.http.auth import Keys
    from rankwise.serve.http.settings import Settings
    from rankwise.serve.server import Server


#: old option → new one
RENAMED = {
    "--cells": "--max-lora-blocks",
    "--max-batch": "--max-num-seqs",
    "--row-tokens": "--decode-cache-tokens",
    "--step-tokens": "--max-num-batched-tokens",
}


class ServeCommand(TyperCommand):
    """Takes an old option for the new one, with one line that says so."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self._new(a) for a in args])

    def _new(self, arg: str) -> str:
        name, sep, value = arg.partition("=")
        if name not in RENAMED:
            return arg
        line = f"rankwise: {name} is now {RENAMED[name]}; the old spelling goes in rankwise 0.3."
        err.print(line, highlight=False, soft_wrap=True)
        return RENAMED[name] + sep + value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What ``rankwise serve`` is told: each field is an option."""

    model: Model
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", "-a", help="Folder of adapter folders, or a URI (s3://…); repeatable, in any mixture."),
    ] = None
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --api-keys.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000
    name: Annotated[str | None, typer.Option(help="The base's name in requests; default the model's folder or id.")] = None
    api_keys: Annotated[str | None, typer.Option(help="JSON file of keys and what each may use.")] = None
    registry: Annotated[
        str | None, typer.Option(help="File that keeps adapters loaded at run time over restarts; default: they are forgotten.")
    ] = None
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences in a step.")] = 32
    max_waiting: Annotated[int, typer.Option(min=1, help="Most sequences that wait; more are told to come back (429).")] = 1024
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a step; long prompts are prefilled in chunks.")
    ] = 256
    kv_tokens: Annotated[int, typer.Option(min=16, help="Tokens whose keys and values are kept; a multiple of 16.")] = 16_384
    max_lora_blocks: Annotated[
        int, typer.Option(min=1, help="LoRA blocks of the resident adapters: one holds 8 ranks of every module.")
    ] = 64
    host_memory: Annotated[float, typer.Option(min=0.001, help="GB of adapters kept in memory beside the resident ones.")] = 4.0
    decode_cache_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens of keys and values that decoding sequences keep contiguous too; default 2 x --kv-tokens."),
    ] = None
    policy: Annotated[str, typer.Option(help="Who is let in when: default, fcfs, vtc, cluster … (rankwise methods policy).")] = (
        "default"
    )
    set: Annotated[list[str] | None, typer.Option("--set", help="option=value of the policy (slo=6); repeatable.")] = None
    op: Annotated[str, typer.Option(help="How adapters are computed: auto, bags, grouped, native, triton, reference …")] = "auto"
    native: Annotated[bool | None, typer.Option("--native/--no-native", help="Let auto build and use the C operator.")] = None
    loop: Annotated[
        bool | None,
        typer.Option("--loop/--no-loop", help="Run a Llama-like model by rankwise's own loop; default: where it gives its logits."),
    ] = None
    speculate: Annotated[int, typer.Option(min=0, help="Tokens guessed by prompt look-up and verified in a step.")] = 0
    train: Annotated[
        str | None, typer.Option(help="Take fine-tuning jobs beside serving; they and their adapters are kept in this folder.")
    ] = None
    train_data: Annotated[list[str] | None, typer.Option(help="Folder whose files a job may name; repeatable.")] = None
    step_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="What a step may take, with prompts and training filling what decoding leaves.")
    ] = None
    tensor_parallel: Annotated[
        int,
        typer.Option(min=1, help="Experimental: processes that share the base, its cache and the adapters, a slice of each layer."),
    ] = 1
    adapter_split: Annotated[
        str,
        typer.Option(
            help="Experimental, with several: adapters are cut like the base (split), on one side (replicate), or by rank (auto)."
        ),
    ] = "auto"
    strict: Annotated[bool, typer.Option("--strict", help="Refuse unknown fields rather than list them in a header.")] = False
    vllm_metrics: Annotated[bool, typer.Option("--vllm-metrics", help="Also name metrics as inference gateways do.")] = False
    drain: Annotated[float, typer.Option(min=0.1, help="Seconds that running requests have after a terminate signal.")] = 30.0

    @property
    def base(self) -> str:
        """The base's name in requests."""
        return self.name or Path(self.model.rstrip("/")).name


def add(app: typer.Typer) -> None:
    hints = get_type_hints(ServeOptions, include_extras=True)
    options = [_parameter(f, hints[f.name]) for f in dataclasses.fields(ServeOptions)]

    def verb(**given: Any) -> None:
        serve(ServeOptions(**given))

    verb.__doc__, verb.__annotations__ = serve.__doc__, hints
    verb.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    app.command("serve", cls=ServeCommand)(verb)


def _parameter(field: dataclasses.Field[Any], annotation: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def serve(o: ServeOptions) -> None:
    """Serve a base and its adapters by OpenAI's protocol, each adapter under its folder's name.

    Example: rankwise serve --model base --adapters runs --port 8000
    Example: rankwise serve --model base --train jobs
    Example: rankwise serve --model base --adapters runs --tensor-parallel 2
    """
    try:
        import rankwise.serve.http.server  # noqa: F401  # what serving needs is told in one sentence where it is missing
        from rankwise.host import keep_freed_memory
    except ModuleNotFoundError as error:
        raise need(error.name or "starlette", "serve", "Serving") from error
    keys = _keys(o)
    _check_devices(o.tensor_parallel, o.adapter_split, o.train)
    source = _source([*(o.adapters or ()), *_home(o.train, o.train_data or ())])
    door = _bound(o.host, o.port)
    keep_freed_memory()
    with contextlib.ExitStack() as ending:
        team = _team(o.model, o.tensor_parallel, ending)
        net, tokenizer = load_text_model(o.model)
        settings = _settings(o, net, tokenizer)
        server = _build(o, net, source, settings, team)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("rankwise.serve").setLevel(logging.INFO)
        _listen(o, server, tokenizer, settings, keys, door, team)
        server.cache.close()
    if team is not None and team.lost:
        err.print(f"[bold red]rankwise:[/] {escape(team.lost)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def _keys(o: ServeOptions) -> Keys:
    """Who may call.  Raises OptionError: other machines without keys."""
    from rankwise.serve.http.auth import Keys, is_loopback

    keys = Keys() if o.api_keys is None else Keys.read(Path(o.api_keys))
    if not keys and not is_loopback(o.host):
        raise OptionError(f"--host {o.host} is open to other machines, so it needs --api-keys FILE; or listen on 127.0.0.1.")
    return keys


def _settings(o: ServeOptions, net: Any, tokenizer: Any) -> Settings:
    from rankwise.serve.http.settings import Settings

    return Settings(
        model=o.base,
        context=min(getattr(net.config, "max_position_embeddings", None) or o.kv_tokens, o.kv_tokens),
        vocabulary=net.get_input_embeddings().weight.shape[0],
        root=o.model,
        ends=_ends(net, tokenizer),
        strict=o.strict,
        aliases=o.vllm_metrics,
        drain_seconds=o.drain,
        train_roots=tuple(map(Path, o.train_data or ())),
    )


def _build(o: ServeOptions, net: Any, source: Callable[[Any], Any], settings: Settings, team: Any) -> Server:
    from rankwise.serve.engine.options import EngineOptions
    from rankwise.serve.server import Sizes, build_server

    sizes = Sizes(
        kv_tokens=o.kv_tokens,
        max_lora_blocks=o.max_lora_blocks,
        host_bytes=int(o.host_memory * 1e9),
        decode_cache_tokens=o.decode_cache_tokens,
    )
    options = EngineOptions(
        max_num_seqs=o.max_num_seqs,
        max_waiting=o.max_waiting,
        max_num_batched_tokens=o.max_num_batched_tokens,
        max_context=settings.context,
        eos=tuple(sorted(settings.ends)),
        speculate=o.speculate,
        step_seconds=o.step_seconds,
    )
    registry = o.registry or (None if o.train is None else str(Path(o.train) / "names.json"))
    parts: dict[str, Any] = {"op": o.op, "native": o.native, "loop": o.loop, "team": team, "adapter_split": o.adapter_split}
    policy = _policy(o.policy, o.set or ())
    return build_server(net, source, sizes=sizes, options=options, policy=policy, registry=registry, base=o.base, **parts)


def _listen(
    o: ServeOptions, server: Server, tokenizer: Any, settings: Settings, keys: Keys, door: socket.socket, team: Any
) -> None:
    """Answer requests until a signal."""
    from rankwise.serve.finetune.queue import beside
    from rankwise.serve.http.app import make_app
    from rankwise.serve.http.server import HttpServer

    stream = None if o.train is None else beside(server, o.train, context=settings.context)
    app = make_app(server.engine, server.cache, tokenizer, settings, keys, stream)
    http = HttpServer(app, o.host, o.port, lambda: _greet(door, o.base, server.cache.names(), bool(keys)))
    if team is not None:
        team.when_lost(lambda why: setattr(http, "should_exit", True))
    http.run(sockets=[door])


def _check_devices(size: int, split: str, train: str | None) -> None:
    """Raises UnknownName, OptionError: options that several devices do not take, or one."""
    from rankwise.serve.parallel.experimental.device import SPLITS

    if split not in SPLITS:
        raise unknown("way to split adapters", split, SPLITS)
    if size == 1 and split != "auto":
        raise OptionError(f"--adapter-split {split} is for several devices; give --tensor-parallel N too.")
    if size > 1 and train is not None:
        raise OptionError("--train works on one device, which holds the whole base; give either --train or --tensor-parallel.")


def _team(model: str, size: int, ending: contextlib.ExitStack) -> Any:
    """The other devices' processes, to be ended with ``ending``; None for one device."""
    if size == 1:
        return None
    from rankwise.serve.parallel.experimental.processes import Processes

    team = Processes(functools.partial(_base, model), size)
    ending.callback(team.close)
    return team


def _base(name: str) -> Any:
    """The model alone, read in another device's process."""
    quiet()
    return load_text_model(name)[0]


def _home(train: str | None, data: Sequence[str]) -> list[str]:
    """The folder of trained adapters, made now, as one more of --adapters.  Raises OptionError."""
    if train is None:
        if data:
            raise OptionError("--train-data is for fine-tuning jobs; give --train FOLDER to take them.")
        return []
    missing = next((d for d in data if not Path(d).is_dir()), None)
    if missing is not None:
        raise OptionError(f"--train-data {missing!r} is no folder; give the folder that holds the training files.")
    folder = Path(train) / "adapters"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--train {train!r} cannot be a folder: {error.strerror}; give another.") from None
    return [str(folder)]


def _source(given: Sequence[str]) -> Callable[[Any], Any]:
    """What makes the adapters' source from the model's loader; of two of one name the first given is served.  Raises OptionError."""
    from rankwise.serve.adapters.memory import MemorySource
    from rankwise.serve.adapters.source import FolderSource, Sources
    from rankwise.serve.adapters.uri import UriSource

    missing = next((a for a in given if "://" not in a and not Path(a).is_dir()), None)
    if missing is not None:
        raise OptionError(f"--adapters {missing!r} is no folder; give the folder that holds the adapters' folders.")
    if not given:
        return lambda loader: MemorySource(loader.layout)
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rankwise" / "adapters"
    runs = [(remote, list(roots)) for remote, roots in itertools.groupby(given, lambda a: "://" in a)]

    def source(loader: Any) -> Any:
        made = [UriSource(roots, loader, cache) if remote else FolderSource(roots, loader) for remote, roots in runs]
        return made[0] if len(made) == 1 else Sources(*made)

    return source


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address, taken before the model is read.  Raises OptionError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind, proto)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except OSError as error:
        raise OptionError(f"Cannot listen on {host}:{port}: {error.strerror}; give another --host or --port.") from None
    return door


def _ends(net: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the generation config's, and the tokenizer's end of text."""
    given = getattr(net.generation_config, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def _policy(name: str, settings: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {"name": name}
    for s in settings:
        key, sep, raw = s.partition("=")
        if not sep:
            raise OptionError(f"--set takes option=value (slo=6); it got {s!r}.")
        options[key] = _value(raw)
    return options


def _greet(door: socket.socket, shown: str, names: Sequence[str], keyed: bool) -> None:
    host, port = door.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    few = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    body = json_.dumps({"model": names[0] if names else shown, "prompt": "def main(", "max_tokens": 16})
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    out.print(
        f"rankwise serves {escape(shown)} and {len(names)} adapters{escape(f' ({few})' if few else '')} at {url}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d {escape(repr(body))}",
        highlight=False,
        soft_wrap=True,
    )
