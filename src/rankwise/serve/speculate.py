"""Speculation by prompt look-up: what followed the last tokens when they stood earlier in the same request is tried again.

The guesses are verified as further rows of the request's own step, under its own adapter, so no second model is needed
and a greedy answer is the same with or without them.
"""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.serve.plan import Span
from rankwise.serve.sampler import Drawn

GRAM = 3  #: tokens that must recur; shorter runs are tried where this one does not
REACH = 1024  #: how far back is looked


def lookup(tokens: Sequence[int], most: int, gram: int = GRAM) -> tuple[int, ...]:
    """Up to ``most`` tokens that followed the latest earlier occurrence of the last ``gram`` (then fewer, at least 2) tokens."""
    n = len(tokens)
    low = max(0, n - REACH)
    for size in range(gram, 1, -1):
        if n < size + 1:
            continue
        last = list(tokens[n - size :])
        for at in range(n - size - 1, low - 1, -1):
            if list(tokens[at : at + size]) == last:
                return tuple(tokens[at + size : at + size + most])
    return ()


def verified(span: Span, drawn: list[Drawn]) -> list[Drawn]:
    """The tokens of a span that stand: each guess that is what was drawn before it, and the draw after the last of them."""
    n = 0
    while n < len(drawn) - 1 and drawn[n].id == span.tokens[len(span.tokens) - len(drawn) + 1 + n]:
        n += 1
    return drawn[: n + 1]
