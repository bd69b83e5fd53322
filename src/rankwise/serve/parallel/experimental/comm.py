"""What devices say to one another within a step, and what it costs.

Two collectives suffice.  ``all_reduce`` leaves Σ_n x_n on every device; ``all_gather`` leaves all x_n, (N, …), on each.
By a ring of N devices a device sends 2(N−1)/N of the numbers it reduces, and (N−1)/N of those that are gathered, so
for T tokens of hidden size h and an adapter of rank r at q, k, v and o (S-LoRA, arXiv 2311.03285, section 6):

    base 2(N−1)Th/N        adapter 3(N−1)Tr/N + 2(N−1)Tr/N = 5(N−1)Tr/N        ratio 5r/2h

All devices call the same collectives in the same order.  Errors: PeerLost, where a device is gone or late.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from rankwise.errors import RankwiseError

Whose = Literal["base", "adapter"]  #: on whose account numbers travel


class PeerLost(RankwiseError):
    """Another device of the team ended or did not answer in time; the team cannot go on."""


class Communicator(Protocol):
    """One device's end; ``rank`` of ``size``."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor, whose: Whose = "base") -> Tensor:
        """Σ over the devices of x, in place; equal to the bit on all of them.  ``x`` is contiguous."""
        ...

    def all_gather(self, x: Tensor, whose: Whose = "adapter") -> Tensor:
        """(N, *x.shape): what each device gave, in order of rank."""
        ...
