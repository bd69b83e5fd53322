"""Soups: greedy never below the best, learned uniform at the start, the gradient of a mixture, the laws with an evaluator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankwise import catalogue
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import OptionError
from rankwise.merge import merge_states
from rankwise.merge.judge.evaluator import Evaluator
from rankwise.merge.methods.soups import LearnedSoup, Mixture, uniform
from tests.merge.models import SITES, Net, copy_with, net_batch, net_value, value
from tests.models import batch_for, llama

SOUPS = [m.name for m in catalogue.methods("merge") if getattr(m.cls, "finds_weights", False)]


def judge(model: Any = None, **more: Any) -> Evaluator:
    net = llama() if model is None else model
    held = batch_for(net, seed=5)
    return Evaluator(net, lambda m: float(m(**held).loss), batches=[batch_for(net, seed=s) for s in (1, 2)], **more)


def dense(state: AdapterState, site: str = SITES[0]) -> torch.Tensor:
    return state.sites[site].dense().double()


def good_and_bad(evaluator: Evaluator) -> list[AdapterState]:
    """Two noisy steps down the selection loss's gradient, and two that go astray."""
    net = evaluator.model
    net.requires_grad_(True)
    net(**batch_for(net, seed=5)).loss.backward()
    found = []
    for seed, step in ((0, -6.0), (1, -6.0), (2, 6.0), (3, 0.0)):
        noise = value(seed, size=0.06)
        sites = {}
        for n, d in noise.sites.items():
            grad = net.get_submodule(n).weight.grad
            low = LowRank(step * torch.eye(grad.shape[1])[: grad.shape[1]], grad.clone())
            sites[n] = (d + low).to_lowrank(rank=6)[0]
        found.append(AdapterState(sites))
    net.zero_grad()
    return found


def test_the_catalogue_has_them_with_their_reference() -> None:
    assert SOUPS == ["greedy_soup", "learned_soup"]
    assert {catalogue.find("merge", n).reference for n in SOUPS} == {"217"}


@pytest.mark.parametrize("strict", [False, True])
def test_greedy_is_never_worse_than_the_best_and_follows_its_definition(strict: bool) -> None:
    evaluator = judge()
    states = good_and_bad(evaluator)
    singles = [copy_with(s)(**batch_for(evaluator.model, seed=5)).loss.item() for s in states]
    got = merge_states(states, None, "greedy_soup", strict=strict, evaluator=evaluator)
    assert evaluator.score(got) <= min(singles) + 1e-6
    order = sorted(range(4), key=singles.__getitem__)
    kept, best = order[:1], singles[order[0]]  # the definition, on models whose weights are written
    for t in order[1:]:
        members = [*kept, t]
        mean = copy_with(AdapterState({n: LowRank(torch.cat([states[u].sites[n].factors()[0] for u in members]),
                                                  torch.cat([states[u].sites[n].factors()[1] for u in members], 1), 1 / len(members)) for n in SITES}))  # fmt: skip
        loss = mean(**batch_for(evaluator.model, seed=5)).loss.item()
        if loss < best:
            kept, best = members, loss
    assert got.meta["weights"] == [1 / len(kept) if t in kept else 0.0 for t in range(4)]
    assert 1 < len(kept) < 4 and best < min(singles)  # the soup is a real one, and leaves some out
    assert evaluator.score(got) == pytest.approx(best, abs=1e-5)


def test_strict_is_the_released_rule() -> None:
    """Two values whose mean scores exactly as well as either: the paper's rule takes it, the released one does not."""
    evaluator = Evaluator(llama(), lambda m: 1.0)
    states = [value(0), value(1)]
    assert merge_states(states, None, "greedy_soup", evaluator=evaluator).meta["weights"] == [0.5, 0.5]
    assert sorted(merge_states(states, None, "greedy_soup", strict=True, evaluator=evaluator).meta["weights"]) == [0.0, 1.0]


