"""``rankwise merge``: adapters with and without their model, whole models, mergekit files, quantised bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rankwise as rw
from rankwise.cli import merge as _verb  # noqa: F401 - so that its consoles are replaced
from rankwise.codecs import keep_stored
from rankwise.merge import read_state
from rankwise.merge.engine.folders import open_folder
from tests.cli.tools import call
from tests.merge.test_checkpoints import trio, whole
from tests.models import llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, two LoRA adapters of it (PEFT and native) and a DoRA."""
    root = tmp_path_factory.mktemp("made")
    model = llama(hidden=64)
    model.save_pretrained(root / "base")
    for i, (name, format, form) in enumerate((("a", "peft", "lora"), ("b", "native", "lora"), ("dora", "native", "dora"))):
        adapter = rw.attach(model, {"form": form, "r": 2, "targets": ["q_proj", "up_proj"]})
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in adapter.trainable_parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g))
        adapter.export(root / name, format)
        adapter.detach()
    return {n: str(root / n) for n in ("base", "a", "b", "dora")}


def test_adapters_without_their_model(capsys: Any, made: dict[str, str], tmp_path: Path) -> None:
    to = str(tmp_path / "both")
    code, text, err = call(
        capsys, "merge", made["a"], made["b"], "--method", "svd", "--set", "rank=1", "--weights", "0.6,0.4", "--out", to
    )
    assert code == 0, err
    assert "wrote" in text and "rank 1" in text and "lost by cutting to a rank at most (model.layers." in text
    got, a, b = (open_folder(p) for p in (to, made["a"], made["b"]))
    assert set(got.sites) == set(a.sites) == set(b.sites)
    for n in got.sites:
        total = 0.6 * a.sites[n].dense().double() + 0.4 * b.sites[n].dense().double()
        U, S, Vh = torch.linalg.svd(total)
        assert torch.allclose(got.sites[n].dense().double(), S[0] * U[:, :1] @ Vh[:1], atol=1e-5)
    model = llama(hidden=64)
    read_state(model, to)  # and it is an adapter of that model
    code, text, _ = call(capsys, "merge", made["a"], made["b"], "--out", str(tmp_path / "cat"), "--json")
    sites = json.loads(text)["sites"]
    assert code == 0 and {s["rank"] for s in sites} == {4} and max(s["error"] for s in sites) < 1e-6
    assert len({s["site"] for s in sites}) == len(sites) and text.count(sites[0]["site"]) == 1, "every place once"


def test_forms_that_need_their_model(capsys: Any, made: dict[str, str], tmp_path: Path) -> None:
    args = ["merge", made["a"], made["dora"], "--out", str(tmp_path / "m")]
    code, _, err = call(capsys, *args)
    assert code == 2 and "of the form 'dora'" in err and "give the model" in err
    code, text, err = call(capsys, *args, "--model", made["base"], "--source-rank", "4", "--method", "ties", "--set", "density=0.5")
    assert code == 0 and "ties: " in text and "from the weighted sum" in text, err
    code, text, err = call(
        capsys, "merge", made["a"], made["b"], "--model", made["base"], "--into-base", "--out", str(tmp_path / "w"), "--json"
    )
    assert code == 0, err
    report = json.loads(text)
    W, now = whole(Path(made["base"])), whole(tmp_path / "w")
    n = "model.layers.0.self_attn.q_proj"
    change = 0.5 * open_folder(made["a"]).sites[n].dense() + 0.5 * open_folder(made["b"]).sites[n].dense()
    assert torch.allclose(now[f"{n}.weight"], W[f"{n}.weight"] + change, atol=1e-6) and report["logit_gap"] < 1e-3
    assert max(s["rounded_away"] for s in report["sites"]) < 1e-4 and len(report["sites"]) == 4


