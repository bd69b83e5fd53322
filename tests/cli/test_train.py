"""``train`` and ``eval`` from a folder: a saved dataset with its splits, and digits as a folder of PNGs for each class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.tools import call


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    from rankwise.assets import tasks

    rows = tasks.docstring_task()[0][:12]
    folder = tmp_path_factory.mktemp("data") / "saved"
    parts = {"train": rows[:8], "test": rows[8:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(folder)
    return folder


TRAIN = ["train", "--model", "base", "--set", "form.r=2", "--set", "targets=q_proj", "--steps", "3", "--lr", "0.005", "--batch", "2", "--max-length", "64"]  # fmt: skip


def test_a_saved_dataset_by_its_splits(saved: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    code, text, err = call(
        capsys, *TRAIN, "--data", str(saved), "--split", "train", "--eval-split", "test", "--out", str(run), "--json"
    )
    assert code == 0, err
    got = json.loads(text)
    assert got["after"]["loss"] < got["before"]["loss"]
    where = ["--model", "base", "--data", str(saved), "--split", "test", "--max-length", "64", "--json"]
    code, text, err = call(capsys, "eval", *where, "--adapter", str(run / "adapter"), "--format", "completion")
    scores = json.loads(text)
    assert code == 0, err
    for name, phase in (("base", "before"), (str(run / "adapter"), "after")):
        assert scores[name] == pytest.approx(got[phase], rel=1e-5), "eval reads the split that training held out"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "holds the splits train, test; give --split"),
        (["--split", "dev"], "there is no 'dev'"),
        (["--split", "train", "--eval-split", "dev"], "there is no 'dev'"),
        (["--split", "train", "--format", "messages"], "needs messages too"),
        (["--split", "train", "--format", "chat"], "fmt is one of auto, text"),
        (["--split", "train", "--stage", "pt"], "--stage pt learns whole texts"),
        (["--split", "train", "--stage", "dpo"], "preference pairs"),
        (["--split", "train", "--arg", "save_strategy=never"], "refused by TrainingArguments"),
        (["--split", "train", "--arg", "bf16=true", "--arg", "fp16=true"], "refused by TrainingArguments"),
    ],
)
def test_a_split_or_layout_that_is_not_there(args: list[str], says: str, saved: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, err = call(capsys, *TRAIN, "--data", str(saved), "--out", str(tmp_path / "run"), *args)
    assert code == 2 and says in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


# --- preferences --------------------------------------------------------------------------------------------
def margins(adapter: str, pairs: list[dict[str, str]]) -> list[float]:
    """log π(chosen) − log π(rejected) of the adapted model less the base's, one pair after the other, by hand."""
    import rankwise as rw
    from rankwise.assets import load_base

    model, tokenizer = load_base()
    rw.load(model, adapter)

    def told(record: dict[str, str], side: str) -> torch.Tensor:
        prompt, answer = (tokenizer(record[k], add_special_tokens=False)["input_ids"] for k in ("prompt", side))
        ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits.gather(-1, ids[0, len(prompt) :, None]).sum()

    out = []
    with torch.no_grad():
        for record in pairs:
            ours = told(record, "chosen") - told(record, "rejected")
            with rw.view(model, {}):
                out.append((ours - told(record, "chosen") + told(record, "rejected")).item())
    return out


def test_preferences_are_learnt_from_a_file(tmp_path: Path, capsys: Any) -> None:
    """The first loss is ln 2, the base being its own reference; in the end the saved adapter prefers what was chosen."""
    from rankwise.assets import tasks

    pytest.importorskip("trl")
    pairs = tasks.preference_task()[0][:6]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in pairs))
    args = ["--stage", "dpo", "--set", "r=4", "--set", "targets=q_proj,v_proj,up_proj", "--steps", "6", "--batch", "3", "--lr", "0.01", "--max-length", "96"]  # fmt: skip
    run = tmp_path / "run"
    code, text, err = call(capsys, "train", "--model", "base", "--data", str(data), "--out", str(run), *args, "--json")
    assert code == 0, err
    got = json.loads(text)
    assert got["first"]["loss"] == pytest.approx(0.6931, abs=1e-3) and got["last"]["loss"] < 0.6
    learnt = margins(str(run / "adapter"), pairs)
    assert all(m > 0 for m in learnt) and sum(learnt) / len(learnt) > 2, learnt
    code, _, err = call(capsys, "train", "--model", "base", "--data", str(data), "--out", str(tmp_path / "cut"), *args[:-1], "8")
    assert code == 2 and "tokens" in err and "--truncation true" in err, err


