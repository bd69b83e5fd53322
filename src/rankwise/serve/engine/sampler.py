"""Tokens from logits, row by row: a request draws from a generator of its own, so its batch-mates change nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.seeds import generator
from rankwise.serve.memory import no_memory

if TYPE_CHECKING:
    from rankwise.serve.types import Sampling


@dataclasses.dataclass(slots=True, eq=False)
class SamplerState:
    """What one request's sampling keeps between steps: its generator, and how often it has said each token."""

    sampling: Sampling
    generator: torch.Generator
    said: Counter[int] = dataclasses.field(default_factory=Counter)

    @classmethod
    def of(cls, sampling: Sampling, run_seed: int, request: str) -> SamplerState:
        """A request's seed alone decides its draws; without one the engine's seed and the request's id do."""
        g = generator(run_seed, "sampling", request) if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
        return cls(sampling, g)

    @property
    def plain(self) -> bool:
        """Greedy without a change of the logits, so that the batch's argmax is the answer."""
        s = self.sampling
        return s.temperature == 0 and not (s.logit_bias or s.presence_penalty or s.frequency_penalty)


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """A token, or why there is none.

    Attributes:
        id: the token, -1 with a fault; ``logprob``, ``top``: where asked for, ``top`` as (id, log-probability).
        fault: what a request asks for that its vocabulary or generator cannot give.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    fault: str = ""


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Drawn]:
    """One token or fault a row of logits: (S, vocabulary) fp32; ``states`` row by row (a request may own several, in order).

    Log-probabilities are those of the model's own distribution, before temperature, bias and penalties.  Where memory runs
    out that error is raised, and every generator is as it was.
    """
    best = logits.argmax(-1).tolist() if any(s.plain for s in states) else []
    before = [None if s.sampling.temperature == 0 else s.generator.get_state() for s in states]
    out = []
    for i, state in enumerate(states):
        try:
            token = best[i] if state.plain else _draw(logits[i], state)
            out.append(_reported(logits[i], token, state.sampling.logprobs))
        except (IndexError, RuntimeError, ValueError, MemoryError) as error:
            if no_memory(error):
                for s, was in zip(states, before, strict=True):
                    if was is not None:
                        s.generator.set_state(was)
                raise
            out.append(Drawn(-1, fault=f"{type(error).__name__}: {error}"))  # one row's, which must not end the others
    for state, drawn in zip(states, out, strict=True):
        if not drawn.fault:
            state.said[drawn.id] += 1
    return out


def adjusted(logits: Tensor, state: SamplerState) -> Tensor:
    """The row after bias and penalties: presence c once for a token that was said, frequency c for each time."""
    s = state.sampling
    if not (s.logit_bias or s.presence_penalty or s.frequency_penalty):
        return logits
    row = logits.clone()
    for token, bias in s.logit_bias.items():
        row[token] += bias
    for token, times in state.said.items():
        row[token] -= s.presence_penalty + s.frequency_penalty * times
    return row


def distribution(logits: Tensor, state: SamplerState) -> Tensor:
    """The probabilities that are drawn from: temperature, then the ``top_k`` likeliest, then the nucleus of ``top_p``."""
    s = state.sampling
    row = adjusted(logits, state) / s.temperature
    if 0 < s.top_k < row.shape[0]:
        row = row.masked_fill(row < row.topk(s.top_k).values[-1], -torch.inf)
    p = row.softmax(-1)
    if s.top_p < 1:
        ordered, index = p.sort(descending=True, stable=True)
        # a token stays while those before it hold less than top_p, so the likeliest always stays
        cut = ordered.cumsum(-1) - ordered >= s.top_p
        cut[0] = False  # also where top_p is 0 in fp32
        ordered[cut] = 0
        p = torch.zeros_like(p).scatter_(0, index, ordered)
        p /= p.sum()
    return p


def _draw(logits: Tensor, state: SamplerState) -> int:
    if state.sampling.temperature == 0:
        return int(adjusted(logits, state).argmax())
    return int(torch.multinomial(distribution(logits, state), 1, generator=state.generator))


def _reported(logits: Tensor, token: int, top: int | None) -> Drawn:
    if top is None:
        return Drawn(token)
    logp = logits.log_softmax(-1)
    values, ids = logp.topk(top) if top else (logp[:0], torch.zeros(0, dtype=torch.int64))
    return Drawn(token, float(logp[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
