"""Every method named here is in ``rankwise methods`` under its reference number, with a page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rankwise.catalogue import make, methods
from rankwise.errors import OptionError
from tests.cli.tools import call

#: (kind, name) → its reference number; None where it has none of its own
NAMED: dict[tuple[str, str], str | None] = {
    ("merge", "linear"): None, ("merge", "cat"): None, ("merge", "svd"): None, ("merge", "average"): None,
    ("merge", "task_arithmetic"): None, ("merge", "ties"): None, ("merge", "dare_linear"): None, ("merge", "dare_ties"): None,
    ("merge", "della"): None, ("merge", "della_linear"): None, ("merge", "breadcrumbs"): None, ("merge", "breadcrumbs_ties"): None,
    ("merge", "magnitude_prune"): None, ("merge", "sce"): None, ("merge", "slerp"): None, ("merge", "nuslerp"): None,
    ("merge", "multislerp"): None, ("merge", "karcher"): None, ("merge", "model_stock"): None, ("merge", "nearswap"): None,
    ("merge", "knots"): None, ("merge", "lego"): "003", ("merge", "uniform_soup"): "217", ("merge", "greedy_soup"): "217",
    ("merge", "learned_soup"): "217", ("merge", "interpolation"): "014", ("merge", "robust_interpolation"): "212",
    ("merge", "quality_diversity"): "182", ("loss", "cfg_distillation"): "182", ("merge", "sparse_sum"): "177",
    ("budget", "lt_sft"): "177", ("merge", "robust_signature"): "209", ("logits", "dynamic"): "195", ("logits", "static"): None,
    ("codec", "compeft"): "192", ("codec", "ternary"): "192", ("codec", "intk"): None, ("codec", "delta"): None,
}  # fmt: skip


@pytest.fixture(scope="module")
def listed() -> dict[tuple[str, str], Any]:
    from rankwise import catalogue

    return {(m.kind, m.name): m for m in catalogue.methods()}


def test_all_are_listed_with_their_number(capsys: Any) -> None:
    code, text, _ = call(capsys, "methods", "--json")
    assert code == 0
    found = {(m["kind"], m["name"]): m["reference"] for m in json.loads(text)}
    assert {k: found.get(k, "missing") for k in NAMED} == NAMED


@pytest.mark.parametrize("kind, name", NAMED)
def test_each_has_a_page(capsys: Any, kind: str, name: str) -> None:
    code, text, _ = call(capsys, "methods", name)
    assert code == 0 and f"{name} · {kind}" in text
    reference = NAMED[kind, name]
    assert reference is None or f"reference {reference}" in " ".join(text.split())


def test_no_merge_is_forgotten_here(listed: dict[tuple[str, str], Any]) -> None:
    assert {k for k in listed if k[0] in ("merge", "logits")} == {k for k in NAMED if k[0] in ("merge", "logits")}


def test_each_page_says_where_it_comes_from(listed: dict[tuple[str, str], Any]) -> None:
    silent = [
        k
        for k in NAMED
        if k[0] in ("merge", "logits")
        and not any(w in listed[k].doc for w in ("Source", "source", "mergekit", "published", "arXiv"))
    ]
    assert not silent, silent


def test_every_option_refuses_what_is_of_another_sort() -> None:
    """What ``--set`` may bring: a word, a number that is none, a list; and a number that is not finite."""
    for kind in ("merge", "logits"):
        for info in methods(kind):
            made = make(kind, info.name, **{o: v for o, v in info.options.items() if v is not None and o != "stragglers"})
            assert isinstance(made, info.cls)
            for option in set(info.options) - {"stragglers"}:
                for wrong in ("abc", float("nan"), [1], {}):
                    with pytest.raises(OptionError, match=option):
                        make(kind, info.name, **{option: wrong})
    with pytest.raises(OptionError, match="takes rank as a whole number or nothing; it got 2.5"):
        make("merge", "svd", rank=2.5)
    for name in ("svd", "ties", "task_arithmetic", "knots", "robust_interpolation"):
        with pytest.raises(OptionError, match="rank of at least 1; it got rank = 0"):
            make("merge", name, rank=0)
    with pytest.raises(OptionError, match="alpha as a share"):
        make("merge", "robust_interpolation", alpha=7.0)
