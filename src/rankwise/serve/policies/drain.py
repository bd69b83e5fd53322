"""Drain: an adapter that has waited too long for room gets the room of the one that is nearest its end."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from rankwise.catalogue import register
from rankwise.serve.policies.base import Policy, RequestInfo, State, need


@register("policy", "drain", title="Draining an adapter for one that starves", reference="001")
@dataclasses.dataclass
class Drain(Policy):
    """Ends the starvation of adapters that find every LoRA page in use by adapters that never pause.

    A request starves once it has waited ``max_wait`` seconds.  If its adapter is not in the batch and its LoRA pages are not
    free (and fewer than ``slots`` adapters run, where given), the running adapters with fewest remaining tokens are
    *drained*: nothing of theirs is let in any more, until what they hold makes room.  Meanwhile no other adapter enters the
    batch; running ones and the base go on.  Where LoRA pages are not what it lacks, what becomes free is kept for it.
    Otherwise the order is the one given.
    """

    max_wait: float = 10.0
    slots: int | None = None
    name = "drain"
    draining: set[str] = dataclasses.field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        need(
            "drain",
            max_wait=(self.max_wait, self.max_wait >= 0, "0 seconds or more"),
            slots=(
                self.slots or 0,
                self.slots is None or self.slots >= 1,
                "at least 1, or None for as many as the LoRA pages hold",
            ),
        )

    def order(self, state: State) -> list[RequestInfo]:
        starving = sorted((j for j in state.waiting if j.ready and state.now - j.arrival >= self.max_wait), key=lambda j: j.arrival)
        self.draining, self.blocking = set(), False
        if not starving:
            return list(state.waiting)
        first, here = starving[0], state.adapters()
        ids = {j.id for j in starving}
        others = [j for j in state.waiting if j.id not in ids]
        if not self._lacks_adapter_room(first, state, here):
            self.blocking = True
            return [*starving, *others]
        self.draining = self._drained(first, state)
        going = here - self.draining
        # a starving request behind the first would take the room that is being made
        return [first, *(j for j in [*starving[1:], *others] if j.adapter is None or j.adapter in going)]

    def _lacks_adapter_room(self, job: RequestInfo, state: State, here: set[str]) -> bool:
        if job.adapter is None or job.adapter in here:
            return False
        no_slot = self.slots is not None and len(here) >= self.slots
        return no_slot or (not job.resident and job.lora_pages > state.free_lora_pages)

    def _drained(self, job: RequestInfo, state: State) -> set[str]:
        """The adapters nearest their end whose LoRA pages together are enough."""
        left: dict[str, int] = defaultdict(int)
        lora_pages: dict[str, int] = {}
        for j in state.running:
            if j.adapter is not None:
                left[j.adapter] = max(left[j.adapter], j.remaining)
                lora_pages[j.adapter] = j.lora_pages
        chosen: set[str] = set()
        room = state.free_lora_pages
        for adapter in sorted(left, key=lambda a: (left[a], a)):
            if chosen and (job.resident or room >= job.lora_pages):
                break
            chosen.add(adapter)
            room += lora_pages[adapter]
        return chosen