@pytest.mark.parametrize("verb_seed", [0, 1])
def test_whole_models(capsys: Any, tmp_path: Path, verb_seed: int) -> None:
    base, a, b = (str(p) for p in trio(tmp_path))
    code, text, err = call(capsys, "merge", a, b, "--base", base, "--method", "dare_linear", "--set", "density=0.5", "--seed", str(verb_seed),
                           "--dtype", "bfloat16", "--out", str(tmp_path / "m"))  # fmt: skip
    assert code == 0 and "3 tensors merged" in text and "from the base at most" in text, err
    assert all(t.dtype == torch.bfloat16 for t in whole(tmp_path / "m").values())
    code, text, _ = call(capsys, "merge", a, b, "--weights", "3,1", "--out", str(tmp_path / "mean"), "--json")
    n = "model.norm.weight"
    assert code == 0 and json.loads(text)["method"] == "average"
    assert torch.allclose(whole(tmp_path / "mean")[n], 0.75 * whole(Path(a))[n] + 0.25 * whole(Path(b))[n])


def test_a_mergekit_file(capsys: Any, tmp_path: Path) -> None:
    base, a, b = (str(p) for p in trio(tmp_path))
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump({
        "merge_method": "task_arithmetic", "base_model": base,
        "models": [{"model": a, "parameters": {"weight": 0.5}}, {"model": b, "parameters": {"weight": 0.25}}],
    }))  # fmt: skip
    code, text, err = call(capsys, "merge", str(file), "--out", str(tmp_path / "m"))
    assert code == 0 and "task_arithmetic: " in text, err
    W, A, B = whole(Path(base)), whole(Path(a)), whole(Path(b))
    for n, t in whole(tmp_path / "m").items():
        assert torch.allclose(t, W[n] + 0.5 * (A[n] - W[n]) + 0.25 * (B[n] - W[n]), atol=1e-6)


def test_a_quantised_base_tells_what_it_rounds_away(capsys: Any, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    import transformers as T

    assert bnb
    base = str(tmp_path / "base")
    llama(hidden=128).save_pretrained(
        base
    )  # every width a multiple of 64: bitsandbytes' packed product on some processors needs it
    config = T.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    T.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32).save_pretrained(tmp_path / "nf4")
    strong = _adapter(base, tmp_path / "strong", 1.0)
    args = ["merge", "--model", str(tmp_path / "nf4"), "--into-base"]
    code, _, err = call(capsys, *args, _adapter(base, tmp_path / "weak", 1e-4), "--out", str(tmp_path / "no"))
    assert code == 2 and "storing rounded away" in err and not (tmp_path / "no").exists(), err
    code, _, err = call(capsys, *args, strong, "--out", str(tmp_path / "no"))
    assert code == 2 and "the logits moved" in err, err
    code, text, err = call(capsys, *args, strong, "--out", str(tmp_path / "w"), "--force")
    assert (
        code == 0 and "as --force says" in text and "Storing rounded away" in text and text.count("%") >= 4 and "q_proj" in text
    ), err
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "w", dtype=torch.float32)
    keep_stored(again)
    net = T.AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    rw.load(net, strong).merge(force=True)
    x = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(again(x).logits, net(x).logits), "what was written is what was merged"


def _adapter(base: str, path: Path, size: float) -> str:
    import transformers as T

    model = T.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = rw.attach(model, {"r": 4, "targets": ["q_proj", "up_proj"]})
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.copy_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    adapter.export(path, "peft")
    return str(path)


