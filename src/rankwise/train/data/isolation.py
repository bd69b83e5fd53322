"""Whether a model keeps the documents of a packed row apart: measured, before the run, on the model itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import DataError, Option
from rankwise.train.data.collate import Collator, documents_of
from rankwise.train.data.packing import Packed

#: families and layers whose state runs along the row: no mask keeps documents apart
_RECURRENT = ("mamba", "rwkv", "recurrent", "jamba", "zamba", "griffin", "xlstm", "lfm2", "bamba", "linear_attention", "conv")
_ADVICE = ("give ", Option("packing", False), ".")


@torch.no_grad()
def check_isolation(model: nn.Module, batch: Mapping[str, Any] | int) -> None:
    """Three forwards of one short row of two documents: the second must answer as before when the first is changed, and
    as it does alone (positions and windows are then right too).

    Args:
        batch: a packed batch, whose shortest row of two documents is taken, or the size of the vocabulary.

    Raises:
        DataError: in this architecture documents of one row see each other, or it takes no packed row; use packing=False.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = str(getattr(text, "model_type", ""))
    words = [kind, *(str(k) for k in getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [])]
    if getattr(config, "is_encoder_decoder", False) or any(r in w for w in words for r in _RECURRENT):
        raise DataError(f"Rows of a {kind} model cannot hold several documents, since its state runs along the row; ", *_ADVICE)
    first, second = _documents(batch, _window(text))
    changed = [(t + 1) % (max(first + second) + 1) for t in first]
    training = model.training
    model.eval()
    try:
        at = len(first)
        packed, moved = (_logits(model, [a, second])[at:] for a in (first, changed))
        alone = _logits(model, [second], packed=False)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise DataError(f"This model does not take a packed row ({(str(error).splitlines() or ['?'])[0]}); ", *_ADVICE) from error
    finally:
        model.train(training)
    scale = alone.std().item() + 1e-12
    loose = 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-2
    leak, gap = ((packed - other).abs().max().item() / scale for other in (moved, alone))
    if not leak <= loose:
        raise DataError(
            f"In this model documents of one packed row see each other (logits move by {leak:.2g} of their spread); ", *_ADVICE
        )
    if not gap <= 100 * loose:
        raise DataError(
            f"This model answers a document of a packed row otherwise than alone (by {gap:.2g} of the logits' spread); ", *_ADVICE
        )


def _logits(model: nn.Module, documents: list[list[int]], packed: bool = True) -> Tensor:
    """(T, vocabulary) fp32 logits of one row."""
    device = next(model.parameters()).device
    if packed:
        row = Packed([t for d in documents for t in d], [t for d in documents for t in d], [len(d) for d in documents])
        given = {k: v for k, v in Collator.for_model(model, 0)([row]).items() if k != "labels"}
    else:
        given = {"input_ids": torch.tensor(documents)}
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    return model(**given).logits[0].float()


def _window(config: Any) -> int:
    """The model's attention window, or 0."""
    return int(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0)


def _documents(batch: Mapping[str, Any] | int, window: int) -> tuple[list[int], list[int]]:
    """Two documents: of the batch, or drawn; those drawn reach over a short window."""
    if not isinstance(batch, int):
        found = _from_batch(batch)
        if found:
            return found
        batch = int(batch["input_ids"].max()) + 1
    g = torch.Generator().manual_seed(0)
    n = window + 3 if 0 < window <= 61 else 5
    first, second = (torch.randint(0, batch, (k,), generator=g).tolist() for k in (n + 2, n))
    return first, second


def _from_batch(batch: Mapping[str, Any]) -> tuple[list[int], list[int]] | None:
    """The neighbouring pair of the fewest tokens, of two each at the least."""
    if "position_ids" not in batch:
        raise DataError("check_isolation takes a packed batch (with position_ids), or the size of the vocabulary.")
    best: tuple[list[int], list[int]] | None = None
    for ids, document in zip(batch["input_ids"].cpu(), documents_of(batch["position_ids"].cpu()), strict=True):
        parts = [p.tolist() for p in ids.split(torch.unique_consecutive(document, return_counts=True)[1].tolist())]
        for a, b in itertools.pairwise(parts):
            if min(len(a), len(b)) > 1 and (best is None or len(a) + len(b) < len(best[0]) + len(best[1])):
                best = (a, b)
    return best
