"""Policies composed: each rearranges what the one before it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rankwise import catalogue
from rankwise.catalogue import register
from rankwise.errors import OptionError
from rankwise.serve.policies.base import SIMULATED, Policy, RequestInfo, State, Verdict, refuse_unserved


@register("policy", "chain", title="Policies composed, innermost first")
@dataclasses.dataclass
class ChainPolicy(Policy):
    """Applies ``rules``, innermost first, each to the order (or subset) that the one before gave.

    Rules are names, mappings with a ``name`` and options, or policies.  Every rule here rearranges stably, so an inner
    order survives where the outer has no wish.  The verdict is the first that is not ADMIT; requests that are let go come
    at the head, where no other can hide them.  A blocking rule blocks the chain.
    """

    rules: Sequence[str | Mapping[str, Any] | Policy] = ("fcfs",)
    name = "chain"

    def __post_init__(self) -> None:
        if not self.rules:
            raise OptionError("A chain got no rules; it needs at least one, for instance 'fcfs'.")
        self.parts: list[Policy] = [make(r) for r in self.rules]
        self.unserved = next((p.unserved for p in self.parts if p.unserved), "")

    def order(self, state: State) -> list[RequestInfo]:
        jobs = list(state.waiting)
        gone = [j for j in jobs if self.verdict(j, state) in (Verdict.ABORT, Verdict.REJECT)]
        ids = {j.id for j in gone}
        jobs = [j for j in jobs if j.id not in ids]
        for part in self.parts:
            jobs = part.order(dataclasses.replace(state, waiting=jobs))
        self.blocking = any(p.blocking for p in self.parts)
        return gone + jobs

    def verdict(self, job: RequestInfo, state: State) -> Verdict:
        verdicts = (p.verdict(job, state) for p in self.parts)
        return next((v for v in verdicts if v is not Verdict.ADMIT), Verdict.ADMIT)

    def admitted(self, job: RequestInfo, now: float) -> None:
        for p in self.parts:
            p.admitted(job, now)

    def stepped(self, produced: Mapping[str, int], jobs: Sequence[RequestInfo], now: float) -> None:
        for p in self.parts:
            p.stepped(produced, jobs, now)

    def finished(self, job: RequestInfo, now: float) -> None:
        for p in self.parts:
            p.finished(job, now)


def make(policy: str | Mapping[str, Any] | Policy) -> Policy:
    """A policy from its name, from a mapping with ``name`` and options, or as it is.

    Raises:
        UnknownName, OptionError: no such policy or option (the message has the nearest names); one for the simulator alone.
    """
    if not isinstance(policy, str | Mapping):
        return policy
    options = {"name": policy} if isinstance(policy, str) else dict(policy)
    if "name" not in options:
        raise OptionError(f"A policy was given as {options!r}; give its name under 'name'.")
    name = options.pop("name")
    refuse_unserved(name, SIMULATED.get(name, ""))
    return catalogue.make("policy", name, **options)


def names() -> Iterable[str]:
    """All policies known, by name."""
    return [m.name for m in catalogue.methods("policy")]
