"""The policy of a server that was not told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rankwise.catalogue import register
from rankwise.serve.policies.chain import ChainPolicy
from rankwise.serve.policies.cluster import Cluster
from rankwise.serve.policies.drain import Drain
from rankwise.serve.policies.early_abort import EarlyAbort
from rankwise.serve.policies.vtc import VirtualTokenCounter


@register("policy", "default", title="Fair, clustered, with deadlines and an end to starvation")
@dataclasses.dataclass
class Default(ChainPolicy):
    """Early abort's order within clustering, within fairness of tenants, and a drain for who has waited ``max_wait`` seconds.

    Attributes:
        slo: seconds to the first token for requests without a deadline of their own (None: they are never let go).
        d: adapters in a batch above which clustering begins.
        weights: of the tenants (1 where not named).
        max_wait: seconds.
        slots: most adapters in a batch, where the engine has such a limit.
    """

    rules: tuple[()] = dataclasses.field(default=(), init=False)
    slo: float | None = None
    d: int = 8
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    max_wait: float = 10.0
    slots: int | None = None
    name = "default"

    def __post_init__(self) -> None:
        self.parts = [
            EarlyAbort(self.slo),
            Cluster(self.d, max_wait=float("inf")),
            VirtualTokenCounter(self.weights),
            Drain(self.max_wait, self.slots),
        ]
