"""An adapter as its difference from another one: neighbours (seeds, later checkpoints) share most of what they hold."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.codecs import lossless, stream
from rankwise.codecs.base import AdapterCodec
from rankwise.codecs.stream import DTYPES, StreamSpec
from rankwise.codecs.weights import adapter_codec
from rankwise.errors import ArtefactError, OptionError

_KEYS = {"codec", "inner", "reference", "tensors"}


@register("codec", "delta", title="Difference from another adapter, by any other codec")
@dataclasses.dataclass
class Difference(AdapterCodec):
    """t = r + decode(encode(t − r)), r the tensor of the same name in the reference adapter, ``inner`` the codec of t − r.

    ``inner`` is a name or a mapping with its options.  ``lossless`` (the default) takes the difference of ordered bit
    patterns modulo 2^n and gives back the very bits; any other one is as exact as it is on t − r, which is taken in fp64,
    stored from fp32 (fp64 of fp64 tensors) and added in fp64, rounded once to the tensor's dtype.
    The stream names its reference by SHA-256 over names, dtypes, shapes and bytes of the tensors it is the difference
    from; another one is refused.  ``bind`` gives the reference.

    Raises OptionError without a reference, for one whose tensors differ in name, shape or dtype, and for delta of delta;
    decoding raises ArtefactError.
    """

    relative: ClassVar[bool] = True
    inner: str | dict[str, Any] = "lossless"

    def __post_init__(self) -> None:
        self._inner = adapter_codec(self.inner)
        self._reference: Mapping[str, Tensor] | None = None
        if self._inner.relative:
            raise OptionError("delta got inner='delta'; the difference itself must be coded by another codec.")
        self.exact = self._inner.exact

    def bind(self, reference: Mapping[str, Tensor]) -> Difference:
        """The same codec with ``reference``: at least the tensors that will be encoded or decoded."""
        bound = Difference(self.inner)
        bound._reference = reference
        return bound

    def encode_tensors(self, tensors: Mapping[str, Tensor]) -> bytes:
        """One stream that holds the inner codec's."""
        spec = StreamSpec.of(tensors)
        mine = self._matching(spec, OptionError)
        if self._inner.exact:
            body = lossless.pack(tensors, spec, mine)
        else:
            body = self._inner.encode_tensors({n: _less(tensors[n], mine[n]) for n in spec.names})
        header = {"inner": self._inner.name, "reference": digest(mine), "tensors": spec.to_json()}
        return stream.frame(self.name, header, body)

    def decode_tensors(self, data: bytes, max_numel: int = stream.MAX_NUMEL) -> dict[str, Tensor]:
        """The tensors; ArtefactError where the reference is not the one that was encoded against."""
        header, body = stream.unframe(self.name, data)
        if set(header) != _KEYS or not isinstance(header["inner"], str) or header["inner"] == self.name:
            raise ArtefactError(f"The {self.name} header's keys {sorted(header)[:8]} are wrong: the stream is damaged.")
        spec = StreamSpec.from_json(header["tensors"], max_numel)
        mine = self._matching(spec, ArtefactError)
        if digest(mine) != header["reference"]:
            raise ArtefactError(
                f"This adapter is a difference from another one (SHA-256 {str(header['reference'])[:12]}…), and the one given is "
                f"{digest(mine)[:12]}…; give the adapter that it was coded against."
            )
        try:
            inner = adapter_codec(header["inner"])
        except Exception as error:
            raise ArtefactError(f"The stream's inner codec is not known: {error}") from error
        if inner.exact:
            return lossless.unpack(body, spec, mine)
        found = inner.decode_tensors(body, max_numel)  # type: ignore[call-arg]
        if {n: tuple(t.shape) for n, t in found.items()} != dict(zip(spec.names, spec.shapes)):
            raise ArtefactError("The difference's tensors are not those of the header: the stream is damaged.")
        return {n: (mine[n].double() + found[n].double()).to(DTYPES[d]) for n, d in zip(spec.names, spec.dtypes)}

    def bits(self, numel: int | None = None) -> float:
        """Those of the inner codec."""
        return self._inner.bits(numel)

    def _matching(self, spec: StreamSpec, error: type[Exception]) -> dict[str, Tensor]:
        """The reference's tensors of ``spec``'s names, on the CPU."""
        if self._reference is None:
            raise error("This adapter is stored as a difference from another one; give that one as the reference.")
        out = {}
        for name, shape, dtype in zip(spec.names, spec.shapes, spec.dtypes):
            r = self._reference.get(name)
            if r is None or tuple(r.shape) != shape or r.dtype != DTYPES[dtype]:
                found = "lacks it" if r is None else f"has it as {tuple(r.shape)} {r.dtype}"
                raise error(
                    f"The tensor {name!r} is {shape} {DTYPES[dtype]}, and the reference {found}: they cannot be subtracted."
                )
            out[name] = r.detach().cpu()
        return out


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, by sorted name."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def _less(t: Tensor, r: Tensor) -> Tensor:
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    return (t.detach().cpu().double() - r.double()).to(wide)
