"""From a body's fields to what the engine samples by, with every bound said in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankwise.serve.http.errors import bad
from rankwise.serve.http.schemas import Chat, Completion, Generate
from rankwise.serve.types import Sampling

if TYPE_CHECKING:
    from rankwise.serve.http.settings import Settings

#: OpenAI's default for completions; a chat goes on to the end of the context
COMPLETION_TOKENS = 16
SEEDS = 2**63


def stops(body: Generate, settings: Settings) -> list[str]:
    """The stop strings.  Raises Refusal."""
    given = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    if len(given) > settings.stops:
        raise bad(f"stop has {len(given)} strings; this server takes {settings.stops}.", "stop")
    for s in given:
        if not 1 <= len(s) <= settings.stop_length:
            raise bad(f"A stop string has {len(s)} characters; it has from 1 to {settings.stop_length}.", "stop")
    return given


def choices(body: Generate, settings: Settings) -> int:
    """``n``.  Raises Refusal."""
    n = 1 if body.n is None else body.n
    if not 1 <= n <= settings.choices:
        raise bad(f"n = {n}; this server makes from 1 to {settings.choices} choices.", "n")
    if isinstance(body, Completion) and body.best_of not in (None, n):
        raise bad(
            f"best_of = {body.best_of} with n = {n}: choices are not ranked here; leave best_of out.", "best_of", "unsupported"
        )
    return n


def max_tokens(body: Generate, prompt: int, settings: Settings) -> int:
    """How many tokens are made at most.

    Raises:
        Refusal: prompt and answer together are longer than the model's context.
    """
    room = settings.context - prompt
    asked = body.max_tokens
    if isinstance(body, Chat) and body.max_completion_tokens is not None:
        if asked not in (None, body.max_completion_tokens):
            raise bad("max_tokens and max_completion_tokens say the same, and here they differ; give one.", "max_tokens")
        asked = body.max_completion_tokens
    if asked is None:
        asked = max(room, 1) if isinstance(body, Chat) else COMPLETION_TOKENS
    if asked > room and asked >= 1:
        raise bad(
            f"The context is {settings.context} tokens; the prompt has {prompt} and max_tokens asks for {asked}, "
            f"{prompt + asked} in all. Shorten the prompt or ask for fewer.",
            "max_tokens" if prompt < settings.context else "messages" if isinstance(body, Chat) else "prompt",
            "context_length_exceeded",
        )
    return asked


def sampling(body: Generate, prompt: int, index: int, settings: Settings) -> Sampling:
    """How choice ``index`` of a prompt of so many tokens is drawn.  Choice i of a seeded request is drawn with seed + i.

    Args:
        body: the request.
        prompt: tokens of the prompt.
        index: of the choice.
        settings: the server's bounds.

    Raises:
        Refusal, OptionError: a value out of its range.
    """
    if body.seed is not None and not -SEEDS <= body.seed < SEEDS - settings.choices:
        raise bad(f"seed = {body.seed}; it is a whole number of 64 bits.", "seed")
    return Sampling(
        max_tokens=max_tokens(body, prompt, settings),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=_or(body.top_k, 0),
        seed=None if body.seed is None else body.seed + index,
        stop_ids=_ids(body.stop_token_ids or (), "stop_token_ids", settings),
        ignore_eos=bool(body.ignore_eos),
        logprobs=_logprobs(body),
        logit_bias=_bias(body.logit_bias or {}, settings),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _ids(ids: Any, field: str, settings: Settings) -> tuple[int, ...]:
    for i in ids:
        if not 0 <= i < settings.vocabulary:
            raise bad(f"{field} has the token id {i}; ids go from 0 to {settings.vocabulary - 1}.", field)
    return tuple(ids)


def _bias(given: dict[str, float], settings: Settings) -> dict[int, float]:
    if len(given) > 1024:
        raise bad(f"logit_bias has {len(given)} tokens; it has at most 1024.", "logit_bias")
    bias = {}
    for key, value in given.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise bad(f"logit_bias has the key {key[:40]!r}; keys are token ids.", "logit_bias")
        if not -100 <= value <= 100:
            raise bad(f"logit_bias of token {key} is {value}; it is from -100 to 100.", "logit_bias")
        bias[_ids([int(key)], "logit_bias", settings)[0]] = float(value)
    return bias


def _logprobs(body: Generate) -> int | None:
    if isinstance(body, Completion):
        if body.echo and body.logprobs is not None:
            raise bad(
                "echo with logprobs would need the prompt's log-probabilities, which are not computed; ask for one.", "logprobs"
            )
        return body.logprobs
    assert isinstance(body, Chat)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs says nothing without logprobs: true; add it.", "top_logprobs")
    return _or(body.top_logprobs, 0) if body.logprobs else None
