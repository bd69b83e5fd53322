"""N devices in one process, a thread each, joined by a real ring of mailboxes that counts what is sent.

Each collective is the textbook ring: numbers are cut in N chunks, and in N−1 rounds every device hands one chunk to the
next (twice for a reduction: once adding, once passing on).  What is counted is what went into a mailbox, so that the
cost formulas (:func:`attention_traffic`) are checked and not assumed.  Errors: PeerLost after ``timeout``
seconds without a chunk, or once any device's program failed.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from rankwise.serve.parallel.experimental.comm import PeerLost, Whose

T = TypeVar("T")


class Ring:
    """The mailboxes; ``devices[n]`` is device n's communicator."""

    def __init__(self, size: int, timeout: float = 20.0):
        self.boxes: list[queue.SimpleQueue[Tensor]] = [queue.SimpleQueue() for _ in range(size)]
        self.broken = threading.Event()
        self.timeout = timeout
        self.devices = tuple(RingDevice(self, n, size) for n in range(size))

    def sent(self, whose: Whose) -> list[int]:
        """Numbers each device sent so far."""
        return [d.numbers[whose] for d in self.devices]

    def run(self, programs: Sequence[Callable[[RingDevice], T]]) -> list[T]:
        """Run one program a device, each in its thread; their results, or the first failure."""
        results: list[T] = [None] * len(programs)  # type: ignore[list-item]
        failures: list[BaseException] = []

        def run(n: int) -> None:
            try:
                results[n] = programs[n](self.devices[n])
            except BaseException as error:
                failures.append(error)
                self.broken.set()

        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(programs))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if failures:
            raise next((f for f in failures if not isinstance(f, PeerLost)), failures[0])
        return results


class RingDevice:
    """One device's end of a :class:`Ring`.

    Attributes:
        numbers, nbytes: what it sent, by whose account; ``calls``: collectives, by whose account.
    """

    def __init__(self, ring: Ring, rank: int, size: int):
        self.ring, self.rank, self.size = ring, rank, size
        self.numbers: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def all_reduce(self, x: Tensor, whose: Whose = "base") -> Tensor:
        self.calls[whose] += 1
        chunks = list(x.view(-1).tensor_split(self.size))
        for r in range(self.size - 1):  # each chunk goes round once and is added up on its way
            self._send(chunks[(self.rank - r) % self.size], whose)
            chunks[(self.rank - r - 1) % self.size].add_(self._receive())
        for r in range(self.size - 1):  # then the sums go round
            self._send(chunks[(self.rank - r + 1) % self.size], whose)
            chunks[(self.rank - r) % self.size].copy_(self._receive())
        return x

    def all_gather(self, x: Tensor, whose: Whose = "adapter") -> Tensor:
        self.calls[whose] += 1
        out = x.new_empty(self.size, *x.shape)
        out[self.rank] = x
        for r in range(self.size - 1):
            self._send(out[(self.rank - r) % self.size], whose)
            out[(self.rank - r - 1) % self.size] = self._receive()
        return out

    def _send(self, chunk: Tensor, whose: Whose) -> None:
        self.numbers[whose] += chunk.numel()
        self.nbytes[whose] += chunk.numel() * chunk.element_size()
        self.ring.boxes[(self.rank + 1) % self.size].put(chunk.clone(memory_format=torch.contiguous_format))

    def _receive(self) -> Tensor:
        waited = 0.0
        while not self.ring.broken.is_set() and waited < self.ring.timeout:
            try:
                return self.ring.boxes[self.rank].get(timeout=0.1)
            except queue.Empty:
                waited += 0.1
        raise PeerLost(f"Device {self.rank} of {self.size} got nothing from the one before it for {waited:.0f} s.")


# --- what collectives cost ------------------------------------------------------------------------------------
class Alone:
    """One device: nothing is sent."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor, whose: Whose = "base") -> Tensor:
        return x

    def all_gather(self, x: Tensor, whose: Whose = "adapter") -> Tensor:
        return x[None]


def ring_all_reduce(numbers: int, size: int) -> Fraction:
    """Numbers a device sends to reduce so many, on average over the ring."""
    return Fraction(2 * (size - 1) * numbers, size)


def ring_all_gather(numbers: int, size: int) -> Fraction:
    """Numbers a device sends so that all have these ``numbers``, a part of each."""
    return Fraction((size - 1) * numbers, size)


def attention_traffic(tokens: int, hidden: int, rank: int, size: int) -> tuple[Fraction, Fraction]:
    """(base, adapter): numbers a device sends for one attention block.

    Args:
        tokens, hidden: of the input, T×h.
        rank: of the adapter, rounded up to a multiple of ``size`` at q, k, v.
        size: how many devices.
    """
    padded = -(-rank // size) * size
    gathers = 3 * ring_all_gather(tokens * padded, size)
    return ring_all_reduce(tokens * hidden, size), gathers + ring_all_reduce(tokens * rank, size)