def test_mistakes_are_one_line(capsys: Any, made: dict[str, str], tmp_path: Path) -> None:
    base, a, _ = (str(p) for p in trio(tmp_path))
    (tmp_path / "m.yaml").write_text("merge_method: ties\n")
    for args, says in (
        ([made["a"], a], "is adapters and"),
        ([a, str(tmp_path)], "neither an adapter nor a model"),
        (["/no/such"], "does not exist"),
        (["/no/such[a,b]"], "'/no/such[a,b]' does not exist"),
        ([made["a"], made["b"], "--base", base], "--base says nothing to a merge of adapters"),
        ([a, "--source-rank", "3"], "--source-rank says nothing to a merge of whole models"),
        ([str(tmp_path / "m.yaml"), "--method", "ties"], "--method says nothing to a merge of a mergekit file"),
        ([made["a"], made["b"], "--weights", "1,x"], "numbers with commas"),
        ([made["a"], made["b"], "--method", "ties", "--set", "density=abc"], "density as a finite number; it got 'abc'"),
        ([made["a"], made["b"], "--method", "svd", "--set", "rank=2.5"], "rank as a whole number or nothing; it got 2.5"),
        ([made["a"], made["b"], "--method", "lego", "--set", "nu=foo"], "nu as one of 'linf', 'l2'; it got 'foo'"),
        ([made["a"], made["b"], "--weights", "1"], "1 numbers for 2 sources"),
        ([made["a"], made["b"], "--weights", "nan,1"], "finite numbers; it got 'nan,1'"),
        ([made["a"], made["a"]], "is given twice"),
        ([made["a"], made["a"] + "/"], "is given twice"),
        ([made["a"], made["b"], "--method", "ties", "--set", "density=1.5"], "it got 1.5"),
        ([made["a"], made["b"], "--method", "dare_ties", "--set", "density=0"], "it got 0"),
        ([made["a"], made["b"], "--method", "greedy_soup"], "give that data with --score-data"),
        ([made["a"], made["b"], "--method", "greedy_soup", "--score-data", "x"], "give it with --model"),
        ([made["a"], made["b"], "--method", "ties", "--score-data", "x"], "asks no score"),
        ([made["a"], made["b"], "--method", "ties", "--score", "accuracy"], "--score says nothing to the merge 'ties'"),
        (
            [made["a"], made["b"], "--model", made["base"], "--method", "greedy_soup", "--score-data", "x", "--weights", "1,2"],
            "finds its weights itself",
        ),
        ([made["a"], made["b"], "--set", "seed=3"], "no option of a method"),
        ([made["a"], made["b"], "--set", "density"], "option=value"),
        ([made["a"], made["b"], "--method", "tiees"], "did you mean 'ties'"),
        ([made["a"], "--into-base"], "give it with --model"),
        ([a, base, "--method", "ties"], "works on changes from a base"),
    ):
        code, text, err = call(capsys, "merge", *args, "--out", str(tmp_path / "no"))
        assert code == 2 and says in err and err.count("\n") <= 2, (args, text, err)
    assert not (tmp_path / "no").exists()
    for to, says in ((made["a"], "not an empty folder"), (str(tmp_path / "m.yaml" / "x"), "m.yaml is a file")):
        before = {p: p.read_bytes() for p in Path(made["a"]).iterdir()}
        code, _, err = call(capsys, "merge", made["a"], made["b"], "--out", to)
        assert code == 2 and says in err and err.count("\n") == 1, err
        assert before == {p: p.read_bytes() for p in Path(made["a"]).iterdir()}, "nothing is lost"


