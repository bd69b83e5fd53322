"""One answer on its way: tokens become text and log-probabilities that can go out, until it stops."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rankwise.serve.http.detokenise import Detokeniser, StopCutter
from rankwise.serve.http.errors import EngineFault, Refusal
from rankwise.serve.types import Finished, Outcome, Overloaded, Token

if TYPE_CHECKING:
    from rankwise.errors import RankwiseError

log = logging.getLogger("rankwise.serve")


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability.

    Attributes:
        raw, logprob: the token's bytes, its log-probability.
        offset: characters before it in the text.
        top: the likeliest tokens, in the same form.
    """

    raw: bytes
    logprob: float
    offset: int
    top: tuple[tuple[bytes, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class OutputDelta:
    """What of one answer can go out now.

    Attributes:
        index: of the choice.
        text, logged: new text, and the log-probabilities of its tokens.
        finish: "stop" or "length" with the last one, None before.
    """

    index: int
    text: str
    logged: tuple[TokenLogprob, ...] = ()
    finish: str | None = None


class OutputStream:
    """One sequence of a request.

    Attributes:
        outcome: how it ended, None while it runs.
        generated: tokens that belong to it, also an end-of-text token.
        reused: prompt tokens that were in the cache already.
        parts: the pieces so far.

    Args:
        index: of the choice; ``start``: characters before its text (an echo).
        detokeniser, prompt: the text of ids, and those that come before.
        stops: stop strings; ``ends``: ids that end the answer without text.
    """

    def __init__(
        self,
        index: int,
        detokeniser: Detokeniser,
        prompt: Sequence[int],
        stops: Sequence[str],
        ends: frozenset[int],
        start: int = 0,
    ):
        self.index, self.ends = index, ends
        self._tokens = detokeniser
        self._text, self._cut = detokeniser.stream(prompt), StopCutter(stops)
        self._made = self._out = start  # characters: decoded, released
        self._waiting: list[TokenLogprob] = []
        self.outcome: Outcome | None = None
        self.generated = self.reused = 0
        self.parts: list[OutputDelta] = []

    def token(self, token: Token) -> OutputDelta:
        """Take one token; the piece's ``finish`` is "stop" once a stop string is complete."""
        self.generated += 1
        if token.id in self.ends:
            return self._piece("", None)
        if token.logprob is not None:
            raw = self._tokens.raw
            top = tuple((raw(i), p) for i, p in token.top)
            self._waiting.append(TokenLogprob(raw(token.id), token.logprob, self._made, top))
        piece = self._add(self._text.push(token.id))
        return self._ended(piece, Outcome.STOP) if self._cut.stopped else piece

    def finished(self, event: Finished) -> OutputDelta:
        """Take the engine's last word.

        Raises:
            RankwiseError: it ended otherwise than by stopping or reaching its length.
        """
        self.reused = event.reused
        if event.outcome not in (Outcome.STOP, Outcome.LENGTH):
            self.outcome = event.outcome
            raise failure(event)
        rest = self._add(self._text.flush())
        if not self._cut.stopped:
            rest = self._joined(rest, self._cut.flush())
        return self._ended(rest, Outcome.STOP if self._cut.stopped else event.outcome)

    def _add(self, text: str) -> OutputDelta:
        self._made += len(text)
        return self._piece(self._cut.push(text), None)

    def _joined(self, piece: OutputDelta, more: str) -> OutputDelta:
        last = self._piece(more, None)
        return OutputDelta(self.index, piece.text + last.text, piece.logged + last.logged)

    def _piece(self, text: str, finish: str | None) -> OutputDelta:
        self._out += len(text)
        ready = [e for e in self._waiting if e.offset < self._out] if text else []
        self._waiting = self._waiting[len(ready) :]
        return OutputDelta(self.index, text, tuple(ready), finish)

    def _ended(self, piece: OutputDelta, outcome: Outcome) -> OutputDelta:
        self.outcome = outcome
        late = () if self._cut.stopped else tuple(self._waiting)  # tokens without text of their own
        return OutputDelta(self.index, piece.text, piece.logged + late, outcome.value)


def failure(event: Finished) -> RankwiseError:
    """The error for a request that the engine gave up; an unforeseen one is logged here and not shown."""
    if event.error is not None:
        return event.error
    message = event.message
    if event.outcome is Outcome.ABORTED:
        return Refusal(504, "deadline_exceeded", message or "The request could not be served by its deadline.")
    if event.outcome is Outcome.REJECTED:
        return Overloaded(message or "The server is full; try again later.")
    if event.outcome is Outcome.CANCELLED:
        return Refusal(503, "cancelled", message or "The server ended this request before it was finished; send it again.")
    log.error("request %s failed in the engine: %s", event.request, message or "no reason given")
    return EngineFault("The engine failed on this request; the server's log has the reason.")
