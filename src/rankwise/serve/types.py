"""What enters the engine and what leaves it: a request, how it is sampled, its events, and how it ended."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rankwise.errors import OptionError, RankwiseError

NO_BIAS: Mapping[int, float] = MappingProxyType({})


class Outcome(enum.StrEnum):
    """How a request ended.  ``aborted``: its deadline could not be met; ``rejected``: never queued."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ABORTED = "aborted"
    REJECTED = "rejected"
    ERROR = "error"


class ServeError(RankwiseError):
    """A request that the server cannot take; ``status`` is the HTTP status, ``code`` the word OpenAI's clients read."""

    status = 400
    code = "invalid_request"


class UnknownAdapter(ServeError):
    """No adapter of that name; the base never answers in its place."""

    status = 404
    code = "model_not_found"


class AdapterRefused(ServeError):
    """An adapter that this base cannot serve: damaged, for another base, too large, of an unsupported kind."""

    code = "adapter_refused"


class Overloaded(ServeError):
    """The queue is full, or the deadline cannot be met; ``retry_after`` in seconds."""

    status = 429
    code = "overloaded"

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_tokens: most new tokens.
        temperature: 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep all.
        seed: with one a request draws the same tokens whatever else is in its batch.
        stop_ids: ids that end it; ``ignore_eos``: whether the model's own do not.
        logprobs: alternatives reported beside the chosen token's log-probability (None: neither).
        logit_bias: token id → added to its logit.
        presence_penalty, frequency_penalty: taken off a token's logit once, and each time it was made.

    Raises:
        OptionError: a value out of its range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=lambda: NO_BIAS)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature,
                self.temperature == 0 or 1e-5 <= self.temperature <= 100,
                "0 (greedy), or from 0.00001 to 100",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("seed", self.seed, self.seed is None or -(1 << 63) <= self.seed < 1 << 64, "an integer of 64 bits"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
        )
        for name, value, right, expected in checks:
            if not right:
                raise OptionError(f"{name} = {value}; it is {expected}.")
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias):
                raise OptionError(f"logit_bias of token {token} is {bias}; it is a finite number.")


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue.

    Attributes:
        id: unique while the request lives.
        prompt: token ids, at least one.
        adapter: the digest of a resolved adapter or mix (:class:`~rankwise.serve.adapters.base.AdapterMetadata`), None for the base.
        tenant: whose request it is (fairness, and a salt of the prefix index).
        deadline: seconds on the engine's clock by which the first token must be out, or None.
        salt: a caller's own salt of the prefix index, kept apart from every other field.
        group: requests of one prompt (``n`` samples) share it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    adapter: str | None = None
    tenant: str = ""
    deadline: float | None = None
    salt: str = ""
    group: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise OptionError(f"Request {self.id!r} has an empty prompt; it needs at least one token.")


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One token of a request.

    Attributes:
        request, id: the request's id, the token's.
        index: among the request's new tokens.
        logprob, top: its log-probability and the likeliest alternatives, where asked for.
    """

    request: str
    id: int
    index: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request.

    Attributes:
        request, outcome: id; how it ended.
        prompt_tokens, generated_tokens: counts.
        reused: prompt tokens whose keys and values came from the prefix index.
        message, error: why, where the outcome is an error's.
    """

    request: str
    outcome: Outcome
    prompt_tokens: int
    generated_tokens: int
    reused: int = 0
    message: str = ""
    error: RankwiseError | None = None


Event = Token | Finished
#: name, value, labels: the engine reports a timing, a size or a count.  Called on the engine's thread, so quick, and never raises
Observer = Callable[[str, float, Mapping[str, str]], None]
