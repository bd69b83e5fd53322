"""Sampling: each request by its own generator, the distribution as documented, log-probabilities of the model's own."""

from __future__ import annotations

import math

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.serve.engine.sampler import SamplerState, distribution, sample
from rankwise.serve.types import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 1.9])


def state(**fields: object) -> SamplerState:
    return SamplerState.of(Sampling(**fields), 0, "r")  # type: ignore[arg-type]


def test_greedy_takes_the_largest() -> None:
    assert [d.id for d in sample(torch.stack([LOGITS, -LOGITS]), [state(), state()])] == [0, 3]


def test_a_seed_draws_the_same_alone_and_beside_others() -> None:
    alone, beside = state(temperature=1.0, seed=7), state(temperature=1.0, seed=7)
    want = [sample(LOGITS[None], [alone])[0].id for _ in range(20)]
    other = state(temperature=2.0, seed=3)
    got = [sample(torch.stack([-LOGITS, LOGITS]), [other, beside])[1].id for _ in range(20)]
    assert got == want
    assert len(set(want)) > 1


def test_without_a_seed_two_requests_draw_differently_and_each_again_the_same() -> None:
    def draws(name: str) -> list[int]:
        s = SamplerState.of(Sampling(temperature=1.0), 0, name)
        return [sample(LOGITS[None], [s])[0].id for _ in range(30)]

    assert draws("a") == draws("a") != draws("b")


def test_temperature_top_k_and_top_p_cut_as_documented() -> None:
    p = LOGITS.softmax(0)
    torch.testing.assert_close(distribution(LOGITS, state(temperature=1.0)), p)
    torch.testing.assert_close(distribution(LOGITS, state(temperature=0.5)), (2 * LOGITS).softmax(0))
    two = distribution(LOGITS, state(temperature=1.0, top_k=2))
    torch.testing.assert_close(two, torch.tensor([p[0], 0, 0, 0, p[4]]) / (p[0] + p[4]))
    nucleus = distribution(LOGITS, state(temperature=1.0, top_p=float(p[0]) + 1e-3))
    torch.testing.assert_close(nucleus, torch.tensor([p[0], 0, 0, 0, p[4]]) / (p[0] + p[4]))
    assert distribution(LOGITS, state(temperature=1.0, top_p=1e-320)).tolist() == [1, 0, 0, 0, 0]
    assert torch.isfinite(distribution(LOGITS, state(temperature=1e-5))).all()
    assert distribution(LOGITS, state(temperature=1.0, top_p=1e-6)).tolist() == [1, 0, 0, 0, 0]


def test_draws_follow_the_distribution() -> None:
    s, n = state(temperature=1.0, seed=1), 4000
    counts = torch.bincount(torch.tensor([sample(LOGITS[None], [s])[0].id for _ in range(n)]), minlength=5) / n
    assert (counts - LOGITS.softmax(0)).abs().max() < 4 * math.sqrt(0.25 / n)


def test_bias_and_penalties_change_the_choice_but_not_the_reported_log_probability() -> None:
    s = state(logit_bias={3: 100.0}, logprobs=2)
    drawn = sample(LOGITS[None], [s])[0]
    assert drawn.id == 3
    assert drawn.logprob == pytest.approx(float(LOGITS.log_softmax(0)[3]))
    assert [i for i, _ in drawn.top] == [0, 4]
    s = state(frequency_penalty=0.2)
    assert [sample(LOGITS[None], [s])[0].id for _ in range(4)] == [0, 4, 0, 4]  # 2.0, 1.9, 1.8, 1.7 …
    s = state(presence_penalty=0.2)
    assert [sample(LOGITS[None], [s])[0].id for _ in range(4)] == [0, 4, 0, 0]  # once only


@pytest.mark.parametrize(
    "field",
    [
        {"seed": 1 << 80},
        {"temperature": -1},
        {"temperature": 1e-300},
        {"top_p": 0},
        {"top_k": -1},
        {"max_tokens": 0},
        {"logprobs": 21},
        {"logit_bias": {1: math.inf}},
    ],
)
def test_what_is_out_of_range_is_refused(field: dict) -> None:
    with pytest.raises(OptionError):
        Sampling(**field)
