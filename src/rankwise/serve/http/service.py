"""What every route of one server shares, and how a request finds the adapter that it names."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from rankwise.host import Helpers, release_workers
from rankwise.serve.http.detokenise import Detokeniser
from rankwise.serve.http.errors import Refusal, bad
from rankwise.serve.http.metrics import Metrics
from rankwise.serve.http.stream import Generation
from rankwise.serve.types import Overloaded, Request, UnknownAdapter

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import AdapterMetadata
    from rankwise.serve.adapters.cache import AdapterCache
    from rankwise.serve.engine.engine import Engine
    from rankwise.serve.finetune.queue import TrainStream
    from rankwise.serve.http.auth import Caller, Keys
    from rankwise.serve.http.schemas import Generate
    from rankwise.serve.http.settings import Settings

log = logging.getLogger("rankwise.serve")

P = ParamSpec("P")
T = TypeVar("T")


class Phase(Enum):
    """Where a server is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What answers a request: a manifest, or None for the base; ``label`` names it in metrics."""

    manifest: AdapterMetadata | None = None
    label: str = ""

    @property
    def digest(self) -> str | None:
        return None if self.manifest is None else self.manifest.digest


class Service:
    """The engine, the adapters, the tokenizer and the keys behind one port.

    ``workers`` read files; ``scribe`` is the one thread on which the tokenizer runs, for some are not safe on several.

    Args:
        engine, cache, tokenizer: what answers.
        settings, keys: bounds and limits; who may call.
        training: the stream of fine-tuning jobs, None where there is none.
    """

    def __init__(
        self,
        engine: Engine,
        cache: AdapterCache,
        tokenizer: Any,
        settings: Settings,
        keys: Keys,
        training: TrainStream | None = None,
    ):
        self.training = training
        self.engine, self.cache, self.tokenizer, self.settings, self.keys = engine, cache, tokenizer, settings, keys
        self.detokeniser = Detokeniser(tokenizer)
        self.metrics = Metrics(settings.model, settings.labels, settings.aliases)
        self.metrics.watch(engine, cache)
        self.phase = Phase.STARTING
        self.failure = ""
        self.live: weakref.WeakSet[Generation] = weakref.WeakSet()
        self.served: dict[str, int] = {}  # adapter name → sequences asked of it since the start
        self.workers = Helpers(4, "rankwise-files")
        self.scribe = concurrent.futures.ThreadPoolExecutor(1, "rankwise-text")

    async def read(self, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """A call that may read files, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, lambda: call(*args, **more))

    async def write(self, call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
        """A call of the tokenizer, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.scribe, lambda: call(*args, **more))

    def require_ready(self) -> None:
        """Raises Overloaded (with status 503) unless requests are taken."""
        if self.phase is not Phase.READY:
            error = Overloaded(f"The server is {self.phase.value}; try again later.", retry_after=2.0)
            error.status, error.code = 503, "not_ready"
            raise error

    async def start(self) -> None:
        """Start the engine; the port is open meanwhile, so /health answers and /ready says not yet."""
        try:
            release_workers()  # this thread read the model, as a rule; the next products are the engine's
            await self.read(self.engine.start)
        except Exception as error:
            self.phase, self.failure = Phase.FAILED, type(error).__name__
            log.exception("the engine did not start")
        else:
            self.phase = Phase.READY if self.phase is Phase.STARTING else self.phase

    async def stop(self) -> None:
        """End the engine; by now the requests have been answered or cut."""
        self.phase = Phase.DRAINING
        await self.read(self.engine.stop, drain=False, timeout=self.settings.drain_seconds)
        if self.training is not None:
            await self.read(self.training.close)
        self.workers.shutdown(wait=False)
        self.scribe.shutdown(wait=False)

    def generation(self, requests: Sequence[Request]) -> Generation:
        """The sequences of one HTTP request, not yet submitted."""
        made = Generation(self.engine, requests, buffer=self.settings.buffer, quiet=self.settings.quiet_seconds)
        self.live.add(made)
        return made

    def cut(self) -> None:
        """The drain time is over: every request that still runs is told so."""
        message = "The server is shutting down and could not finish this request; send it again."
        for generation in list(self.live):
            generation.mailbox.close(Refusal(503, "shutting_down", message))

    async def target(self, caller: Caller, body: Generate) -> Target:
        """Which adapter ``model`` and ``adapters`` name.

        Raises:
            UnknownAdapter: no such adapter, or none that this key may use; the two look alike.
            Refusal, AdapterRefused: a mix that makes no sense; an adapter that this base cannot serve.
        """
        base = self.settings.model
        name = None if body.model == base else body.model.removeprefix(base + ":")
        if body.adapters is not None:
            return await self._mix(caller, name, body)
        self._check(caller, name, body.model)
        if name is None:
            return Target()
        return Target(await self._resolved(body.model, lambda: self.cache.resolve(name)), name)

    async def _mix(self, caller: Caller, name: str | None, body: Generate) -> Target:
        parts = [(p.name, p.weight) for p in body.adapters or ()]
        most = self.settings.parts
        if name is not None:
            raise bad(f"With 'adapters', model is the base's name {self.settings.model!r}; it is {body.model!r}.", "model")
        if not 1 <= len(parts) <= most:
            raise bad(f"adapters names {len(parts)} adapters; a mix has from 1 to {most}.", "adapters")
        if len({n for n, _ in parts}) < len(parts):
            raise bad("adapters names one adapter twice; give it once, with the sum of the weights.", "adapters")
        for n, _ in parts:
            self._check(caller, n, n)
        return Target(await self._resolved("+".join(n for n, _ in parts), lambda: self.cache.mix(parts)), "mix")

    def _check(self, caller: Caller, name: str | None, shown: str) -> None:
        if not caller.may(name):
            raise unknown(shown)

    async def _resolved(self, shown: str, call: Callable[[], AdapterMetadata]) -> AdapterMetadata:
        try:
            return await self.read(call)
        except UnknownAdapter:  # the cache's own words may list names that this key must not learn
            raise unknown(shown) from None


def unknown(shown: str) -> UnknownAdapter:
    """The one answer to a name that does not exist, is no name, or may not be used by this key."""
    cut = shown if len(shown) <= 80 else shown[:80] + "…"
    return UnknownAdapter(
        f"The model {cut!r} does not exist here, or your key has no access to it; /v1/models lists those it may use."
    )