def test_a_soup_is_chosen_by_held_out_text(capsys: Any, tmp_path: Path) -> None:
    """On the shipped base: one source that helps (nothing changed), one that ruins it."""
    from rankwise import assets

    net, _ = assets.load_base()
    for name, size in (("good", 0.0), ("bad", 0.3)):
        adapter = rw.attach(net, {"r": 2, "targets": ["q_proj"]})
        with torch.no_grad():
            for p in adapter.trainable_parameters():
                p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        adapter.save(tmp_path / name)
        adapter.detach()
    (tmp_path / "held.txt").write_text("def add(a, b):\n    return a + b\n" * 8)
    args = ["merge", str(tmp_path / "bad"), str(tmp_path / "good"), "--model", "base", "--score-data", str(tmp_path / "held.txt")]
    code, text, err = call(
        capsys, *args, "--method", "greedy_soup", "--score", "bits_per_byte", "--out", str(tmp_path / "g"), "--json"
    )
    assert code == 0, err
    told = json.loads(text)
    alone = told["score"]["sources"]
    assert told["weights"] == [0.0, 1.0] and told["score"]["merged"] == alone[str(tmp_path / "good")] < alone[str(tmp_path / "bad")]
    code, text, err = call(capsys, *args, "--method", "learned_soup", "--set", "epochs=3", "--out", str(tmp_path / "l"))
    assert code == 0 and "loss on" in text and "merged" in text, err
    code, text, err = call(capsys, *args, "--method", "learned_soup", "--out", str(tmp_path / "l2"), "--json")
    bad, good = json.loads(text)["weights"]
    assert good > 0.6 and abs(good + bad - 1) < 1e-6
    code, _, err = call(capsys, *args, "--method", "greedy_soup", "--score", "accuracy", "--out", str(tmp_path / "no"))
    assert code == 2 and "scored by loss, perplexity, bits_per_byte" in err and not (tmp_path / "no").exists()


def _moved(tmp_path: Path, sizes: dict[str, float]) -> dict[str, str]:
    """Adapters of the shipped base, one a size (0: nothing changed), and text to score them on."""
    from rankwise import assets

    net, _ = assets.load_base()
    for name, size in sizes.items():
        adapter = rw.attach(net, {"r": 2, "targets": ["q_proj"]})
        with torch.no_grad():
            for p in adapter.trainable_parameters():
                p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        adapter.save(tmp_path / name)
        adapter.detach()
    (tmp_path / "held.txt").write_text("def add(a, b):\n    return a + b\n" * 8)
    (tmp_path / "other.txt").write_text("def sub(a, b):\n    return a - b\n" * 8)
    return {n: str(tmp_path / n) for n in (*sizes, "held.txt", "other.txt")}


def test_an_option_is_searched_on_held_out_text_and_drawn(capsys: Any, tmp_path: Path) -> None:
    at = _moved(tmp_path, {"good": 0.0, "bad": 0.3})
    args = ["merge", at["bad"], at["good"], "--model", "base", "--score-data", at["held.txt"], "--score-data", at["other.txt"]]
    picture = tmp_path / "sweep.svg"
    code, text, err = call(
        capsys,
        *args,
        "--method",
        "interpolation",
        "--search",
        "share=0:1:0.5",
        "--picture",
        str(picture),
        "--out",
        str(tmp_path / "i"),
        "--json",
    )
    assert code == 0, err
    told = json.loads(text)
    points = told["search"]["points"]
    assert [p["share"] for p in points] == [0.0, 0.5, 1.0] and told["search"]["best"] == {"share": 0.0}
    scores = [p["scores"][at["held.txt"]] for p in points]
    assert scores[0] == min(scores) == told["score"]["merged"] == pytest.approx(told["score"]["sources"][at["good"]], abs=1e-5)
    assert scores[-1] == pytest.approx(told["score"]["sources"][at["bad"]], abs=1e-4)
    assert all(set(p["scores"]) == {at["held.txt"], at["other.txt"]} for p in points)
    assert picture.read_text().startswith("<?xml") and "share" in picture.read_text()
    code, text, err = call(
        capsys, *args, "--method", "lego", "--search", "rank=1,2", "--search", "nu=linf,l2", "--out", str(tmp_path / "l")
    )
    assert code == 0 and text.count("linf") == 2 and text.count("  chosen\n") == 1, err
    assert any(line.split()[-1:] == ["weight"] for line in text.splitlines())
    code, text, err = call(capsys, *args, "--method", "slerp", "--search", "t=0,1", "--out", str(tmp_path / "s"))
    assert code == 0 and "merged" in text and not any(line.split()[-1:] == ["weight"] for line in text.splitlines()), err


