"""The scripts that make what ships: a stopped run goes on as if it had not stopped, and the cards tell the truth."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
import torch

from rankwise import assets, errors
from rankwise.assets import corpus, digits, pretrain_run
from rankwise.assets.tasks import domains

CONFIG = dataclasses.replace(pretrain_run.TINY, corpus_bytes=30_000)
PACKAGE = Path(assets.__file__).parent


def _figure(card: Path, row: str, column: int) -> float:
    line = re.search(rf"^\| {row} \|(.*)\|$", card.read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None, f"{card} has no row {row}"
    return float(line[1].split("|")[column].replace(",", ""))


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(tmp_path: Path) -> None:
    quiet = {"steps": 8, "say": lambda text: None}
    whole = pretrain_run.PretrainRun(CONFIG, tmp_path / "whole")
    whole.train(**quiet)
    pretrain_run.PretrainRun(CONFIG, tmp_path / "parts").train(**quiet, stop_at=3)
    resumed = pretrain_run.PretrainRun(CONFIG, tmp_path / "parts")
    assert resumed.step == 3 and resumed.progress == 3 / 8
    resumed.train(**quiet)
    assert resumed.losses == whole.losses and len(whole.losses) == 8 and whole.losses[-1] < whole.losses[0]
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name
    with pytest.raises(errors.OptionError, match="another config"):
        pretrain_run.PretrainRun(dataclasses.replace(CONFIG, lr=1.0), tmp_path / "parts")
    with pytest.raises(errors.OptionError, match="exactly one budget"):
        resumed.train(steps=1, minutes=1.0)


def test_an_epoch_visits_every_window_once_and_a_batch_depends_on_its_step_alone() -> None:
    stream = torch.arange(CONFIG.context * 13)
    batches = pretrain_run.Batches(stream, CONFIG)
    assert batches.windows == 12
    first = torch.cat([batches(t) for t in range(3)])  # 12 windows in batches of 4
    assert first[:, 0].sort().values.diff().eq(CONFIG.context).all()
    assert not torch.equal(first, torch.cat([batches(t) for t in range(3, 6)]))
    assert torch.equal(pretrain_run.Batches(stream, CONFIG)(4), batches(4))


def test_the_learning_rate_warms_up_holds_and_falls_to_nothing() -> None:
    config = pretrain_run.PretrainConfig()
    assert pretrain_run.learning_rate(config, 0, 0.0) == config.lr / config.warmup
    assert pretrain_run.learning_rate(config, 500, config.decay_from - 1e-9) == config.lr
    assert pretrain_run.learning_rate(config, 500, 0.7) == pytest.approx(config.lr / 2)
    assert pretrain_run.learning_rate(config, 500, 1.0) == 0.0


@pytest.mark.slow
def test_the_shipped_base_codes_unseen_text_as_its_card_says() -> None:
    card = assets.base_path() / "README.md"
    model, tokenizer = assets.load_base()
    unseen = domains()["xml"][1]
    bits, unigram = assets.bits_per_byte(model, tokenizer, unseen), assets.unigram_bits_per_byte(tokenizer, unseen)
    assert bits < _figure(card, "xml", 1) + 0.1 and bits < 0.8 * unigram  # another Python's files differ a little
    for row in ("control", "all", *corpus.HELD_OUT):
        assert _figure(card, row, 1) < _figure(card, row, 2), row


def test_the_shipped_classifier_scores_as_its_card_says() -> None:
    model = assets.load_digits_vit()
    for shift in digits.SHIFTS:
        stated = _figure(assets.digits_vit_path() / "README.md", shift, 0)
        assert abs(digits.accuracy(model, digits.digits(shift)[1]) - stated) <= 0.01


def test_the_vit_trains_from_its_seed() -> None:
    from rankwise.assets.pretrain_digits import train_vit

    one, again = (train_vit(epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_every_shipped_file_is_package_data_and_small() -> None:
    shipped = [f for folder in ("base", "digits_vit") for f in (PACKAGE / folder).iterdir()]
    assert sum(f.stat().st_size for f in shipped) < 12_500_000
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    globs = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]["rankwise"]
    for file in shipped:
        name = file.relative_to(PACKAGE.parent).as_posix()
        assert any(fnmatch.fnmatch(name, pattern.replace("**/", "*")) for pattern in globs), name


def test_a_python_without_source_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(errors.DataError, match="holds no .py source"):
        domains()