def test_greedy_compares_with_the_soup_so_far() -> None:
    """One number, wanted at 1: 1.3 and 0.6 make 0.95; with 0.4 it would be 0.77, better than 1.3 alone but worse than 0.95."""

    def number(x: float) -> AdapterState:
        return AdapterState({"0": LowRank(torch.tensor([[1.0]]), torch.tensor([[x]]))})

    net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    zero = net[0].weight.detach().clone()
    evaluator = Evaluator(net, lambda m: abs((m(torch.ones(1, 1)) - zero).item() - 1))
    got = merge_states([number(0.4), number(1.3), number(0.6)], None, "greedy_soup", evaluator=evaluator)
    assert got.meta["weights"] == [0.0, 0.5, 0.5] and evaluator.evaluations == 5


def test_greedy_wants_the_highest_accuracy() -> None:
    norm = lambda m: float(m.get_submodule(SITES[0])(torch.eye(32)).norm())
    small, big = value(0, size=0.01), value(1, size=0.5)
    for higher, want in ((True, [0.0, 1.0]), (False, [1.0, 0.0])):
        got = merge_states(
            [small, big], None, "greedy_soup", strict=True, evaluator=Evaluator(llama(), norm, higher_is_better=higher)
        )
        assert got.meta["weights"] == want


def test_uniform_is_the_mean_in_any_order() -> None:
    a, b, c = value(0), value(1), value(2)
    assert torch.allclose(dense(uniform([a, b, c])), (dense(a) + dense(b) + dense(c)) / 3, atol=1e-6)
    assert torch.allclose(dense(uniform([c, a, b])), dense(uniform([a, b, c])), atol=1e-6)


@pytest.mark.parametrize("per", ["model", "site"])
def test_learned_is_uniform_at_the_start_and_lowers_its_loss(per: str) -> None:
    evaluator = judge()
    states = good_and_bad(evaluator)
    none = merge_states(states, None, "learned_soup", per=per, epochs=0, evaluator=evaluator)
    assert torch.allclose(dense(none), dense(uniform(states)), atol=1e-7)
    evaluator.batches = [batch_for(evaluator.model, seed=5)]
    rule = LearnedSoup(per=per, epochs=15)  # type: ignore[arg-type]
    found = rule.learn(states, evaluator)
    assert found.losses[0] == pytest.approx(evaluator.score(uniform(states)), abs=1e-5)
    assert found.losses[-1] < found.losses[0] - 0.01 and found.beta != 1.0
    got = merge_states(states, None, rule, evaluator=evaluator)
    assert evaluator.score(got) < evaluator.score(uniform(states))
    weights = torch.tensor([got.meta["weights"][n] for n in SITES] if per == "site" else [got.meta["weights"]])
    assert torch.allclose(weights.sum(-1), torch.ones(len(weights))) and weights.mean(0)[0] > weights.mean(0)[2]
    assert (weights.std(0, correction=0).max() > 1e-3) == (per == "site")
    assert "rankwise" not in evaluator.model._modules


def test_one_step_is_adamw_on_the_raw_weights() -> None:
    """lr 0.05, the first step of AdamW moves each raw number by lr against its gradient's sign; β stays where told."""
    evaluator = judge()
    evaluator.batches = evaluator.batches[:1]
    states = [value(0), value(1), value(2)]
    raw = torch.ones(3, requires_grad=True)
    (g,) = torch.autograd.grad(evaluator.loss(Mixture(states).at(raw.softmax(-1)), evaluator.batches[0]), raw)
    found = LearnedSoup(epochs=1, temperature=False).learn(states, evaluator)
    assert torch.allclose(found.weights.float(), (1 - 0.05 * g.sign()).softmax(-1), atol=1e-5) and found.beta == 1.0  # type: ignore[union-attr]


def test_the_gradient_of_a_weight_is_the_inner_product_with_its_source() -> None:
    """∂loss/∂α_t = ⟨∇_θ loss, ΔW_t⟩ = a central difference, in fp64, through the fused path."""
    states, alpha = [net_value(s) for s in range(3)], torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    net, mixture = Net().double(), Mixture(states)
    batch = {"x": net_batch()["x"].double(), "labels": net_batch()["labels"]}
    (got,) = torch.autograd.grad(Evaluator(net).loss(mixture.at(alpha), batch), alpha)

    def written(a: torch.Tensor) -> Any:
        made = Net().double()
        with torch.no_grad():
            for n, d in mixture.at(a).sites.items():
                made.get_submodule(n).weight.add_(d.dense())
        return made

    full = written(alpha.detach())
    full(**batch).loss.backward()
    for t, s in enumerate(states):
        step = 1e-5 * torch.eye(3, dtype=torch.float64)[t]
        difference = sum(c * written(alpha.detach() + c * step)(**batch).loss.item() for c in (1, -1)) / 2e-5
        assert float(got[t]) == pytest.approx(difference, rel=1e-5)
        inner = sum((full.get_submodule(n).weight.grad * d.dense().double()).sum() for n, d in s.sites.items())
        assert float(got[t]) == pytest.approx(float(inner), rel=1e-6) and abs(float(inner)) > 1e-3


