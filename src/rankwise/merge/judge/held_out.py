"""An evaluator from held-out data: what a soup is chosen by, read from a file of text or a folder of images.

The scores are those of :mod:`rankwise.train.evaluate`; the batches, for a learned soup's gradients, are the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from rankwise._renamed import warn
from rankwise.errors import OptionError, nearest
from rankwise.merge.judge.evaluator import Batch, Evaluator
from rankwise.train import stages
from rankwise.train.data.collate import Collator
from rankwise.train.data.readers import read
from rankwise.train.data.tokens import tokenize
from rankwise.train.evaluate import classify, evaluate

#: score → whether more of it is better
SCORES = {"loss": False, "perplexity": False, "bits_per_byte": False, "accuracy": True}


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutData:
    """``score``: of a model as it stands; ``batches``: its rows with labels; ``rows``: how many.

    Args:
        name: of the score.
        score: the model → its score.
        batches: for gradients.
        rows: how many there are.
    """

    name: str
    score: Callable[[nn.Module], float]
    batches: list[Batch]
    rows: int

    @property
    def higher_is_better(self) -> bool:
        return SCORES[self.name]

    def oracle(self, model: nn.Module) -> Evaluator:
        """The old spelling of :meth:`evaluator`."""
        warn("HeldOutData.oracle()", "evaluator()")
        return self.evaluator(model)

    def evaluator(self, model: nn.Module) -> Evaluator:
        """The evaluator that judges adapters of ``model``."""
        return Evaluator(model, self.score, batches=self.batches, higher_is_better=self.higher_is_better)


def held_out(
    model: nn.Module, reader: Any, data: Any, score: str = "loss", *, max_length: int = 512, batch: int = 8
) -> HeldOutData:
    """Scores of ``model``, and of what is of its shape, on data that nothing was trained on.

    Args:
        reader: the model's tokenizer or image processor.
        data: a path, or records, of any layout that :func:`rankwise.train` reads.
        score: loss, perplexity, bits_per_byte (plain text alone), or accuracy (images alone).
        max_length: tokens a row.
        batch: rows of one gradient.

    Raises:
        OptionError: a score that this data does not have; a text model without tokenizer.
        DataError: data that cannot be read.
    """
    if score not in SCORES:
        raise OptionError(f"The score {score!r} is not known; {nearest(score, SCORES)}")
    if stages.sees(model):
        return _images(*stages.images(data, model, reader), score, batch)
    return _text(model, reader, data, score, max_length, batch)


def _images(pixels: Any, labels: Any, score: str, batch: int) -> HeldOutData:
    _has(score, ("loss", "accuracy"), "images")
    cut = zip(pixels.split(batch), labels.split(batch), strict=True)
    batches: list[Batch] = [{"pixel_values": p, "labels": y} for p, y in cut]
    return HeldOutData(score, lambda m: classify(m, pixels, labels)[score], batches, len(labels))


def _text(model: nn.Module, reader: Any, data: Any, score: str, max_length: int, batch: int) -> HeldOutData:
    if reader is None:
        raise OptionError("The model has no tokenizer, so held-out text cannot be read for it; give the tokenizer beside it.")
    records = read(data)
    plain = all(r.kind == "text" for r in records)
    _has(score, ("loss", "perplexity", *(("bits_per_byte",) if plain else ())), "text" if plain else "prompts and answers")
    examples = tokenize(records, reader, max_length)
    pad = reader.pad_token_id or 0
    size = sum(len(r.fields["text"].encode()) for r in records) if plain else None
    batches: list[Mapping[str, Any]] = [Collator(pad)(examples[i : i + batch]) for i in range(0, len(examples), batch)]
    return HeldOutData(score, lambda m: evaluate(m, examples, pad_id=pad, bytes_=size)[score], batches, len(examples))


def _has(score: str, among: Sequence[str], what: str) -> None:
    if score not in among:
        raise OptionError(f"Held-out {what} is scored by {', '.join(among)}; it got {score!r}.")
