"""Projectors: side, renewal, what is stored, what happens to moments."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.optim import Context, RandomProjector, SvdProjector, in_subspace, scale_by_adam
from rankwise.optim.projectors import down, up
from tests.optim.tools import by_name, param, tensor


def refreshed(projector, g, name="w", seed=0, step=1):
    state = projector.init(param(name, g))
    ctx = Context(step, 1.0, seed=seed)
    projector.refresh(g, state, ctx, name)
    return projector.basis(g, state, ctx, name), state


@pytest.mark.parametrize(
    "shape,side", [((8, 6), "right"), ((6, 10), "left"), ((7, 7), "right"), ((3, 8, 6), "right"), ((3, 5, 9), "left")]
)
def test_svd_leaves_the_smallest_remainder(shape, side):
    g = tensor(*shape, key=1)
    basis, state = refreshed(SvdProjector(3), g)
    assert state["side"] == side
    small = down(g, basis, side)
    assert small.shape == SvdProjector(3).small_shape(g.shape, side)
    left = (g - up(small, basis, side)).square().sum((-2, -1))
    torch.testing.assert_close(left, torch.linalg.svdvals(g)[..., 3:].square().sum(-1))
    assert basis.numel() == 3 * min(shape[-2:]) * (shape[0] if len(shape) == 3 else 1)


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (5,), (4, 5, 6, 7)])
def test_small_and_odd_shapes_pass_through(shape):
    assert SvdProjector(3).side(torch.Size(shape)) is None


def test_bf16_gradients_are_solved_in_fp32():
    basis, _ = refreshed(SvdProjector(2), tensor(8, 6, dtype=torch.bfloat16))
    assert basis.dtype == torch.bfloat16
    torch.testing.assert_close(basis.float() @ basis.float().T, torch.eye(2), atol=2e-2, rtol=0)


def test_random_is_of_seed_name_and_draw_and_keeps_norms_in_the_mean():
    g = tensor(8, 6)
    one, state = refreshed(RandomProjector(2), g)
    assert torch.equal(one, refreshed(RandomProjector(2), g)[0]) and state == {"side": "right", "drawn": 1}
    for other in ({"name": "v"}, {"seed": 1}, {"step": 201}):
        assert not torch.equal(one, refreshed(RandomProjector(2), g, **other)[0])
    ratios = [down(g, refreshed(RandomProjector(2), g, seed=i)[0], "right").square().sum() / g.square().sum() for i in range(600)]
    assert float(torch.stack(ratios).mean()) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("moments", ["keep", "rotate", "zero"])
def test_moments_at_a_renewal(moments):
    p = param("w", tensor(8, 6))
    t = in_subspace(SvdProjector(2, every=2, moments=moments), scale_by_adam(b1=0.9, b2=0.9))
    state = t.init(by_name([p]))
    for step in (1, 2):
        t.update({"w": tensor(8, 6, key=step)}, state, by_name([p]), Context(step, 1.0))
    old, inner = (
        state["/projector"]["w"]["basis"],
        {k: v.clone() for k, v in state["/inner"]["w"].items() if isinstance(v, torch.Tensor)},
    )
    g = tensor(8, 6, key=3)
    t.update({"w": g}, state, by_name([p]), Context(3, 1.0))
    new = state["/projector"]["w"]["basis"]
    assert not torch.allclose(old, new)
    mu = {"keep": inner["mu"], "rotate": inner["mu"] @ old @ new.T, "zero": torch.zeros_like(inner["mu"])}[moments]
    nu = torch.zeros_like(inner["nu"]) if moments == "zero" else inner["nu"]
    r = g @ new.T
    torch.testing.assert_close(state["/inner"]["w"]["mu"], 0.9 * mu + 0.1 * r)
    torch.testing.assert_close(state["/inner"]["w"]["nu"], 0.9 * nu + 0.1 * r**2)
    assert state["/inner"]["w"]["age"] == (1 if moments == "zero" else 3)


def test_refusals():
    with pytest.raises(OptionError, match="rank"):
        SvdProjector(0)
    with pytest.raises(OptionError, match="moments"):
        SvdProjector(2, moments="forget")
