"""Speculation: which of the guesses (:mod:`rankwise.serve.grams`) stand.

They are verified as further rows of the request's own step, under its own adapter, so no second model is needed and a
greedy answer is the same with or without them.
"""

from __future__ import annotations

from rankwise.serve.plan import Span
from rankwise.serve.sampler import Drawn


def verified(span: Span, drawn: list[Drawn]) -> list[Drawn]:
    """The tokens of a span that stand: each guess that is what was drawn before it, and the draw after the last of them."""
    n = 0
    while n < len(drawn) - 1 and drawn[n].id == span.tokens[len(span.tokens) - len(drawn) + 1 + n]:
        n += 1
    return drawn[: n + 1]