# --- images -------------------------------------------------------------------------------------------------
def pngs(folder: Path, images: Any) -> Path:
    """scikit-learn's digits, 8×8 grey, a folder for each class."""
    from PIL import Image

    for i, (x, y) in enumerate(zip(*images, strict=True)):
        home = folder / str(int(y))
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray((x[0] * 255).round().to(torch.uint8).numpy()).save(home / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    from rankwise.assets.digits import digits as load

    home = tmp_path_factory.mktemp("digits")
    out: dict[str, Any] = {}
    for shift in ("none", "inverted"):
        train, test = load(shift)
        out[shift] = test
        out[f"{shift} train"] = pngs(home / shift / "train", [t[:320] for t in train])
        out[f"{shift} test"] = pngs(home / shift / "test", test)
    return out


def test_a_folder_of_digits_is_what_the_model_was_made_for(digits: Any, capsys: Any) -> None:
    from rankwise import assets
    from rankwise.assets.digits import accuracy

    code, text, err = call(capsys, "eval", "--model", "digits", "--data", str(digits["none test"]), "--json")
    assert code == 0, err
    got = json.loads(text)["base"]
    assert got["images"] == 449 and got["accuracy"] > 0.95
    assert got["accuracy"] == pytest.approx(accuracy(assets.load_digits_vit(), digits["none"]), abs=1 / 449)
    code, text, _ = call(capsys, "eval", "--model", "digits", "--data", str(digits["none test"]))
    assert code == 0 and "accuracy" in text and "449 rows" in text


def test_digits_are_learnt_saved_and_scored(digits: Any, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    args = [
        "train", "--model", "digits", "--data", str(digits["inverted train"]), "--eval-data", str(digits["inverted test"]),
        "--set", "form.r=4", "--set", "targets=all-linear", "--lr", "0.01", "--steps", "120", "--batch", "16",
    ]  # fmt: skip
    code, text, err = call(capsys, *args, "--out", str(run), "--arg", "save_strategy=no", "--json")
    assert code == 0, err
    got = json.loads(text)
    assert got["before"]["accuracy"] < 0.1 and got["after"]["accuracy"] > 0.5
    code, text, err = call(
        capsys, "eval", "--model", "digits", "--adapter", str(run / "adapter"), "--data", str(digits["inverted test"]), "--json"
    )
    scores = json.loads(text)
    assert code == 0, err
    assert scores["base"] == pytest.approx(got["before"], rel=1e-5)
    assert scores[str(run / "adapter")] == pytest.approx(got["after"], rel=1e-5)
    code, text, err = call(
        capsys, "merge", str(run / "adapter"), "--model", "digits", "--into-base", "--out", str(tmp_path / "merged")
    )
    assert code == 0, err
    code, text, err = call(capsys, "eval", "--model", str(tmp_path / "merged"), "--data", str(digits["inverted test"]), "--json")
    assert code == 0, err
    assert json.loads(text)["base"]["loss"] == pytest.approx(got["after"]["loss"], rel=1e-4), "its image processor came along"


def test_a_table_of_a_run_on_images(digits: Any, tmp_path: Path, capsys: Any) -> None:
    args = ["train", "--model", "digits", "--data", str(digits["none train"]), "--steps", "1", "--out", str(tmp_path / "run")]
    code, text, err = call(capsys, *args)
    assert code == 0, err
    assert "accuracy" in text and "perplexity" not in text and "trainable parameters in" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train", "--out", "OUT", "--split", "train"], "choose among text records"),
        (["train", "--out", "OUT", "--format", "text"], "choose among text records"),
        (["train", "--out", "OUT", "--stage", "pt"], "An image model is trained with --stage sft"),
        (["train", "--out", "OUT", "--max-length", "64"], "--max-length and --truncation are about tokens"),
        (["eval", "--split", "test"], "choose among text records"),
        (["compare", "-r", "lora"], "digits has no tokenizer"),
    ],
)
def test_what_is_for_text_is_refused_for_images(args: list[str], says: str, digits: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    given = [str(out) if a == "OUT" else a for a in args]
    code, _, err = call(capsys, given[0], "--model", "digits", "--data", str(digits["none test"]), *given[1:])
    assert code == 2 and says in err and "Traceback" not in err, err
    assert not out.exists()


def test_an_image_model_generates_no_text(capsys: Any) -> None:
    code, _, err = call(capsys, "generate", "--model", "digits", "--prompt", "7")
    assert code == 2 and "digits has no tokenizer" in err


def test_an_earlier_run_is_never_lost_in_silence(capsys: Any, tmp_path: Path) -> None:
    data, out = tmp_path / "a.txt", tmp_path / "run"
    data.write_text("one two three four five six seven eight nine ten " * 40)
    line = ["train", "--model", "base", "--data", str(data), "--stage", "pt", "--out", str(out), "--steps", "1", "--batch", "1", "--max-length", "32", "--set", "r=1"]  # fmt: skip
    assert call(capsys, *line)[0] == 0
    kept = (out / "adapter" / "rankwise.safetensors").read_bytes()
    code, _, err = call(capsys, *line)
    assert code == 2 and "already holds a run" in err and "--overwrite" in err
    assert (out / "adapter" / "rankwise.safetensors").read_bytes() == kept
    assert call(capsys, *line, "--set", "seed=3", "--overwrite")[0] == 0
    assert (out / "adapter" / "rankwise.safetensors").read_bytes() != kept
    assert "is a file" in call(capsys, *line[:8], str(data), *line[9:])[2]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["plan", "--batch", "0"], "--batch"),
        (["plan", "--tokens", "-5"], "--tokens"),
        (["compare", "-r", "lora", "--steps", "0"], "--steps"),
        (["compare", "-r", "lora", "--lr", "-1"], "--lr"),
        (["compare", "-r", "no/such.yaml"], "cannot be read"),
        (["plan", "--recipe", "."], "cannot be read"),
        (["generate", "--prompt", ""], "--prompt is empty"),
        (["generate", "--prompt", "x", "--tokens", "0"], "--tokens"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "--prompt", "word " * 600], "beyond the model's 512"),
    ],
)
def test_wrong_numbers_and_files_are_one_line(args: list[str], says: str, capsys: Any) -> None:
    code, _, err = call(capsys, args[0], "--model", "base", *args[1:])
    assert code == 2 and says in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
