"""The first device: it has the engine, the adapters and the head, and tells the others what each step is.

The engine sees one runner and one store of pages.  Every step is told before it is run, every adapter that enters
pages is cut once for each device and sent to it.  A step that fails leaves the devices at different collectives,
so it ends the team.  Errors: PeerLost from then on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from rankwise.serve.model.runner import NativeRunner, RunnerSlot, own_logits
from rankwise.serve.ops.base import Pairs, check_pairs
from rankwise.serve.parallel.experimental.device import DevicePages, SlotCopy, device_of, slices
from rankwise.serve.parallel.experimental.messages import Acts, Build, StepMessage, Write
from rankwise.serve.parallel.experimental.non_lora_changes import local
from rankwise.serve.parallel.experimental.shares import Share, shares

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import LoadedAdapter
    from rankwise.serve.adapters.layout import Layout
    from rankwise.serve.batch import TokenPlan
    from rankwise.serve.parallel.experimental.comm import Communicator


class Team(Protocol):
    """The other devices, as the first one reaches them."""

    comm: Communicator
    size: int

    def start(self) -> None:
        """Have the others begin to read the base; what cannot be cut so was refused before."""
        ...

    def join(self) -> None:
        """Meet the others, who have read the base too; ``comm`` is there from then on.  Raises PeerLost."""
        ...

    def tell(self, rank: int, message: Any) -> None:
        """Raises PeerLost."""
        ...

    def ready(self) -> None:
        """Wait until every device has built what it was told.  Raises PeerLost."""
        ...

    def broken(self, error: BaseException) -> Exception:
        """A step failed; returns what to raise: why the team cannot go on."""
        ...


class SharedPages:
    """The pages of all devices behind the slot table's questions."""

    def __init__(self, team: Team, made: Sequence[Share], pages: DevicePages):
        self.team, self.shares, self.pages = team, made, pages

    @property
    def count(self) -> int:
        return self.pages.count

    @property
    def page_bytes(self) -> int:
        """Of the first device's part."""
        return self.pages.page_bytes

    def write(self, pages: Sequence[int], pairs: Mapping[str, Pairs]) -> None:
        """See :meth:`rankwise.serve.ops.base.LoraPages.write`."""
        for name, g in self.shares[0].whole.items():
            check_pairs(g, pairs.get(name), len(pages))
        split = self.pages.splits(pairs)
        for share in self.shares[1:]:
            self.team.tell(share.rank, Write(tuple(pages), split, _owned(slices(pairs, share, split))))
        self.pages.write(pages, split, slices(pairs, self.shares[0], split))


def _owned(pairs: Mapping[str, Pairs]) -> dict[str, Pairs]:
    """Copies: a view would be sent with all of the memory it looks into."""
    return {name: tuple(p and (p[0].clone(), p[1].clone()) for p in those) for name, those in pairs.items()}


class Leader(NativeRunner):
    """The first device's runner: it tells the others each step, and of a slot what acts there when it is first used.

    Args:
        args, more: of the :class:`~rankwise.serve.model.runner.NativeRunner`.
        team, made: the other devices, and every device's share.
    """

    def __init__(self, *args: Any, team: Team, made: Sequence[Share], **more: Any):
        self.team, self.shares = team, made  # first: a runner takes its first steps, the probe's, while it is made
        self.told: dict[int, SlotCopy] = {}  # as this device holds them
        super().__init__(*args, **more)

    def run(self, plan: TokenPlan, slots: Mapping[int, RunnerSlot]) -> Tensor:
        new = {s.slot: slots[s.slot] for s in plan.segments if s.slot not in self.told}
        gone = tuple(n for n in self.told if n not in slots)
        for share in self.shares[1:]:
            acts = {n: Acts(tuple(s.pages), tuple(s.served.pairs), local(s.served, share)) for n, s in new.items()}
            self.team.tell(share.rank, StepMessage(plan.spans, acts, gone))
        for n in gone:
            del self.told[n]
        self.told |= {n: SlotCopy(s.pages, self._own(s.served)) for n, s in new.items()}
        try:
            return super().run(plan, self.told)
        except Exception as error:
            raise self.team.broken(error) from error

    def _own(self, served: LoadedAdapter) -> LoadedAdapter:
        """The adapter as this device computes it: the head's changes are its alone."""
        head = {m: those for m, those in served.non_lora_changes.items() if m not in self.shares[0].cuts}
        return dataclasses.replace(served, non_lora_changes=head | local(served, self.shares[0]))


def lead(team: Team, model: nn.Module, layout: Layout, build: Build) -> tuple[SharedPages, Leader]:
    """Have every device build its part; the first one's runner has checked the team's logits against the model's own.

    Args:
        team: the other devices.
        model, layout: of the plain whole base, which stays as it is, in the host's memory: adapters are read against it.
        build: sizes and choices, the same on all devices.

    Raises:
        AttachError, OptionError: a model that cannot be cut so; logits that are not the model's. PeerLost: a device ended.
    """
    made = shares(model, layout, team.size)
    team.start()
    expected = own_logits(model, build.blocks, build.page)
    team.join()
    for rank in range(1, team.size):
        team.tell(rank, build)
    team.ready()
    pages, runner = device_of(model, made[0], team.comm, build, functools.partial(Leader, team=team, made=made), expected)
    return SharedPages(team, made, pages), runner
