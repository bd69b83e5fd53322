"""Where the memory of a training step goes, counted by category rather than guessed from the process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rankwise.train.session import Session


@contextlib.contextmanager
def saved_bytes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Bytes that autograd keeps for backward in this block, each storage once; parameters and buffers are not counted.

    The dict's "bytes" is filled at the end of the block.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # keeps storages from being reused under the same address

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(t)
        return t

    out: dict[str, int] = {"bytes": 0}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield out
    out["bytes"] = sum(seen.values())


def account(session: Session, batch: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of one step by category: base, adapter, gradients, optimiser state, saved activations.

    Runs one forward (no backward, no update); gradients are counted as they will be, one number a trainable one.
    """
    model, adapter = session.model, session.adapter
    adapter_tensors = list(adapter.tensors().values())
    trainable = [p for p in adapter.trainable_parameters() if p.requires_grad]
    mine = {id(t) for t in adapter_tensors}
    training = model.training
    model.train()
    with saved_bytes(model) as saved:
        loss = model(**batch).loss
    del loss
    model.train(training)
    return {
        "base": sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in mine),
        "adapter": sum(t.numel() * t.element_size() for t in adapter_tensors),
        "gradients": sum(p.numel() * p.element_size() for p in trainable),
        "optimiser": 4 * sum(session.optimizer.state_elements().values()),
        "saved activations": saved["bytes"],
    }
