"""Rows to batches: padded examples, or packed rows in which no document sees another.

Two ways say which tokens belong together.  *mask*: a block-diagonal causal mask (B, 1, T, T), which transformers takes as
it is, for every layer alike.  *varlen*: only positions that start anew with each document; transformers makes the masks
from them, one for each kind of layer, and flash attention the lengths.  It does so only where no mask and no cache is
given, so such a batch says ``use_cache: False``.  Models with sliding or chunked layers need varlen, since a given mask
would stand for their window as well; the others are given the mask, which asks nothing of the model's own code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rankwise.errors import DataError, OptionError
from rankwise.train.data.chat import IGNORED
from rankwise.train.data.packing import Packed

if TYPE_CHECKING:
    from rankwise.train.data.tokens import Example

Attention = Literal["mask", "additive", "varlen"]


def attention_for(model: nn.Module) -> Attention:
    """How packed rows are given to this model: mask (sdpa), additive (eager adds what it is given, so a bool mask would
    mask nothing), or varlen (flash and flex attention, and windows)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = str(getattr(text, "_attn_implementation", "sdpa"))
    layers = [str(k) for k in getattr(text, "layer_types", None) or []]
    windowed = any("sliding" in k or "chunked" in k for k in layers)
    if not layers:  # every layer has the window
        windowed = any(getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if windowed or kind not in ("sdpa", "eager"):
        return "varlen"
    return "mask" if kind == "sdpa" else "additive"


@dataclasses.dataclass
class Collator:
    """Batches of examples (padded on the right, mask (B, T)) or of packed rows.

    A packed batch holds input_ids, labels and position_ids, (B, T) int64, and by ``attention``: mask, a bool
    (B, 1, T, T), True where a token may look; additive, the same as float32 zeros and the type's lowest; varlen,
    ``use_cache: False`` in its place.  ``multiple`` rounds T up (for tensor cores, or a compiled graph).
    """

    pad_id: int
    attention: Attention = "mask"
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.attention not in ("mask", "additive", "varlen"):
            raise OptionError(f"attention is mask, additive or varlen; it is {self.attention!r}. Collator.for_model chooses.")
        if self.multiple < 1:
            raise OptionError(f"multiple is at least 1; it is {self.multiple}.")

    @classmethod
    def for_model(cls, model: nn.Module, pad_id: int, multiple: int = 1) -> Collator:
        """The collator that gives packed rows as this model isolates them; see :func:`attention_for`."""
        return cls(pad_id, attention_for(model), multiple)

    def __call__(self, rows: Sequence[Example | Packed]) -> dict[str, Any]:
        if not rows:
            raise DataError("A batch needs at least one row.")
        packed = [isinstance(r, Packed) for r in rows]
        if any(packed) and not all(packed):
            raise DataError("A batch holds packed rows or examples, not both.")
        longest = -(-max(len(r) for r in rows) // self.multiple) * self.multiple
        ids = torch.full((len(rows), longest), self.pad_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for i, r in enumerate(rows):
            ids[i, : len(r)] = torch.tensor(r.input_ids)
            labels[i, : len(r)] = torch.tensor(r.labels)
        labels[:, 0] = IGNORED  # nothing comes before it; what counts labels (the Trainer does) counts what is learnt
        batch = {"input_ids": ids, "labels": labels}
        if not packed[0]:
            mask = torch.zeros(len(rows), longest, dtype=torch.long)
            for i, r in enumerate(rows):
                mask[i, : len(r)] = 1
            return {**batch, "attention_mask": mask}
        position = torch.zeros(len(rows), longest, dtype=torch.long)  # padding: position 0 each, so documents of one token
        for i, r in enumerate(rows):
            position[i, : len(r)] = torch.tensor(r.position_ids)  # type: ignore[union-attr]
        batch["position_ids"] = position
        if self.attention == "varlen":
            return {**batch, "use_cache": False}
        allowed = block_mask(documents_of(position))
        return {**batch, "attention_mask": allowed if self.attention == "mask" else _additive(allowed)}


def documents_of(position: Tensor) -> Tensor:
    """(B, T) index of the document each token is of, from positions that start anew with each."""
    return (position == 0).cumsum(-1)


def block_mask(document: Tensor) -> Tensor:
    """(B, 1, T, T) bool: token q may look at token k ≤ q of the same document; every token sees itself."""
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)


def tokens_of_loss(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are predicted: labels other than −100, the first of each row left out."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
