"""Law 7: any two parts either train together or are refused with a reason; nothing else can happen."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.catalogue import MethodInfo
from rankwise.errors import RankwiseError
from tests.contract.cases import example, methods, with_rank
from tests.contract.test_laws import calibration, train
from tests.models import llama

FIELD = {"form": "form", "init": "init", "router": "router", "budget": "budget", "optimizer": "optimizer", "loss": "losses"}
KINDS = list(FIELD)
PAIRS = [(a, b) for x, y in itertools.combinations(KINDS, 2) for a in methods(x) for b in methods(y)]


def together(a: MethodInfo, b: MethodInfo) -> dict[str, Any]:
    """One recipe with both parts: each with the options of its own example, the first one's form."""
    first, second = example(a), example(b)
    recipe = {**second, **first}
    recipe[FIELD[b.kind]] = second[FIELD[b.kind]]
    ranks = [x["r"] for x in (first, second) if "r" in x]
    recipe.pop("r", None)
    rank = max(ranks, default=4) if "mos" not in (a.name, b.name) else 3
    if a.kind == "form":
        recipe["form"] = first["form"]
    return with_rank(recipe, rank)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_pair_trains_or_is_refused(kind: str) -> None:
    ran = refused = 0
    trouble: list[str] = []
    for a, b in PAIRS:
        if b.kind != kind:
            continue
        torch.manual_seed(0)
        model = llama()
        bits = {k: v.clone() for k, v in model.state_dict().items()}
        try:
            adapter = rw.attach(model, together(a, b), calibration=calibration())
            losses = train(model, adapter, steps=3, lr=max(getattr(m.cls, "example_lr", 1e-2) for m in (a, b)))
            ran += 1
            if not losses[-1] <= losses[0] + 1e-4:  # a start of small factors under plain SGD hardly moves in three steps
                trouble.append(f"{a.name} × {b.name}: loss {losses[0]:.4f} → {losses[-1]:.4f}")
            adapter.detach()
        except RankwiseError as error:
            refused += 1
            if len(str(error)) < 30 or not str(error).rstrip().endswith((".", "]", ")", "…")):
                trouble.append(f"{a.name} × {b.name}: refused without a sentence: {error}")
            if "rankwise" in model._modules:
                next(iter(rw.adapters(model).values())).detach()
        except Exception as error:  # any other error is the fault this law is about
            trouble.append(f"{a.name} × {b.name}: {type(error).__name__}: {str(error)[:120]}")
            continue
        if not all(torch.equal(v, bits[k]) for k, v in model.state_dict().items() if k in bits):
            trouble.append(f"{a.name} × {b.name}: the base did not come back")
    assert not trouble, "\n".join(trouble)
    assert ran, "nothing of this kind runs with anything"
