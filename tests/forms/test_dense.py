from __future__ import annotations

import torch

import rankwise as rw
from tests.forms.helpers import one


def test_a_biased_linear_is_saved_whole() -> None:
    """The weight's change is added to the output; the bias's is read with the bias, not multiplied with x."""
    model, adapter, _ = one({"form": "dense"})
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.normal_()
    W, b = (adapter.sites[n].D for n in ("0", "0.bias"))
    x = torch.randn(4, 12)
    lin = model[0]
    want = x @ (lin._parameters["weight"] + W).T + lin._parameters["bias"] + b.reshape(-1)
    assert torch.allclose(model(x), want, atol=1e-5)
    with rw.view(model, {}):
        assert torch.allclose(model(x), torch.nn.functional.linear(x, lin._parameters["weight"], lin._parameters["bias"]))
