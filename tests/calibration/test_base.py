"""The driver: one pass or several, and everything switched is switched back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankwise.calibration.base import calibrate
from rankwise.calibration.gradients import MeanGradient
from rankwise.sites import find_sites
from tests.contract.test_laws import calibration
from tests.models import llama


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    flags = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]

    def broken() -> Any:
        yield calibration()[0]
        raise RuntimeError("the data broke")

    sites = list(find_sites(model).values())
    with pytest.raises(RuntimeError, match="data broke"):
        calibrate(model, sites, {"model.layers.0.mlp.up_proj": MeanGradient()}, broken())
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads


def test_memory_limit_serves_sites_in_several_passes() -> None:
    model = llama()
    sites = [s for s in find_sites(model).values() if s.spec.role == "up"]
    data = calibration()
    one_pass = calibrate(model, sites, {s.name: MeanGradient() for s in sites}, data)
    two = calibrate(model, sites, {s.name: MeanGradient() for s in sites}, data, memory_limit=1)
    assert all(torch.allclose(one_pass[n], two[n]) for n in one_pass)
