"""``rankwise serve``: an OpenAI-compatible server for one base and any number of adapters."""

from __future__ import annotations

import contextlib
import functools
import json as json_
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from rankwise.cli.common import _value, err, load_text_model, out, quiet
from rankwise.cli.plan import Model
from rankwise.errors import OptionError, need, unknown


def add(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    model: Model,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapters", "-a", help="Folder of adapter folders, or a URI (s3://…); repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The base's name in requests; default the model's folder or id.")] = None,
    api_keys: Annotated[str | None, typer.Option(help="JSON file of keys and what each may use.")] = None,
    registry: Annotated[
        str | None, typer.Option(help="File that keeps adapters loaded at run time over restarts; default: they are forgotten.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most sequences in a step.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=1, help="Most sequences that wait; more are told to come back (429).")] = 1024,
    step_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a step; long prompts are read in parts.")] = 256,
    kv_tokens: Annotated[int, typer.Option(min=16, help="Tokens whose keys and values are kept; a multiple of 16.")] = 16_384,
    cells: Annotated[int, typer.Option(min=1, help="Ranks / 8 of all adapters that are resident at once.")] = 64,
    host_memory: Annotated[float, typer.Option(min=0.001, help="GB of adapters kept in memory beside the resident ones.")] = 4.0,
    row_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens that decoding rows may keep a second time, side by side; default 2 x --kv-tokens."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Who is let in when: default, fcfs, vtc, cluster … (rankwise methods policy).")
    ] = "default",
    set: Annotated[list[str] | None, typer.Option("--set", help="option=value of the policy (slo=6); repeatable.")] = None,
    op: Annotated[str, typer.Option(help="How adapters are computed: auto, bags, grouped, native, triton, reference …")] = "auto",
    native: Annotated[bool | None, typer.Option("--native/--no-native", help="Let auto build and use the C operator.")] = None,
    loop: Annotated[
        bool | None,
        typer.Option("--loop/--no-loop", help="Run a Llama-like model by rankwise's own loop; default: where it gives its logits."),
    ] = None,
    speculate: Annotated[int, typer.Option(min=0, help="Tokens guessed by prompt look-up and verified in a step.")] = 0,
    train: Annotated[
        str | None, typer.Option(help="Take fine-tuning jobs beside serving; they and their adapters are kept in this folder.")
    ] = None,
    train_data: Annotated[list[str] | None, typer.Option(help="Folder whose files a job may name; repeatable.")] = None,
    step_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="What a step may take, with prompts and training filling what decoding leaves.")
    ] = None,
    tensor_parallel: Annotated[
        int,
        typer.Option(min=1, help="Experimental: processes that share the base, its cache and the adapters, a slice of each layer."),
    ] = 1,
    adapter_split: Annotated[
        str,
        typer.Option(
            help="Experimental, with several: adapters are cut like the base (split), on one side (replicate), or by rank (auto)."
        ),
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Refuse unknown fields rather than list them in a header.")] = False,
    vllm_metrics: Annotated[bool, typer.Option("--vllm-metrics", help="Also name metrics as inference gateways do.")] = False,
    drain: Annotated[float, typer.Option(min=0.1, help="Seconds that running requests have after a terminate signal.")] = 30.0,
) -> None:
    """Serve a base and its adapters by OpenAI's protocol, each adapter under its folder's name.

    Example: rankwise serve --model base --adapters runs --port 8000
    Example: rankwise serve --model base --train jobs
    Example: rankwise serve --model base --adapters runs --tensor-parallel 2
    """
    try:
        from rankwise.host import keep_freed_memory
        from rankwise.serve.engine.options import EngineOptions
        from rankwise.serve.finetune.queue import beside
        from rankwise.serve.http.app import make_app
        from rankwise.serve.http.auth import Keys, is_loopback
        from rankwise.serve.http.server import HttpServer
        from rankwise.serve.http.settings import Settings
        from rankwise.serve.server import Sizes, build_server
    except ModuleNotFoundError as error:
        raise need(error.name or "starlette", "serve", "Serving") from error
    keys = Keys() if api_keys is None else Keys.read(Path(api_keys))
    if not keys and not is_loopback(host):
        raise OptionError(f"--host {host} is open to other machines, so it needs --api-keys FILE; or listen on 127.0.0.1.")
    _check_devices(tensor_parallel, adapter_split, train)
    source = _source([*(adapters or ()), *_home(train, train_data or ())])
    registry = registry or (None if train is None else str(Path(train) / "names.json"))
    door = _bound(host, port)
    keep_freed_memory()
    with contextlib.ExitStack() as ending:
        team = _team(model, tensor_parallel, ending)
        net, tokenizer = load_text_model(model)
        shown = name or Path(model.rstrip("/")).name
        context = min(getattr(net.config, "max_position_embeddings", None) or kv_tokens, kv_tokens)
        ends, vocabulary = _ends(net, tokenizer), net.get_input_embeddings().weight.shape[0]
        settings = Settings(
            model=shown, context=context, vocabulary=vocabulary, root=model, ends=ends, strict=strict, aliases=vllm_metrics, drain_seconds=drain,
            train_roots=tuple(map(Path, train_data or ())),
        )  # fmt: skip
        behind = build_server(
            net, source, sizes=Sizes(kv_tokens=kv_tokens, lora_pages=cells, host_bytes=int(host_memory * 1e9), row_tokens=row_tokens), policy=_policy(policy, set or ()),
            options=EngineOptions(
                max_running=max_batch, max_waiting=max_waiting, step_tokens=step_tokens, max_context=context, eos=tuple(sorted(ends)), speculate=speculate,
                step_seconds=step_seconds,
            ),
            op=op, native=native, loop=loop, registry=registry, base=shown, team=team, adapter_split=adapter_split,
        )  # fmt: skip
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("rankwise.serve").setLevel(logging.INFO)
        stream = None if train is None else beside(behind, train, context=context)
        app = make_app(behind.engine, behind.cache, tokenizer, settings, keys, stream)
        server = HttpServer(app, host, port, lambda: _greet(door, shown, behind.cache.names(), bool(keys)))
        if team is not None:
            team.when_lost(lambda why: setattr(server, "should_exit", True))
        server.run(sockets=[door])
        behind.cache.close()
    if team is not None and team.lost:
        err.print(f"[bold red]rankwise:[/] {escape(team.lost)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


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
    """What makes the adapters' source from the model's adapter loader.  Raises OptionError."""
    remote = ["://" in a for a in given]
    if any(remote) and not all(remote):
        raise OptionError("--adapters names folders and URIs; give one sort of them.")
    if not given:
        from rankwise.serve.adapters.memory import MemorySource

        return lambda loader: MemorySource(loader.layout)
    if any(remote):
        from rankwise.serve.adapters.uri import UriSource

        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rankwise" / "adapters"
        return lambda loader: UriSource(given, loader, cache)
    from rankwise.serve.adapters.source import FolderSource

    missing = next((a for a in given if not Path(a).is_dir()), None)
    if missing is not None:
        raise OptionError(f"--adapters {missing!r} is no folder; give the folder that holds the adapters' folders.")
    return lambda loader: FolderSource(given, loader)


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
