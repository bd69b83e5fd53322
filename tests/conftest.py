"""One thread and fixed seeds: figures in tests are the same on every machine of a kind."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gc
import logging
import random

import numpy as np
import pytest
import torch

for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
torch.set_num_threads(1)


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
