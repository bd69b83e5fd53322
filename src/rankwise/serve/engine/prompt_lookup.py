"""Speculative tokens by prompt look-up (n-grams): what followed the last tokens when they stood earlier in the same request is tried again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.serve.batch import Span
    from rankwise.serve.engine.sampler import Drawn

NGRAM = 3  #: tokens that must recur; shorter runs are tried where this one does not
REACH = 1024  #: how far back is looked


class PromptLookup:
    """Where each run of 2 … :data:`NGRAM` tokens of one request stood last, kept up as tokens come: a guess is one look-up."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}
        self._seen: int | None = None  # runs that begin before it are entered

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens; ``tokens`` begin with those of the call before."""
        n = len(tokens)
        start = max(0, n - REACH) if self._seen is None else self._seen
        for at in range(start, n - 2):
            for size in range(2, min(NGRAM, n - 1 - at) + 1):
                self._last[tuple(tokens[at : at + size])] = at
        self._seen = max(start, n - NGRAM)  # the last runs of all but the shortest were not whole yet
        for size in range(min(NGRAM, n - 1), 1, -1):
            at = self._last.get(tuple(tokens[n - size :]), -1)
            if at >= max(0, n - REACH):
                return tuple(tokens[at + size : at + size + most])
        return ()


def verified(span: Span, drawn: list[Drawn]) -> list[Drawn]:
    """The tokens of a span that stand: each guess that is what was drawn before it, and the draw after the last of them."""
    n = 0
    while n < len(drawn) - 1 and drawn[n].id == span.tokens[len(span.tokens) - len(drawn) + 1 + n]:
        n += 1
    return drawn[: n + 1]
