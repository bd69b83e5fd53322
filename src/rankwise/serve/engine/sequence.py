"""One request inside the engine: its tokens, what of them is in the cache, and who listens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from rankwise.serve.batch import BASE, Role, Span

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter
    from rankwise.serve.engine.prompt_lookup import PromptLookup
    from rankwise.serve.engine.sampler import SamplerState
    from rankwise.serve.policies.base import RequestInfo
    from rankwise.serve.types import Event, Request

_serials = itertools.count()


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """A request and its state.

    Attributes:
        tokens: prompt and what was generated; ``computed`` of them have keys and values in ``blocks``.
        chain: hash of the last full block that was entered in the index (its salt at first); ``full``: how many were.
        fetched: the adapter's numbers, while they are being read and after.
        reused: tokens found in the index when it entered; ``links``: the hashes they are looked up by.
        short: times in a row that it found no memory, alone;
        prompt_lookup: its n-grams, once guesses are made from them;
        last: when its last token came; ``serial``: a number that no other request ever has.
    """

    request: Request
    emit: Callable[[Event], None]
    job: RequestInfo
    sampler: SamplerState
    tokens: list[int]
    chain: bytes
    computed: int = 0
    full: int = 0
    blocks: list[int] = dataclasses.field(default_factory=list)
    slot: int = BASE
    fetched: Future[LoadedAdapter] | None = None
    reused: int = 0
    links: list[bytes] = dataclasses.field(default_factory=list)
    short: int = 0
    prompt_lookup: PromptLookup | None = None
    last: float | None = None
    serial: int = dataclasses.field(default_factory=_serials.__next__)

    @property
    def prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def pending(self) -> int:
        """Tokens not in the cache: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.generated > 0 and self.pending == 1

    def span(self, n: int, guesses: tuple[int, ...] = ()) -> Span:
        """Its next ``n`` tokens in a step, and the guesses that are verified behind them."""
        at = self.computed
        tokens = (*self.tokens[at : at + n], *guesses)
        role = Role.VERIFY if guesses else Role.DECODE if self.decoding else Role.PREFILL
        samples = 1 + len(guesses) if n == self.pending else 0
        return Span(self.request.id, tokens, at, tuple(self.blocks), self.slot, role, samples, self.serial)
