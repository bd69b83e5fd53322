"""mergekit's YAML: each method against formulas written anew, and against mergekit itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from rankwise.errors import MergeError, OptionError
from rankwise.merge.mergekit import merge_yaml
from rankwise.merge.mergekit_methods import METHODS, resolve
from tests.merge.test_checkpoints import whole
from tests.models import llama

W = (0.7, 0.4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """base, a and b: three Llamas of three layers, a and b near the base."""
    root = tmp_path_factory.mktemp("models")
    base = llama(layers=3, hidden=16)
    base.save_pretrained(root / "base")
    for i, n in enumerate(("a", "b", "c")):
        near = llama(layers=3, hidden=16)
        g = torch.Generator().manual_seed(i + 1)
        with torch.no_grad():
            for p in near.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=g))
        near.save_pretrained(root / n)
    return {n: str(root / n) for n in ("base", "a", "b", "c")}


def top(v: Tensor, n: int, skip: int = 0) -> Tensor:
    keep = torch.zeros(v.numel(), dtype=torch.bool)
    keep[v.abs().flatten().argsort(descending=True)[skip : skip + n]] = True
    return v * keep.view(v.shape)


def vote(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w·v and Σ w over those whose w·v has the sign of Σ w·v."""
    x = w * v
    same = x.sign() == torch.where(x.sum(0) >= 0, 1.0, -1.0)
    size = (w * same).sum(0)
    return (x * same).sum(0), torch.where(size == 0, 1.0, size)


def angle(x: Tensor, y: Tensor) -> Tensor:
    return torch.arccos((x * y).sum() / x.norm() / y.norm())


def along(x: Tensor, y: Tensor, t: float) -> Tensor:
    o = angle(x, y)
    return (torch.sin((1 - t) * o) * x + torch.sin(t * o) * y) / torch.sin(o)


def ties(o: Tensor, x: Tensor, w: Tensor) -> Tensor:
    s, n = vote(torch.stack([top(v, int(d * v.numel())) for v, d in zip(x, (0.5, 0.3), strict=True)]), w)
    return o + 0.9 * s / n


def crumbs(o: Tensor, x: Tensor, w: Tensor, elect: bool = False) -> Tensor:
    v = torch.stack([top(v, int(0.6 * v.numel()), int(0.1 * v.numel())) for v in x])
    return o + (vote(v, w)[0] if elect else (w * v).sum(0))


def sce(o: Tensor, x: Tensor, w: Tensor) -> Tensor:
    v = x * (top(x.var(0, unbiased=False), int(0.5 * o.numel())) != 0)
    energy = v.square().flatten(1).mean(1)
    e = (energy / energy.sum()).view(w.shape)
    same = v.sign() == torch.where(v.sum(0) >= 0, 1.0, -1.0)
    return o + (v * e * same).sum(0) / (e * same).sum(0).clamp_min(1e-6)


def stock(o: Tensor, x: Tensor, w: Tensor) -> Tensor:
    c = torch.cos(angle(x[0], x[1]))
    t = 2 * c / (1 + c)
    return t * (o + x.mean(0)) + (1 - t) * o


def tangent(o: Tensor, x: Tensor, w: Tensor) -> Tensor:
    p = w / w.sum()
    size = x.flatten(1).norm(dim=1).view(w.shape)
    u = x / size
    m = (p * u).sum(0)
    m = m / m.norm()
    step = (p * (u - torch.stack([(v * m).sum() for v in u]).view(w.shape) * m)).sum(0)
    return o + (m * torch.cos(step.norm()) + step / step.norm() * torch.sin(step.norm())) * (p * size).sum()


