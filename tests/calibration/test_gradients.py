"""A site's gradient, formed from x and ∂L/∂y, is autograd's."""

from __future__ import annotations

import torch

from rankwise.calibration.base import calibrate
from rankwise.calibration.gradients import MeanGradient
from rankwise.sites import find_sites
from tests.models import FAMILIES, batch_for


def test_site_gradients_equal_autograds() -> None:
    for family in ("llama", "gpt2", "mixtral", "phi3", "vit"):
        model = FAMILIES[family][0]()
        batch = batch_for(model)
        sites = {
            n: s
            for n, s in find_sites(model).items()
            if s.spec.kind in ("linear", "experts", "conv") and s.spec.role not in ("router",)
        }
        sites = {n: s for n, s in sites.items() if not s.spec.tie_group}  # a tied gradient has both ends in it
        if family == "mixtral":
            sites = {n: s for n, s in sites.items() if s.spec.rows is None}
        stats = calibrate(model, list(sites.values()), {n: MeanGradient() for n in sites}, [batch])
        model.zero_grad()
        model(**batch).loss.backward()
        for n, s in sites.items():
            assert torch.allclose(stats[n], s.view(s.param.grad), atol=1e-5), f"{family} {n}"
