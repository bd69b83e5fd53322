"""Limits of the engine, and a look at it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rankwise.errors import OptionError

if TYPE_CHECKING:
    from rankwise.serve.types import Request


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """Limits of the engine.

    Attributes:
        max_num_seqs: requests in a step; ``max_waiting``: in the queue, above which a request is refused.
        max_num_batched_tokens: most tokens of one step (decoding rows are never held back by it).
        max_context: most tokens of one request, None for what the cache holds.
        eos: token ids that end a request.
        seed: of the draws of requests that bring none.
        speculate: guesses by prompt look-up that a greedy request may verify in a step (0: none).
        step_seconds: what a step that serves may take, training beside it included (None: no limit but ``max_num_batched_tokens``).
        train_tokens: training tokens beside a step that serves, where ``step_seconds`` sets no limit; ``idle_train_tokens``: alone.
    """

    max_num_seqs: int = 32
    max_waiting: int = 1024
    max_num_batched_tokens: int = 256
    max_context: int | None = None
    eos: tuple[int, ...] = ()
    seed: int = 0
    speculate: int = 0
    step_seconds: float | None = None
    train_tokens: int = 32
    idle_train_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_waiting", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} = {getattr(self, name)}; it is at least 1.")
        if self.step_seconds is not None and not self.step_seconds > 0:
            raise OptionError(f"step_seconds = {self.step_seconds}; it is above 0, or None for no limit.")

    def check_length(self, r: Request, room: int, cache: int) -> None:
        """Refuse a request that could not even run alone.

        Args:
            r: the request.
            room: tokens that the cache can hold beside its adapter; ``cache``: beside none.

        Raises:
            OptionError: it is longer than ``room`` or ``max_context``.
        """
        limit = room if self.max_context is None else min(room, self.max_context)
        wanted = len(r.prompt) + r.sampling.max_tokens
        if wanted > limit:
            where = " beside its adapter" if limit == room < cache else ""
            raise OptionError(
                f"The prompt has {len(r.prompt)} tokens and max_tokens is {r.sampling.max_tokens}: {wanted} together, "
                f"but a request may have {limit}{where}; shorten one of them."
            )


@dataclasses.dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine.

    Attributes:
        running, waiting: requests; ``steps``: taken so far; ``step_seconds``: of the last one.
        kv_used, kv_total: cache blocks; ``cells_used``, ``cells_total``: LoRA pages.
        healthy: False once a step has failed, until the next that does not; ``error``: why.
        counters: they only grow.
        copies_bytes: keys and values kept a second time for sequences that decode.
    """

    running: int
    waiting: int
    kv_used: int
    kv_total: int
    steps: int
    step_seconds: float
    healthy: bool
    error: str
    counters: Mapping[str, float]
    lora_pages_used: int = 0
    lora_pages_total: int = 0
    copies_bytes: int = 0
