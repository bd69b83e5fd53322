"""What every init refuses: no data, wrong options."""

from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.errors import AttachError, DataError, OptionError
from tests.models import llama


def test_data_driven_inits_ask_for_data() -> None:
    with pytest.raises(AttachError, match="'eva' reads statistics"):
        rw.attach(llama(), {"init": "eva"})
    with pytest.raises(DataError, match="empty"):
        rw.attach(llama(), {"init": "eva"}, calibration=[])
    with pytest.raises(DataError, match="no labels"):
        rw.attach(llama(), {"init": "lora_ga", "r": 2}, calibration=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("eva", {"rho": 0.5}),
        ("eva", {"tau": 2}),
        ("lora_ga", {"direction": "up"}),
        ("lora_ga", {"gamma": 0}),
        ("loftq", {"iterations": 0}),
    ],
)
def test_wrong_options(init: str, options: dict) -> None:
    with pytest.raises(OptionError, match=f"'{init}'"):
        rw.Recipe(init={"name": init, **options})
