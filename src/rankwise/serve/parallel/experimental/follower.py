"""A device that is not the first: it holds its slices and does in each step what it is told, until it hears no more."""

from __future__ import annotations

import dataclasses
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
from rankwise.serve.adapters.layout import Layout
from rankwise.serve.batch import make_plan
from rankwise.serve.model.runner import NativeRunner
from rankwise.serve.parallel.experimental.device import SlotCopy, device_of
from rankwise.serve.parallel.experimental.messages import Acts, Said, StepMessage, Stop, Write, hear, tell
from rankwise.serve.parallel.experimental.shares import shares

if TYPE_CHECKING:
    from rankwise.serve.parallel.experimental.comm import Communicator

_NOBODY = AdapterMetadata("", "", "", "", 0, 0, 0)


class Follower(NativeRunner):
    """The runner of such a device: it computes no logits, and what is right the first device judges."""

    def _gap(self, expected: Tensor) -> float:
        return 0.0

    def step(self, step: StepMessage, held: dict[int, SlotCopy]) -> None:
        """``held``: the slots told so far, brought up to date."""
        for n in step.gone:
            del held[n]
        held |= {n: SlotCopy(acts.pages, _touching(acts)) for n, acts in step.slots.items()}
        plan = make_plan(step.spans, self.page)
        self.run(dataclasses.replace(plan, sample_rows=torch.empty(0, dtype=torch.int64)), held)


def _touching(acts: Acts) -> LoadedAdapter:
    """What a runner needs to know of an adapter whose numbers are in pages."""
    return LoadedAdapter(_NOBODY, MappingProxyType(dict.fromkeys(acts.groups, ())), acts.non_lora_changes)


def follow(model: nn.Module, comm: Communicator, pipe: Connection) -> None:
    """Build what the first message says, then write and step as told, until :class:`Stop`.

    Raises:
        EOFError: the first device is gone. PeerLost: another is. Anything that a step raises.
    """
    build = hear(pipe)
    if isinstance(build, Stop):
        return
    share = shares(model, Layout(model), comm.size)[comm.rank]
    pages, runner = device_of(model, share, comm, build, Follower, torch.empty(0))
    del model  # the slices are copies: the whole weights go
    held: dict[int, SlotCopy] = {}
    tell(pipe, Said("ready"))
    while not isinstance(message := hear(pipe), Stop):
        if isinstance(message, Write):
            pages.write(message.pages, message.split, message.pairs)
        else:
            runner.step(message, held)
