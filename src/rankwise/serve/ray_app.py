"""Many replicas behind one address, by Ray Serve: requests of one adapter go where that adapter is.

    serve run rankwise.serve.ray_app:application model=base adapters=runs replicas=2

Each replica is a ``rankwise serve`` process of its own.  Ray only chooses: a request's adapter is its multiplexed model id, so
Ray prefers a replica that has it and else the one with the fewest, and starts, watches and replaces replicas.  The bytes
then flow from the ingress to the chosen process as plain HTTP, streamed, with the caller's own headers (keys included).
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

from rankwise.errors import OptionError, RankwiseError, need

try:
    import httpx
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
except ImportError as error:
    raise need(error.name or "ray", "ray", "Serving over several replicas") from error

#: headers of one hop, which are not handed on
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization", "host", "content-length"}


class Replica:
    """One server process, watched by Ray.

    Args:
        model, adapters: as for ``rankwise serve``; ``options``: its other options (``{"max-num-seqs": 16}``).
    """

    def __init__(self, model: str, adapters: str | None, options: Mapping[str, Any]):
        command = [sys.executable, "-m", "rankwise.cli.main", "serve", "--model", model, "--port", "0"]
        command += ["--adapters", adapters] if adapters else []
        for name, value in options.items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.url = self._greeting()

    def _greeting(self) -> str:
        """The address that the process says it listens on; Ray limits how long this may take."""
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line.strip())
            found = re.search(r" at (http://\S+)", line)
            if found:
                return found[1]
        raise RankwiseError(f"The replica's server did not start: {' '.join(said[-3:])}")

    @serve.multiplexed(max_num_models_per_replica=256)
    async def adapter(self, name: str) -> str:
        """Tells Ray that this replica has ``name`` from now on; the process itself loads it with its first request."""
        return name

    async def address(self) -> str:
        """Where the request goes for which Ray chose this replica."""
        name = serve.get_multiplexed_model_id()
        if name:
            await self.adapter(name)
        return self.url

    async def check_health(self) -> None:
        """Raises where the process is gone or its engine fails; Ray then replaces the replica."""
        async with httpx.AsyncClient() as client:
            (await client.get(f"{self.url}/health", timeout=10)).raise_for_status()

    def __del__(self) -> None:
        process = getattr(self, "process", None)
        if process is not None and process.poll() is None:
            process.terminate()


class Ingress:
    """Chooses a replica for each request and hands its bytes through."""

    def __init__(self, replicas: Any):
        self.replicas = replicas
        self.client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10.0))

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        handle = self.replicas.options(multiplexed_model_id=affinity(body))
        url = await handle.address.remote()
        headers = [(k, v) for k, v in request.headers.items() if k not in HOP]
        sent = self.client.build_request(
            request.method, f"{url}{request.url.path}", params=request.query_params, headers=headers, content=body
        )
        try:
            reply = await self.client.send(sent, stream=True)
        except httpx.TransportError:
            message = "The replica that was chosen does not answer; try again."
            return JSONResponse(
                {"error": {"message": message, "type": "server_error", "code": "replica_lost"}}, 503, {"Retry-After": "1"}
            )
        kept = {k: v for k, v in reply.headers.items() if k not in HOP} | {"x-rankwise-replica": url}
        return StreamingResponse(_through(reply), reply.status_code, kept)


async def _through(reply: httpx.Response) -> AsyncIterator[bytes]:
    """The reply's bytes as they come; a caller who leaves closes the replica's side too, which cancels the request there."""
    try:
        async for chunk in reply.aiter_raw():
            yield chunk
    finally:
        await asyncio.shield(reply.aclose())


def affinity(body: bytes) -> str:
    """What a request should meet again: its ``model``, or the adapters of its mix; "" where the body says none."""
    try:
        asked = json.loads(body)
    except ValueError:
        return ""  # the replica says what is wrong with it
    if not isinstance(asked, dict):
        return ""
    mix = asked.get("adapters")
    if isinstance(mix, list):
        return "+".join(sorted(str(part.get("name", "")) for part in mix if isinstance(part, dict)))
    return str(asked.get("model", ""))


def application(args: Mapping[str, Any]) -> Any:
    """The deployment for ``serve run``: ``model``, ``adapters``, ``replicas`` and any option of ``rankwise serve``.

    Raises:
        OptionError: no model; replicas below 1.
    """
    options = dict(args)
    model, adapters, count = options.pop("model", None), options.pop("adapters", None), int(options.pop("replicas", 2))
    if not model:
        raise OptionError("Serving over replicas needs model=DIR_OR_ID.")
    if count < 1:
        raise OptionError(f"replicas = {count}; it is at least 1.")
    light: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": 4096,
    }  # the work is in the replicas' processes
    replica = serve.deployment(num_replicas=count, health_check_period_s=5, **light)(Replica)
    ingress = serve.deployment(**light)(Ingress)
    return ingress.bind(replica.bind(model, adapters, options))
