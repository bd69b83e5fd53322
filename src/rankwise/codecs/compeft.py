"""ComPEFT: an adapter as the signs of its largest entries, their Golomb-coded places and one magnitude."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from rankwise.catalogue import register
from rankwise.codecs import golomb, sections, stream
from rankwise.codecs.base import AdapterCodec
from rankwise.codecs.signs import Signs, prune
from rankwise.codecs.stream import StreamSpec
from rankwise.errors import ArtefactError, OptionError


@register("codec", "compeft", title="ComPEFT: sparse ternary adapters", paper="arXiv:2311.13171", reference="192")
@dataclasses.dataclass
class ComPEFT(AdapterCodec):
    """τ̂ = γ·sign(τ) on the int(k·d) largest |τ|, γ = α·std(τ) of the unpruned vector; k is ``density``, α ``alpha``.

    τ is the vector of all tensors in sorted-name order, as they are (of IA³ scales take 1 off first, of a full
    model the base).  ``per_tensor`` thresholds and scales each tensor alone (a std across A and B mixes scales).
    Body: γ in 16 bits, then for each kept entry one sign bit and a Golomb–Rice gap (:mod:`~rankwise.codecs.sections`:
    each tensor by its own density); k = 0.2 takes 0.939 bits an entry (17× less than 16-bit) of a random mask, where
    H(k) = −(1−k)·log₂(1−k) − k·log₂(k/2) is 0.922.  Above k = 0.5 the dropped entries are listed instead.

    Departures.  The released code keeps one entry more than int(k·d), and more on ties; here it is exactly
    int(k·d), ties to the first, or every non-zero where there are fewer.  A vector that already has this form
    keeps its own γ whatever α (α·std would shrink it by √k at each pass), so the codec is idempotent.  γ is a
    bfloat16: exact in every dtype that a tensor is given back in.

    Raises OptionError for options out of range, tensors that are not finite or floating, too few entries for the
    density, and constant tensors (std 0); decoding raises ArtefactError.
    """

    searchable: ClassVar[bool] = True
    density: float = 0.2
    alpha: float = 1.0
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise OptionError(f"{self.name} got density={self.density!r}; give a number above 0 and up to 1.")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise OptionError(f"{self.name} got alpha={self.alpha!r}; give a finite number above 0.")
        if not isinstance(self.per_tensor, bool):
            raise OptionError(f"{self.name} got per_tensor={self.per_tensor!r}; give true or false.")

    def encode_tensors(self, tensors: Mapping[str, Tensor]) -> bytes:
        """The stream of ``tensors``; its body is within 1 % of :meth:`bits` on long random vectors."""
        spec = StreamSpec.of(tensors)
        header = {"density": self.density, "per_tensor": self.per_tensor, "tensors": spec.to_json()}
        return stream.frame(self.name, header, self._write(self.signs(tensors), _sizes(spec, self.per_tensor)))

    def decode_tensors(self, data: bytes, max_numel: int = stream.MAX_NUMEL) -> dict[str, Tensor]:
        """The tensors in their shapes and dtypes, by the stream's options; more than ``max_numel`` are refused."""
        header, body = stream.unframe(self.name, data)
        whole = set(header) == {"codec", "density", "per_tensor", "tensors"}
        if not whole or not isinstance(header["per_tensor"], bool) or not _is_number(header["density"]):
            raise ArtefactError(
                f"The {self.name} header's keys {sorted(header)[:8]} or their values are wrong: the stream is damaged."
            )
        spec = StreamSpec.from_json(header["tensors"], max_numel)
        parts = self._read(body, _sizes(spec, header["per_tensor"]))
        vector = np.concatenate([part.dense() for part in parts])
        return spec.unflatten(vector)

    def signs(self, tensors: Mapping[str, Tensor]) -> list[Signs]:
        """What is stored: one value of all tensors, or with ``per_tensor`` one a tensor that has entries."""
        spec = StreamSpec.of(tensors)
        vector = spec.flatten(tensors)
        return [
            prune(vector[start:stop], self.density, self.alpha, dtypes, where)
            for start, stop, dtypes, where in _spans(spec, self.per_tensor)
        ]

    def bits(self, numel: int | None = None) -> float:
        """Expected bits per parameter of a random mask, k·(b̄ + 1); ``numel`` adds γ's 16 bits."""
        listed = min(self.density, 1 - self.density)
        places = listed * golomb.position_bits(listed) if listed else 0.0
        return places + self.density + (16 / numel if numel else 0.0)

    def _write(self, parts: Sequence[Signs], sizes: sections.Sizes) -> bytes:
        """The body."""
        return sections.write(parts, sizes)

    def _read(self, body: bytes, sizes: sections.Sizes) -> list[Signs]:
        """The values in a body; ArtefactError for anything else."""
        return sections.read(body, sizes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sizes(spec: StreamSpec, per_tensor: bool) -> list[list[int]]:
    """Entries of the tensors of each vector that is pruned on its own, empty tensors left out."""
    sizes = [n for n in spec.sizes if n]
    return [[n] for n in sizes] if per_tensor else [sizes]


def _spans(spec: StreamSpec, per_tensor: bool) -> Iterator[tuple[int, int, tuple[str, ...], str]]:
    """(start, stop, dtypes, words for a message) of each vector that is pruned on its own."""
    if not per_tensor:
        yield 0, spec.numel, spec.dtypes, "all tensors"
        return
    for name, dtype, (start, stop) in zip(spec.names, spec.dtypes, spec.slices()):
        if stop > start:
            yield start, stop, (dtype,), f"the tensor {name!r}"
