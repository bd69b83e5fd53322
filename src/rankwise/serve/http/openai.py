"""``/v1/completions`` and ``/v1/chat/completions``: a body becomes sequences in the engine, their events an answer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rankwise.errors import RankwiseError
from rankwise.serve.http import prompts, replies
from rankwise.serve.http.choices import OutputDelta, OutputStream
from rankwise.serve.http.errors import bad, body_of
from rankwise.serve.http.events import EventStream
from rankwise.serve.http.replies import ChatReply, Reply, TextReply
from rankwise.serve.http.sampling import choices as choices_of
from rankwise.serve.http.sampling import sampling, stops
from rankwise.serve.http.schemas import Chat, Completion, Generate, noted, read
from rankwise.serve.http.stream import ClientGone, Generation, SlowReader
from rankwise.serve.types import Finished, Outcome, Overloaded, Request

if TYPE_CHECKING:
    from rankwise.serve.http.auth import Caller
    from rankwise.serve.http.service import Service, Target


async def completions(request: HttpRequest, service: Service, caller: Caller) -> Response:
    body, ignored = await read(request, Completion, service.settings)
    encode = functools.partial(prompts.of_completion, body, service.tokenizer, service.settings)
    return await _answer(request, service, caller, body, ignored, TextReply, encode)


async def chat(request: HttpRequest, service: Service, caller: Caller) -> Response:
    body, ignored = await read(request, Chat, service.settings)
    encode = functools.partial(prompts.of_chat, body, service.tokenizer, service.settings)
    return await _answer(request, service, caller, body, ignored, ChatReply, encode)


async def _answer(
    request: HttpRequest,
    service: Service,
    caller: Caller,
    body: Generate,
    ignored: list[str],
    form: type[Reply],
    encode: Callable[[], list[prompts.Prompt]],
) -> Response:
    service.require_ready()
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options says nothing without stream: true; add it.", "stream_options")
    n, cut = choices_of(body, service.settings), stops(body, service.settings)
    target = await service.target(caller, body)
    given = await service.write(encode)
    digest = target.digest
    reply = form(form.prefix + uuid.uuid4().hex, int(time.time()), body.model, f"rankwise-{digest[:16] if digest else 'base'}")
    work = RequestWork(service, target, reply, _requests(reply.id, given, n, body, caller, digest, service), given, cut, n, body)
    headers = {"x-request-id": reply.id} | noted(ignored)
    return await (work.streamed(request, headers) if body.stream else work.whole(request, headers))


def _requests(
    stem: str, given: list[prompts.Prompt], n: int, body: Generate, caller: Caller, digest: str | None, service: Service
) -> list[Request]:
    latest = None if body.deadline is None else time.monotonic() + body.deadline  # the engine's clock
    common: dict[str, Any] = {"adapter": digest, "tenant": caller.name, "deadline": latest, "salt": body.cache_salt or ""}
    made = []
    for p, (ids, _) in enumerate(given):
        group = f"{stem}-{p}" if n > 1 else None
        for i in range(n):
            drawn = sampling(body, len(ids), i, service.settings)
            made.append(Request(f"{stem}-{p * n + i}", ids, drawn, group=group, **common))
    return made


@dataclasses.dataclass(slots=True)
class RequestWork:
    """One HTTP request on its way: its sequences, and what they have said so far.

    Attributes:
        service, target, reply: the server, what answers, the form of the answer.
        requests: the sequences, ``n`` for each of ``given`` (the prompts: ids, and text or None).
        stops: stop strings; ``body``: the request as it came.
        choices, echoes: by request id what was said so far; the text before each.
    """

    service: Service
    target: Target
    reply: Reply
    requests: list[Request]
    given: list[prompts.Prompt]
    stops: list[str]
    n: int
    body: Generate
    choices: dict[str, OutputStream] = dataclasses.field(default_factory=dict)
    echoes: list[str] = dataclasses.field(default_factory=list)

    async def whole(self, request: HttpRequest, headers: dict[str, str]) -> Response:
        """The answer at once.  Raises RankwiseError."""
        with contextlib.ExitStack() as stack:
            pieces = await self._begin(request, stack)
            async for _ in pieces:
                pass
        made = self.reply.whole(list(self.choices.values()), self.echoes, [len(ids) for ids, _ in self.given])
        return Response(replies.encode(made), 200, headers, "application/json")

    async def streamed(self, request: HttpRequest, headers: dict[str, str]) -> Response:
        """Server-sent events.  What fails before the first token is an error with its own status, not a stream."""
        stack = contextlib.ExitStack()
        try:
            pieces = await self._begin(request, stack)
            first = await anext(pieces)
        except BaseException:
            stack.close()
            raise
        return EventStream(self._frames(first, pieces), stack, headers, self.service.settings.stall_seconds)

    async def _begin(self, request: HttpRequest, stack: contextlib.ExitStack) -> AsyncIterator[OutputDelta]:
        """Submit; from here on the stack's end cancels and counts."""
        settings, echo = self.service.settings, bool(getattr(self.body, "echo", False))
        for i, r in enumerate(self.requests):
            ids, text = self.given[i // self.n]
            before = "" if not echo else text if text is not None else await self.service.write(self.service.detokeniser.text, ids)
            self.echoes.append(before)
            ends = frozenset(r.sampling.stop_ids) | (frozenset() if r.sampling.ignore_eos else settings.ends)
            self.choices[r.id] = OutputStream(i, self.service.detokeniser, ids, self.stops, ends, len(before))
        if self.target.label:
            self.service.served[self.target.label] = self.service.served.get(self.target.label, 0) + len(self.requests)
        stack.callback(self._count)
        generation = self.service.generation(self.requests)
        try:
            stack.enter_context(generation)
        except RankwiseError as error:
            self._ended(Outcome.REJECTED if isinstance(error, Overloaded) else Outcome.ERROR)
            raise
        generation.watch(request.receive)
        return self._pieces(generation)

    async def _pieces(self, generation: Generation) -> AsyncIterator[OutputDelta]:
        try:
            async for event in generation.events():
                choice = self.choices[event.request]
                piece = choice.finished(event) if isinstance(event, Finished) else choice.token(event)
                choice.parts.append(piece)
                if piece.finish:
                    generation.end(event.request)
                yield piece
        except (ClientGone, SlowReader):
            self._ended(Outcome.CANCELLED)
            raise
        except RankwiseError:
            self._ended(Outcome.ERROR)
            raise

    async def _frames(self, first: OutputDelta, pieces: AsyncIterator[OutputDelta]) -> AsyncIterator[bytes]:
        counted = self.body.stream_options is not None and self.body.stream_options.include_usage
        opened: set[int] = set()
        try:
            async for piece in _chain(first, pieces):
                if piece.index not in opened:
                    opened.add(piece.index)
                    yield self._opening(piece.index, counted)
                if out := self.reply.chunks(piece, counted):
                    yield out
            if counted:
                count = replies.usage([len(ids) for ids, _ in self.given], list(self.choices.values()))
                yield self.reply.chunk([], count, True)
        except RankwiseError as error:
            yield replies.frame(body_of(error))
        yield replies.DONE

    def _opening(self, index: int, counted: bool) -> bytes:
        out, opening = b"", self.reply.opening(index)
        if opening is not None:
            out += self.reply.chunk([opening], None, counted)
        if self.echoes[index]:
            out += self.reply.chunk([self.reply.delta(self.echoes[index], (), index, None)], None, counted)
        return out

    def _ended(self, outcome: Outcome) -> None:
        for choice in self.choices.values():
            choice.outcome = choice.outcome or outcome

    def _count(self) -> None:
        """Into the metrics, each sequence once; whoever is not finished by now was cancelled."""
        for r in self.requests:
            choice = self.choices[r.id]
            outcome = choice.outcome or Outcome.CANCELLED
            self.service.metrics.served(self.target.label, outcome.value, len(r.prompt), choice.generated)


async def _chain(first: OutputDelta, rest: AsyncIterator[OutputDelta]) -> AsyncIterator[OutputDelta]:
    yield first
    async for piece in rest:
        yield piece
