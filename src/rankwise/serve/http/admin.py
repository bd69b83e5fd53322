"""Models, adapters at run time, health, version, metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rankwise._version import __version__
from rankwise.serve.http.errors import bad
from rankwise.serve.http.schemas import LoadAdapter, UnloadAdapter, read
from rankwise.serve.http.service import Phase, Service, log, unknown
from rankwise.serve.types import UnknownAdapter

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import AdapterMetadata
    from rankwise.serve.http.auth import Caller

STARTED = int(time.time())
#: how long an unload waits for the requests that run on the adapter; then it says how many there are
UNLOAD_SECONDS = 5.0


async def models(request: Request, service: Service, caller: Caller) -> Response:
    """The base and the adapters that this key may use.  ``root``: where it came from, for administrators; others see the name."""
    return JSONResponse({"object": "list", "data": await _entries(service, caller)})


async def model(request: Request, service: Service, caller: Caller) -> Response:
    """One model by its name.  Raises UnknownAdapter."""
    name = request.path_params["name"]
    for entry in await _entries(service, caller):
        if name in (entry["id"], f"{service.settings.model}:{entry['id']}"):
            return JSONResponse(entry)
    raise unknown(name)


async def _entries(service: Service, caller: Caller) -> list[dict[str, Any]]:
    s = service.settings
    common = {"object": "model", "created": STARTED, "owned_by": "rankwise"}
    data: list[dict[str, Any]] = []
    if caller.may(None):
        root = (s.root or s.model) if caller.admin else s.model
        data.append({"id": s.model, **common, "root": root, "parent": None, "max_model_len": s.context})
    for entry in await service.read(service.cache.list):
        if caller.may(entry.name):
            root = entry.manifest.source if caller.admin and entry.manifest is not None else entry.name
            data.append({"id": entry.name, **common, "root": root, "parent": s.model})
    return data


async def adapters(request: Request, service: Service, caller: Caller) -> Response:
    """Digest, tier, rank, bytes and requests of each adapter that this key may use."""
    data = [
        _shown(e.name, e.manifest) | {"tier": e.tier, "in_use": e.pins, "requests": service.served.get(e.name, 0)}
        for e in await service.read(service.cache.list)
        if caller.may(e.name)
    ]
    return JSONResponse({"object": "list", "data": data})


async def load(request: Request, service: Service, caller: Caller) -> Response:
    """vLLM's ``/v1/load_lora_adapter``.  Raises Refusal, AdapterRefused."""
    body, _ = await read(request, LoadAdapter, service.settings)
    if body.lora_name == service.settings.model:
        raise bad(f"{body.lora_name!r} is the base's name; give the adapter another one.", "lora_name")
    known = {e.name for e in await service.read(service.cache.list)}
    if body.lora_name in known and not body.load_inplace:
        raise bad(
            f"The adapter {body.lora_name!r} is loaded already; send load_inplace: true to put new weights in its place.",
            "lora_name",
        )
    manifest = await service.read(service.cache.load, body.lora_name, body.lora_path)
    log.info("adapter %s loaded, digest %s", body.lora_name, manifest.digest[:16])
    return JSONResponse({"object": "adapter"} | _shown(body.lora_name, manifest))


async def unload(request: Request, service: Service, caller: Caller) -> Response:
    """vLLM's ``/v1/unload_lora_adapter``.  Raises UnknownAdapter."""
    body, _ = await read(request, UnloadAdapter, service.settings)
    try:
        users = await service.read(service.cache.unload, body.lora_name, UNLOAD_SECONDS)
    except UnknownAdapter:
        raise unknown(body.lora_name) from None
    log.info("adapter %s unloaded, %d requests still run on it", body.lora_name, users)
    return JSONResponse({"object": "adapter", "id": body.lora_name, "deleted": True, "in_use": users})


async def health(request: Request, service: Service, caller: Caller) -> Response:
    """200 while the engine can work, 503 once it has failed; without details, since anybody may ask."""
    broken = service.phase is Phase.FAILED or (service.phase is Phase.READY and not service.engine.stats().healthy)
    return JSONResponse({"status": "unhealthy" if broken else "ok"}, 503 if broken else 200)


async def ready(request: Request, service: Service, caller: Caller) -> Response:
    """200 while requests are taken; 503 while starting, draining or failed."""
    fine = service.phase is Phase.READY and service.engine.stats().healthy
    phase = service.phase if fine or service.phase is not Phase.READY else Phase.FAILED
    return JSONResponse({"status": phase.value}, 200 if fine else 503)


async def version(request: Request, service: Service, caller: Caller) -> Response:
    return JSONResponse({"version": __version__})


async def metrics(request: Request, service: Service, caller: Caller) -> Response:
    page = await service.read(service.metrics.page)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


def _shown(name: str, m: AdapterMetadata | None) -> dict[str, Any]:
    """What is known of an adapter; nulls where nothing has been asked of it yet, for then it has not been read."""
    fields = {f: getattr(m, f, None) for f in ("digest", "kind", "rank", "nbytes", "exact", "error")}
    return {"id": name, **fields}
