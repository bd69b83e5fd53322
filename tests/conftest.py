"""One thread and fixed seeds: figures in tests are the same on every machine of a kind."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gc
import logging
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_log_level() -> Iterator[None]:
    """What a test (or a command that it calls) sets the package's loggers to is undone, or later tests would see no warnings."""
    loggers = [logging.getLogger(name) for name in ("rankwise", "rankwise.serve")]
    before = [log.level for log in loggers]
    yield
    for log, level in zip(loggers, before, strict=True):
        log.setLevel(level)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def pytest_collection_finish() -> None:
    """What imports have made is never garbage: looking through it again and again takes a tenth of the time of small tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