def test_a_linear_models_soup_is_the_ensemble() -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = torch.nn.Linear(8, 10, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    x, seen = torch.randn(5, 8), []
    states = [AdapterState({"head": LowRank(torch.randn(2, 8), torch.randn(10, 2))}) for _ in range(3)]
    evaluator = Evaluator(Head(), lambda m: seen.append(m(x)) or 0.0)  # type: ignore[func-returns-value]
    for s in [*states, uniform(states)]:
        evaluator.score(s)
    assert torch.allclose(seen[3], torch.stack(seen[:3]).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", SOUPS)
def test_the_laws_that_hold_with_an_evaluator(name: str) -> None:
    evaluator = judge()
    a, b = value(0), value(1)
    merge = lambda *states: merge_states(states, None, name, evaluator=evaluator)
    assert torch.allclose(dense(merge(a)), dense(a), atol=1e-6)  # one source
    assert torch.allclose(dense(merge(a, a)), dense(a), atol=1e-6)  # twins
    one, two = merge(a, b), merge(b, a)
    assert torch.allclose(dense(one), dense(two), atol=1e-5)  # order
    G = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    turned = AdapterState({n: LowRank(G @ d.A, d.B @ torch.linalg.inv(G), d.scale) for n, d in a.sites.items()})
    assert torch.allclose(dense(merge(turned, b)), dense(one), atol=1e-4)  # gauge
    low = merge(a.to(torch.bfloat16), b.to(torch.bfloat16))
    assert torch.equal(dense(low), dense(merge(*(s.to(torch.bfloat16).to(torch.float32) for s in (a, b)))))  # widened once
    assert max(one.meta["errors"].values()) < 1e-6  # it is the sum it says
    part = AdapterState({n: d for n, d in b.sites.items() if n != SITES[0]})
    zero = AdapterState({**b.sites, SITES[0]: LowRank(torch.zeros(2, 32), torch.zeros(32, 2))})
    assert torch.allclose(dense(merge(a, part)), dense(merge(a, zero)), atol=1e-5)  # missing sites are zero


def test_weights_by_site_reach_their_sites() -> None:
    evaluator = judge()
    rule = LearnedSoup(per="site")
    chosen = {n: torch.tensor([i / 10, 1 - i / 10]) for i, n in enumerate(SITES)}
    object.__setattr__(rule, "weigh", lambda sources, evaluator: chosen)
    a, b = value(0), value(1)
    got = merge_states([a, b], None, rule, evaluator=evaluator)
    for i, n in enumerate(SITES):
        assert torch.allclose(dense(got, n), i / 10 * dense(a, n) + (1 - i / 10) * dense(b, n), atol=1e-6)
    assert got.meta["weights"][SITES[1]] == pytest.approx([0.1, 0.9])


def test_wrong_input_is_told() -> None:
    a = value(0)
    for name in SOUPS:
        with pytest.raises(OptionError, match="needs a score or gradients"):
            merge_states([a, a], None, name)
        with pytest.raises(OptionError, match="finds its weights itself"):
            merge_states([a, a], [0.5, 0.5], name, evaluator=judge())
    with pytest.raises(OptionError, match="asks no evaluator"):
        merge_states([a, a], None, "ties", evaluator=judge())
    with pytest.raises(OptionError, match="batches"):
        merge_states([a, a], None, "learned_soup", evaluator=Evaluator(llama()))
    with pytest.raises(OptionError, match="per as one of"):
        merge_states([a, a], None, "learned_soup", evaluator=judge(), per="layer")
    with pytest.raises(OptionError, match="lr > 0"):
        merge_states([a, a], None, "learned_soup", evaluator=judge(), lr=0.0)
