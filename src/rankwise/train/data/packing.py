"""Several documents in one row, none of which sees another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankwise.errors import DataError
from rankwise.train.data.tokens import IGNORED, Example

#: families whose state runs along the row: no mask keeps documents apart
_RECURRENT = ("mamba", "rwkv", "recurrent", "jamba", "zamba", "griffin", "xlstm", "lfm2")


@dataclasses.dataclass(frozen=True)
class Packed:
    """A row of documents: their ids and labels one after the other, and their lengths."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]


def pack(examples: Sequence[Example], max_length: int) -> list[Packed]:
    """Best-fit decreasing into rows of ``max_length``; the first label of each document is dropped, for no token of its
    own comes before it."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i))
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        n = len(examples[i])
        best = min((r for r in range(len(rows)) if room[r] >= n), key=lambda r: room[r], default=None)
        if best is None:
            rows.append([i])
            room.append(max_length - n)
        else:
            rows[best].append(i)
            room[best] -= n
    return [_join([examples[i] for i in row]) for row in sorted(rows, key=min)]


def _join(documents: Sequence[Example]) -> Packed:
    ids = [t for d in documents for t in d.input_ids]
    labels = [t for d in documents for t in [IGNORED, *d.labels[1:]]]
    return Packed(ids, labels, [len(d) for d in documents])


@dataclasses.dataclass
class Collator:
    """Batches of examples (padded) or packed rows (with positions and a block-diagonal causal mask).

    The mask is (B, 1, T, T) bool, True where a token may look, which sdpa and eager attention of transformers take as it
    is; positions start anew with each document.
    """

    pad_id: int
    mask: bool = True

    @classmethod
    def for_model(cls, model: nn.Module, pad_id: int) -> Collator:
        """Without the mask for models with sliding windows: they make theirs from positions that start anew, window
        included, where a mask that is given would stand for both kinds of layer."""
        kinds = getattr(getattr(model, "config", None), "layer_types", None) or []
        return cls(pad_id, mask=not any("sliding" in str(k) for k in kinds))

    def __call__(self, rows: Sequence[Example | Packed]) -> dict[str, Tensor]:
        longest = max(len(r.input_ids) for r in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for i, r in enumerate(rows):
            ids[i, : len(r.input_ids)] = torch.tensor(r.input_ids)
            labels[i, : len(r.labels)] = torch.tensor(r.labels)
        batch = {"input_ids": ids, "labels": labels}
        if isinstance(rows[0], Packed):
            document, position = self._documents(rows, longest)  # type: ignore[arg-type]
            same = document[:, :, None] == document[:, None, :]
            causal = torch.ones(longest, longest, dtype=torch.bool).tril()
            packed = {**batch, "position_ids": position}
            # without a mask transformers tells documents by their positions, but only where no cache is made
            return {**packed, "attention_mask": (same & causal)[:, None]} if self.mask else {**packed, "use_cache": False}  # type: ignore[dict-item]
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, r in enumerate(rows):
            mask[i, : len(r.input_ids)] = 1
        return {**batch, "attention_mask": mask}

    def _documents(self, rows: Sequence[Packed], longest: int) -> tuple[Tensor, Tensor]:
        """(B, T) index of each token's document and its position there; padding is a document of its own."""
        document = torch.full((len(rows), longest), -1)
        position = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, r in enumerate(rows):
            at = 0
            for k, n in enumerate(r.lengths):
                document[i, at : at + n] = k
                position[i, at : at + n] = torch.arange(n)
                at += n
        return document, position


@torch.no_grad()
def check_isolation(model: nn.Module, vocabulary: int) -> None:
    """One tiny forward: the second document of a packed row must answer as it does alone.

    Raises:
        DataError: this architecture lets documents of one row see each other; use packing=False.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    advice = "give packing=False (--no-packing)."
    if getattr(model.config, "is_encoder_decoder", False) or any(k in kind for k in _RECURRENT):  # type: ignore[union-attr]
        raise DataError(f"Rows of a {kind} model cannot hold several documents; {advice}")
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, vocabulary, (n,), generator=g).tolist() for n in (5, 7))
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        rows = pack([Example(b, b), Example(a, a)], 12)
        packed = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in Collator.for_model(model, 0)(rows).items() if k != "labels"
        }
        whole = model(**packed).logits[0, 7:]
        alone = model(input_ids=torch.tensor([a], device=device)).logits[0]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise DataError(f"This model does not take a packed row ({str(error).splitlines()[0]}); {advice}") from error
    finally:
        model.train(training)
    if not torch.allclose(whole.float(), alone.float(), atol=1e-3, rtol=1e-3):
        gap = (whole - alone).abs().max().item()
        raise DataError(f"In this model documents of one packed row see each other (logits move by {gap:.2g}); {advice}")
