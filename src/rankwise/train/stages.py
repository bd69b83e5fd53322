"""What differs between kinds of data: preference pairs go through TRL's DPOTrainer, images are classified."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise import seeds
from rankwise.errors import DataError, Option, OptionError
from rankwise.train.data.images import read_images
from rankwise.train.data.layouts import Record
from rankwise.train.data.tokens import Example, tokenize

if TYPE_CHECKING:
    from rankwise.train.data.tokens import Truncation

STAGES = ("pt", "sft", "dpo")


def sees(model: nn.Module) -> bool:
    """Whether a model takes images (transformers' ``main_input_name``)."""
    return getattr(model, "main_input_name", "") == "pixel_values"


# --- images -------------------------------------------------------------------------------------------------
def images(data: Any, model: nn.Module, processor: Any = None) -> tuple[Tensor, Tensor]:
    """(pixel_values float (N, C, H, W), labels int64 (N,)) of a path, a mapping of the two, or records of the two.

    Raises:
        DataError: neither of these, lengths that differ, or a label that the model has no output for.
    """
    config: Any = getattr(model, "config", None)
    if isinstance(data, (str, Path)):
        pixels, labels, names = read_images(data, config.image_size, config.num_channels, processor)
        labels = torch.tensor(_outputs(names, config, str(data)))[labels]
    else:
        if not isinstance(data, Mapping):
            rows = list(data)
            if not rows or not all(isinstance(r, Mapping) and {"pixel_values", "labels"} <= set(r) for r in rows):
                raise DataError(
                    "An image model learns records of pixel_values and labels, a mapping of both, or a path; got neither."
                )
            data = {
                "pixel_values": torch.stack([torch.as_tensor(r["pixel_values"]) for r in rows]),
                "labels": [int(r["labels"]) for r in rows],
            }
        if not {"pixel_values", "labels"} <= set(data):
            raise DataError(f"Images need pixel_values and labels; the mapping holds {sorted(data)}.")
        pixels, labels = torch.as_tensor(data["pixel_values"]).float(), torch.as_tensor(data["labels"]).long()
    if pixels.dim() != 4 or len(pixels) != len(labels) or not len(labels):
        raise DataError(f"Expected N×C×H×W pixel_values and N labels, N ≥ 1; got {tuple(pixels.shape)} and {len(labels)}.")
    if int(labels.min()) < 0 or int(labels.max()) >= config.num_labels:
        raise DataError(
            f"Labels run from {int(labels.min())} to {int(labels.max())}, but the model tells {config.num_labels} classes apart (num_labels)."
        )
    return pixels, labels


def _outputs(names: Sequence[str], config: Any, source: str) -> list[int]:
    """The model's output for each class name: as its label2id has it, else as numbered, else in order if they are all there."""
    known = getattr(config, "label2id", None) or {}
    if set(names) <= set(known):
        return [int(known[n]) for n in names]
    if all(n.isdecimal() for n in names):
        return [int(n) for n in names]
    if len(names) == config.num_labels:
        return list(range(len(names)))
    raise DataError(
        f"{source} has {len(names)} classes ({', '.join(names[:4])}{', …' if len(names) > 4 else ''}), but the model tells "
        f"{config.num_labels} apart and does not know them by name; give all of them, or call them as its label2id does."
    )


def refuse_text_options(
    fmt: str = "auto",
    split: str | None = None,
    eval_split: str | None = None,
    max_length: int = 512,
    truncation: Truncation = "auto",
) -> None:
    """Raise OptionError where what only text records have is asked for with an image model.

    Args:
        fmt, split, eval_split: as in ``rw.train``; "auto", None and None choose nothing.
        max_length, truncation: likewise; 512 and "auto" are what nobody asked for.
    """
    if max_length != 512 or truncation != "auto":
        raise OptionError(
            Option("max_length"), " and ", Option("truncation"), " are about tokens; an image model has none. Leave them out."
        )
    if fmt != "auto" or split is not None or eval_split is not None:
        raise OptionError(
            Option("fmt"),
            ", ",
            Option("split"),
            " and ",
            Option("eval_split"),
            " choose among text records; an image model reads class folders or arrays.",
        )


def kept_aside(pixels: Tensor, labels: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, held out): a tenth drawn at random, since folders come class by class."""
    order = torch.randperm(len(labels), generator=seeds.generator(seed, "held-out", "images"))
    cut = max(1, len(labels) // 10)
    rest, held = (order[cut:], order[:cut]) if len(labels) > 1 else (order, order)
    return (pixels[rest], labels[rest]), (pixels[held], labels[held])


# --- preference pairs ---------------------------------------------------------------------------------------
def preferences(records: Sequence[Record], tokenizer: Any, max_length: int, truncation: Truncation) -> list[Example]:
    """Prompt with chosen answer of every pair, tokenised: to be sure that TRL will cut none, and as calibration.

    Args:
        records: preference pairs.
        tokenizer: of transformers.
        max_length: tokens of the longer side, prompt included.
        truncation: as in ``tokenize``; "auto" and False refuse a longer pair, True lets TRL cut it.

    Raises:
        DataError: records of another kind, or a pair longer than ``max_length`` (unless ``truncation=True``).
    """
    odd = next((r for r in records if r.kind != "preference"), None)
    if odd is not None:
        raise DataError(
            Option("stage", "dpo"), f" learns preference pairs (prompt, chosen, rejected), but {odd.where} is a {odd.kind} record."
        )
    if truncation == "split":
        raise OptionError(
            Option("truncation", "split"), " is for texts; for ", Option("stage", "dpo"), " it is auto, true or false."
        )
    both = [_half(r, side) for side in ("chosen", "rejected") for r in records]
    return tokenize(both, tokenizer, max_length, truncation=False if truncation == "auto" else truncation)[: len(records)]


def _half(record: Record, side: str) -> Record:
    prompt, answer = record.fields.get("prompt"), record.fields[side]
    if isinstance(answer, str):
        fields: dict[str, Any] = {"text": answer} if prompt is None else {"prompt": prompt, "completion": answer}
        return Record("text" if prompt is None else "completion", fields, record.where)
    return Record("messages", {"messages": [*(prompt or ()), *answer]}, record.where)


def pairs(records: Iterable[Record]) -> Any:
    """The records as the dataset that TRL reads."""
    import datasets

    return datasets.Dataset.from_list([dict(r.fields) for r in records])


__all__ = ["STAGES", "images", "kept_aside", "pairs", "preferences", "refuse_text_options", "sees"]
