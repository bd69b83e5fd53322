"""Bits per byte: a language model's loss on a text in a unit that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rankwise.errors import DataError

_PAD_LABEL = -100


def _byte_count(texts: Sequence[str]) -> int:
    if isinstance(texts, str):
        raise DataError("Got one string; expected a list of texts: put it in brackets.")
    total = sum(len(text.encode()) for text in texts)
    if total == 0:
        raise DataError(f"Got {len(texts)} texts of 0 bytes in all; bits per byte needs at least one byte.")
    return total


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _windows(tokenizer: Any, texts: Sequence[str], length: int) -> Iterator[list[int]]:
    """Each text in pieces of ``length - 1`` tokens that do not overlap, each piece after a BOS of its own."""
    for text in texts:
        ids = _tokens(tokenizer, text)
        for start in range(0, len(ids), length - 1):
            yield [tokenizer.bos_token_id, *ids[start : start + length - 1]]


def _batches(windows: list[list[int]], batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input ids, labels), each (n, longest), right-padded: a causal model's scores never see the padding."""
    windows = sorted(windows, key=len)
    while windows:
        longest = len(windows[-1])
        count = max(1, batch_tokens // longest)
        group, windows = windows[-count:], windows[:-count]
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        labels = torch.full_like(ids, _PAD_LABEL)
        for row, window in enumerate(group):
            ids[row, : len(window)] = torch.tensor(window)
            labels[row, 1 : len(window)] = torch.tensor(window[1:])
        yield ids, labels


@torch.no_grad()
def bits_per_byte(
    model: Any, tokenizer: Any, texts: Sequence[str], *, window: int | None = None, batch_tokens: int = 4096
) -> float:
    """−log₂ p(texts) / UTF-8 bytes, each token scored once, in windows that do not overlap and begin with BOS.

    Args:
        model: a causal language model; in eval mode for the call.
        tokenizer: its tokenizer.
        texts: at least one byte in all.
        window: tokens, with BOS; default the model's context, at most 512.
        batch_tokens: tokens of one forward.

    Raises:
        DataError: texts without a byte.
    """
    total = _byte_count(texts)
    length = window or min(512, model.config.max_position_embeddings)
    if length < 2:
        raise DataError(f"Got window={length}; a window holds BOS and at least one token, so 2 or more.")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = 0.0
    try:
        for ids, labels in _batches(list(_windows(tokenizer, texts, length)), batch_tokens):
            logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten().to(device), ignore_index=_PAD_LABEL, reduction="sum"
            ).item()
    finally:
        model.train(was_training)
    return nats / math.log(2) / total


def unigram_bits_per_byte(tokenizer: Any, texts: Sequence[str]) -> float:
    """The entropy of the texts' own token frequencies per byte: the best that a model blind to context could do."""
    total = _byte_count(texts)
    counts = Counter(token for text in texts for token in _tokens(tokenizer, text))
    tokens = sum(counts.values())
    return -sum(n * math.log2(n / tokens) for n in counts.values()) / total
