"""The routes of a server, each with who may call it, as one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rankwise.errors import RankwiseError
from rankwise.serve.http import admin, fine_tuning, openai
from rankwise.serve.http.auth import Access, Caller, Keys
from rankwise.serve.http.errors import Refusal, log, on_http, on_known, on_unforeseen
from rankwise.serve.http.service import Service
from rankwise.serve.http.settings import HEADER_BYTES, Settings
from rankwise.serve.http.stream import ClientGone

if TYPE_CHECKING:
    from rankwise.serve.adapters.cache import AdapterCache
    from rankwise.serve.engine.engine import Engine
    from rankwise.serve.finetune.queue import TrainStream

Handler = Callable[[Request, Service, Caller], Awaitable[Response]]

#: every route there is: no route exists without a word on who may call it
ROUTES: tuple[tuple[str, str, Handler, Access], ...] = (
    ("POST", "/v1/completions", openai.completions, Access.CLIENT),
    ("POST", "/v1/chat/completions", openai.chat, Access.CLIENT),
    ("GET", "/v1/models", admin.models, Access.CLIENT),
    ("GET", "/v1/models/{name:path}", admin.model, Access.CLIENT),
    ("GET", "/v1/adapters", admin.adapters, Access.CLIENT),
    ("POST", "/v1/load_lora_adapter", admin.load, Access.ADMIN),
    ("POST", "/v1/unload_lora_adapter", admin.unload, Access.ADMIN),
    ("POST", "/v1/fine_tuning/jobs", fine_tuning.create, Access.ADMIN),
    ("GET", "/v1/fine_tuning/jobs", fine_tuning.jobs, Access.ADMIN),
    ("GET", "/v1/fine_tuning/jobs/{id}", fine_tuning.job, Access.ADMIN),
    ("POST", "/v1/fine_tuning/jobs/{id}/cancel", fine_tuning.cancel, Access.ADMIN),
    ("GET", "/v1/fine_tuning/jobs/{id}/events", fine_tuning.events, Access.ADMIN),
    ("GET", "/metrics", admin.metrics, Access.METRICS),
    ("GET", "/health", admin.health, Access.OPEN),
    ("GET", "/ready", admin.ready, Access.OPEN),
    ("GET", "/version", admin.version, Access.OPEN),
)


def make_app(
    engine: Engine,
    cache: AdapterCache,
    tokenizer: Any,
    settings: Settings,
    keys: Keys | None = None,
    training: TrainStream | None = None,
) -> Starlette:
    """The application; its life begins and ends the engine's.

    Args:
        tokenizer: transformers' tokenizer of the base, with a chat template if chats are to be served.
        keys: who may call; None: programs on this machine, as administrators.
        training: the engine's stream of fine-tuning jobs; None: the routes say that there is none.
    """
    service = Service(engine, cache, tokenizer, settings, keys if keys is not None else Keys(), training)

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        yield
        await starting
        await service.stop()

    routes = [Route(path, _guarded(handler, access, service), methods=[method]) for method, path, handler, access in ROUTES]
    handlers: dict[Any, Any] = {RankwiseError: on_known, HTTPException: on_http}
    app = Starlette(routes=routes, lifespan=life, exception_handlers=handlers)
    app.state.service = service
    return app


def _guarded(handler: Handler, access: Access, service: Service) -> Callable[[Request], Awaitable[Response]]:
    """The handler behind its access check; a defect in it is logged and answered with a bare 500."""

    async def endpoint(request: Request) -> Response:
        if sum(len(k) + len(v) for k, v in request.scope["headers"]) > HEADER_BYTES:
            raise Refusal(431, "headers_too_large", f"The request's headers are longer than {HEADER_BYTES} bytes.")
        caller = service.keys.admit(request, access)
        try:
            return await handler(request, service, caller)
        except RankwiseError:
            raise
        except ClientGone:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            log.exception("%s %s failed", request.method, request.url.path)
            return await on_unforeseen(request, error)

    return endpoint