def near(o: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return o + x[0].clamp(-0.05, 0.05)


#: method → (its models, parameters, the formula of (base, changes (2, …), weights (2, 1…)))
CASES: dict[str, tuple[Any, dict[str, Any], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "linear": (None, {}, lambda o, x, w: (w * (o + x)).sum(0) / w.sum()),
    "linear, not normalised": (None, {"normalize": False}, lambda o, x, w: (w * (o + x)).sum(0)),
    "task_arithmetic": ("base", {"lambda": 0.9}, lambda o, x, w: o + 0.9 * (w * x).sum(0)),
    "task_arithmetic, normalised": ("base", {"normalize": True}, lambda o, x, w: o + (w * x).sum(0) / w.sum()),
    "ties": ("base", {"lambda": 0.9}, ties),
    "dare_linear": ("base", {}, lambda o, x, w: o + (w * x).sum(0)),
    "dare_ties": ("base", {}, lambda o, x, w: o + vote(x, w)[0]),
    "della": ("base", {}, lambda o, x, w: o + vote(x, w)[0] / vote(x, w)[1]),
    "della_linear": ("base", {"normalize": True}, lambda o, x, w: o + (w * x).sum(0) / w.sum()),
    "breadcrumbs": ("base", {}, crumbs),
    "breadcrumbs_ties": ("base", {}, lambda o, x, w: crumbs(o, x, w, True)),
    "sce": ("base", {"select_topk": 0.5}, sce),
    "slerp": ("base", {"t": 0.3}, lambda o, x, w: along(o, o + x[0], 0.3)),
    "nearswap": ("base", {"t": 0.05}, near),
    "nuslerp": (None, {}, lambda o, x, w: along(o + x[0], o + x[1], float(w[1] / w.sum()))),
    "nuslerp of changes": ("base", {}, lambda o, x, w: o + along(x[0], x[1], float(w[1] / w.sum()))),
    "multislerp": (None, {}, lambda o, x, w: tangent(torch.zeros_like(o), o + x, w)),
    "multislerp of changes": ("base", {}, tangent),
    "karcher": (None, {}, lambda o, x, w: along((o + x[0]) / (o + x[0]).norm(), (o + x[1]) / (o + x[1]).norm(), 0.5) * ((o + x[0]).norm() + (o + x[1]).norm()) / 2),
    "model_stock": ("base", {}, stock),
    "passthrough": (None, {"scale": 0.5}, lambda o, x, w: 0.5 * (o + x[0])),
}  # fmt: skip
OWN = {"ties": [{"density": 0.5}, {"density": 0.3}], "breadcrumbs": [{"density": 0.6, "gamma": 0.1}] * 2}
OWN["breadcrumbs_ties"] = OWN["breadcrumbs"]


def config(case: str, models: dict[str, str]) -> dict[str, Any]:
    name = case.split(",")[0].split(" of ")[0]
    base, parameters, _ = CASES[case]
    sources = ["a"] if name in ("slerp", "nearswap", "passthrough") else ["a", "b"]
    entries = []
    for i, s in enumerate(sources):
        own = dict((OWN.get(name) or [{}, {}])[i])
        if "weight" in METHODS[name].own:
            own["weight"] = W[i]
        entries.append({"model": models[s]} | ({"parameters": own} if own else {}))
    more = {"base_model": models["base"]} if base else {}
    return {"merge_method": name, "models": entries, "parameters": parameters, "dtype": "float32", **more}


@pytest.mark.parametrize("case", CASES)
def test_each_method_is_its_formula(models: dict[str, str], tmp_path: Path, case: str) -> None:
    merge_yaml(config(case, models), tmp_path / "out")
    o, a, b = (whole(Path(models[n])) for n in ("base", "a", "b"))
    got = whole(tmp_path / "out")
    assert set(got) == set(o)
    for n, t in got.items():
        x = torch.stack([a[n] - o[n], b[n] - o[n]]).double()
        wanted = CASES[case][2](o[n].double(), x, torch.tensor(W).double().view(2, *[1] * o[n].dim()))
        assert torch.allclose(t.double(), wanted, atol=2e-6), n


def theirs(data: dict[str, Any], out: Path) -> dict[str, Tensor]:
    if importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(
        MergeConfiguration.model_validate(data), str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    )
    return whole(out)


def compare(data: dict[str, Any], tmp_path: Path) -> None:
    """Equal to 1e-6 absolute, and as good as equal relatively (fp32)."""
    wanted = theirs(data, tmp_path / "theirs")
    merge_yaml(data, tmp_path / "ours")
    got = whole(tmp_path / "ours")
    assert set(got) == set(wanted)
    for n, t in wanted.items():
        assert torch.allclose(got[n], t, atol=1e-6, rtol=1e-6), (n, float((got[n] - t).abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_each_method_is_mergekits(models: dict[str, str], tmp_path: Path, case: str) -> None:
    compare(config(case, models), tmp_path)


GRADIENT = {"weight": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"filter": "norm", "value": 0.25}, {"value": [1, "1e-1"]}]}


def graded(models: dict[str, str]) -> dict[str, Any]:
    entries = [{"model": models["a"], "parameters": GRADIENT}, {"model": models["b"], "parameters": {"weight": 0.5}}]
    return {"merge_method": "task_arithmetic", "base_model": models["base"], "models": entries, "dtype": "float32"}


def test_gradients_and_filters(models: dict[str, str], tmp_path: Path) -> None:
    merge_yaml(graded(models), tmp_path / "out")
    o, a, b, got = (whole(Path(p)) for p in (models["base"], models["a"], models["b"], tmp_path / "out"))
    for n, t in got.items():
        at = float(n.split(".")[2]) / 2 if ".layers." in n else 0.0
        w = at if "mlp" in n else 0.25 if "norm" in n else 1 + at * (0.1 - 1)
        assert torch.allclose(t, o[n] + w * (a[n] - o[n]) + 0.5 * (b[n] - o[n]), atol=1e-6), n


def test_gradients_and_filters_are_mergekits(models: dict[str, str], tmp_path: Path) -> None:
    compare(graded(models), tmp_path)


def stacked(models: dict[str, str]) -> dict[str, Any]:
    parts = [
        {"sources": [{"model": models["a"], "layer_range": [0, 2]}]},
        {"sources": [{"model": models["b"], "layer_range": [1, 3]}]},
    ]
    return {"merge_method": "passthrough", "slices": parts, "dtype": "float32"}


def test_layers_are_stacked_and_the_result_loads(models: dict[str, str], tmp_path: Path) -> None:
    import transformers

    merge_yaml(stacked(models), tmp_path / "out")
    a, b, got = (whole(Path(p)) for p in (models["a"], models["b"], tmp_path / "out"))
    for n, t in got.items():
        if ".layers." in n:
            i = int(n.split(".")[2])
            from_, j = (a, i) if i < 2 else (b, i - 1)
            assert torch.equal(t, from_[n.replace(f".{i}.", f".{j}.", 1)])
        else:
            assert torch.equal(t, (a if "embed" in n else b)[n])
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.config.num_hidden_layers == 4 and torch.isfinite(made(torch.tensor([[1, 2, 3]])).logits).all()


def test_layers_are_stacked_as_mergekit_does(models: dict[str, str], tmp_path: Path) -> None:
    compare(stacked(models), tmp_path)


def test_slices_with_a_base(models: dict[str, str], tmp_path: Path) -> None:
    parts = [{"sources": [{"model": models["base"], "layer_range": [0, 3]}, {"model": models["a"], "layer_range": [0, 3]}],
              "parameters": {"t": [0, 1]}}]  # fmt: skip
    merge_yaml({"merge_method": "slerp", "base_model": models["base"], "slices": parts}, tmp_path / "out")
    o, a, got = (whole(Path(p)) for p in (models["base"], models["a"], tmp_path / "out"))
    for n, t in got.items():
        if ".0." in n or ".layers." not in n:
            assert torch.equal(t, o[n])
        elif ".2." in n:
            assert torch.allclose(t, a[n], atol=1e-6)


def test_a_file_is_read_and_written_in_its_dtype(models: dict[str, str], tmp_path: Path) -> None:
    data = config("linear", models) | {"dtype": "float32", "out_dtype": "bfloat16"}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(data))
    merge_yaml(tmp_path / "m.yaml", tmp_path / "out")
    assert all(t.dtype == torch.bfloat16 for t in whole(tmp_path / "out").values())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_random_drops_follow_the_seed_and_keep_the_l1_norm(models: dict[str, str], tmp_path: Path) -> None:
    data = config("dare_linear", models)
    data["models"] = [{"model": models["a"], "parameters": {"weight": 1.0, "density": 0.5}}]
    for name, seed in (("0", 0), ("again", 0), ("1", 1)):
        merge_yaml(data, tmp_path / name, seed=seed)
    o, a = whole(Path(models["base"])), whole(Path(models["a"]))
    one, two, other = (whole(tmp_path / n) for n in ("0", "again", "1"))
    n = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[n], two[n]) and not torch.equal(one[n], other[n])
    kept = one[n] - o[n]
    assert (
        float(kept.abs().sum()) == pytest.approx(float((a[n] - o[n]).abs().sum()), rel=1e-4)
        and 0.4 < (kept != 0).float().mean() < 0.6
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"merge_method": "tiez"}, "did you mean 'ties'"),
        ({"merge_method": "arcee_fusion"}, "'arcee_fusion' is not known here"),
        ({"parameters": {"int8_mask": True}}, "int8_mask: True is not supported"),
        ({"parameters": {"lamda": 1.0}}, "no parameter 'lamda'; did you mean 'lambda'"),
        ({"parameters": {"normalize": 0.5}}, r"ties\.normalize takes true or false"),
        ({"tokenizer_source": "union"}, "tokenizer_source 'union'"),
        ({"tokenizer": {}}, "key 'tokenizer'"),
        ({"chat_template": "auto"}, "key 'chat_template'"),
        ({"dtype": "int8"}, "dtype is one of"),
        ({"base_model": None}, "needs base_model"),
        ({"models": None}, "either 'models' or 'slices'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    models: dict[str, str], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(OptionError, match=says):
        merge_yaml(config("ties", models) | change, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_models_that_cannot_be_used(models: dict[str, str], tmp_path: Path) -> None:
    data = config("ties", models)
    for model, says in ((models["a"] + "+lora", "adapter on it"), ("no/such", "There is no folder")):
        data["models"][0] = {"model": model, "parameters": {"weight": 1.0}}
        with pytest.raises(OptionError, match=says):
            merge_yaml(data, tmp_path / "no")
    data["models"][0] = {"model": models["a"]}
    with pytest.raises(OptionError, match="needs the parameter 'weight' for 'model.embed_tokens.weight'"):
        merge_yaml(data, tmp_path / "no")
    with pytest.raises(OptionError, match="between 2 models; it got 3"):
        merge_yaml(
            {**config("nuslerp", models), "models": [{"model": models[n], "parameters": {"weight": 1}} for n in "abc"]},
            tmp_path / "no",
        )
    llama(layers=2, hidden=16).save_pretrained(tmp_path / "short")
    with pytest.raises(OptionError, match="must be as many"):
        merge_yaml(
            {
                **config("linear", models),
                "models": [{"model": m, "parameters": {"weight": 1}} for m in (models["a"], str(tmp_path / "short"))],
            },
            tmp_path / "no",
        )
    llama(layers=3, hidden=16, tie=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(MergeError, match="tie their output"):
        merge_yaml(
            {
                **config("linear", models),
                "models": [{"model": m, "parameters": {"weight": 1}} for m in (models["a"], str(tmp_path / "tied"))],
            },
            tmp_path / "no",
        )


def test_settings_are_resolved_at_a_tensor() -> None:
    assert resolve([0, 0.5, 1], "x", 0.25, False, "p") == 0.25 and resolve([2, 4], "x", 1.0, False, "p") == 4
    assert (
        resolve([True, False], "x", 0.9, True, "p") is True
        and resolve({"filter": "mlp", "value": 1}, "attn", 0, False, "p") is None
    )
    with pytest.raises(OptionError, match="'filter' and 'value'"):
        resolve([{"filtre": "x", "value": 1}], "x", 0, False, "p")


@pytest.mark.parametrize(
    "wrong",
    [
        {"models": [{"parameters": {"weight": 1}}]}, {"models": "a"}, {"models": [3]}, {"models": [{"model": 3}]}, {"base_model": 7},
        {"models": None, "slices": [{"parameters": {}}]}, {"models": None, "slices": {"sources": 1}}, {"merge_method": ["linear"]},
        {"models": [{"model": "A", "parameters": [1]}]}, {"dtype": ["float16"]},
        {"models": None, "slices": [{"sources": [{"model": "A", "layer_range": 5}]}]},
        {"models": None, "slices": [{"sources": [{"model": "A", "layer_range": [0, "x"]}]}]},
    ],
)  # fmt: skip
def test_a_file_of_another_shape_is_told(models: dict[str, str], tmp_path: Path, wrong: dict[str, Any]) -> None:
    text = json.dumps({"merge_method": "linear", "models": [{"model": "A", "parameters": {"weight": 1}}], **wrong})
    with pytest.raises(OptionError):
        merge_yaml(json.loads(text.replace('"A"', json.dumps(models["a"]))), tmp_path / "out")
    assert not (tmp_path / "out").exists()
