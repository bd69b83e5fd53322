"""Devices that are processes of this machine, joined by torch.distributed's gloo backend over the loopback address."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.serve.parallel.experimental.comm import PeerLost, Whose


class Gloo:
    """One process's end of a group of its own (torch's default group is left alone).

    Args:
        file: of the meeting, the same for all and new for each group; ``timeout``: seconds a collective may take.

    Raises:
        PeerLost: the others did not come to the meeting in time.
    """

    def __init__(self, rank: int, size: int, file: str, timeout: float):
        self.rank, self.size, self.timeout = rank, size, timeout
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = datetime.timedelta(seconds=timeout)
        store = dist.FileStore(file, size)
        store.set_timeout(options._timeout)
        with self._together():
            self.group: Any = gloo(store, rank, size, options)

    def all_reduce(self, x: Tensor, whose: Whose = "base") -> Tensor:
        with self._together():
            self.group.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor, whose: Whose = "adapter") -> Tensor:
        out = torch.empty(self.size, *x.shape, dtype=x.dtype)
        with self._together():
            self.group.allgather([list(out)], [x.contiguous()]).wait()
        return out

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0].rstrip(".")  # without gloo's file and line
            raise PeerLost(
                f"Device {self.rank} of {self.size} lost the others in a step ({why}), so the server ends. Start it again."
            ) from error