def test_whole_models_are_chosen_by_held_out_text(capsys: Any, tmp_path: Path) -> None:
    from rankwise import assets

    net, tokenizer = assets.load_base()
    folders = []
    for name, size in (("bad", 0.05), ("good", 0.0)):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        net.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        folders.append(str(tmp_path / name))
        net, _ = assets.load_base()
    (tmp_path / "held.txt").write_text("def add(a, b):\n    return a + b\n" * 8)
    args = ["merge", *folders, "--score-data", str(tmp_path / "held.txt"), "--score", "bits_per_byte"]
    code, text, err = call(capsys, *args, "--method", "greedy_soup", "--out", str(tmp_path / "g"), "--json")
    assert code == 0, err
    told = json.loads(text)
    alone = told["score"]["sources"]
    assert told["weights"] == [0.0, 1.0] and told["score"]["merged"] == alone[folders[1]] < alone[folders[0]]
    assert all(torch.equal(t, whole(Path(folders[1]))[n]) for n, t in whole(tmp_path / "g").items())
    code, text, err = call(capsys, *args, "--method", "learned_soup", "--set", "epochs=10", "--out", str(tmp_path / "l"))
    assert code == 0 and "bits_per_byte on" in text and "merged" in text, err
    code, text, err = call(
        capsys,
        *args,
        "--method",
        "slerp",
        "--search",
        "t=0.5,1",
        "--picture",
        str(tmp_path / "s.png"),
        "--out",
        str(tmp_path / "s"),
    )
    assert code == 0 and text.count("  chosen\n") == 1 and (tmp_path / "s.png").stat().st_size > 5000, err
    assert all(torch.allclose(t, whole(Path(folders[1]))[n], atol=1e-6) for n, t in whole(tmp_path / "s").items())


def test_stragglers_are_found_and_told(capsys: Any, tmp_path: Path) -> None:
    at = _moved(tmp_path, {"bad": 0.3})
    args = ["merge", at["bad"], "--model", "base", "--method", "robust_interpolation", "--set", "density=0.3", "--set", "alpha=0.5"]
    code, _, err = call(capsys, *args, "--out", str(tmp_path / "no"))
    assert code == 2 and "give that data with --score-data" in err
    code, text, err = call(capsys, *args, "--score-data", at["held.txt"], "--out", str(tmp_path / "r"))
    assert code == 0 and "robust_interpolation: " in text and "found to be" in text, err


def test_a_search_that_cannot_be_is_one_line(capsys: Any, made: dict[str, str], tmp_path: Path) -> None:
    both = [made["a"], made["b"]]
    held = ["--score-data", "x"]
    for args, says in (
        (["--search", "t=0:1:0.5"], "give that data with --score-data"),
        (["--search", "t", *held], "option=first:last:step; it got 't'"),
        (["--search", "t=0:1:0", *held], "no step of 0"),
        (["--search", "t=1:0:0.5", *held], "no step of 0.5 leads from 1 to 0"),
        (["--search", "t=0,1", "--search", "t=2", *held], "given twice"),
        (["--search", "tt=0,1", *held, "--method", "slerp"], "no option 'tt'"),
        (["--search", "density=0.5,2", *held, "--method", "ties"], "it got 2"),
        (["--search", "t=0,1", *held, "--method", "slerp"], "give it with --model"),
        (["--picture", "x.png"], "draws the search of one option"),
        (
            ["--search", "rule=ties,sum", *held, "--method", "knots", "--picture", str(tmp_path / "x.png")],
            "one option that is a number",
        ),
        (["--search", "t=0,1", *held, "--method", "slerp", "--picture", str(tmp_path / "x.txt")], "--picture writes"),
        ([*held, *held, "--method", "greedy_soup"], "names 'x' twice"),
        (["--method", "slerp", "--weights", "1,2"], "uses no weights"),
    ):
        code, text, err = call(capsys, "merge", *both, *args, "--out", str(tmp_path / "no"))
        assert code == 2 and says in err and err.count("\n") <= 2, (args, text, err)
    assert not (tmp_path / "no").exists()
