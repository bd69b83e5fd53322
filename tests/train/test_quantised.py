"""A quantised base through transformers.Trainer: bitsandbytes' NF4 and torchao's int8, trained, saved, resumed, loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.codecs import keep_stored
from tests.models import batch_for, llama, logits
from tests.train.tools import RECIPE, trainer


def nf4() -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )


def int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama(hidden=64).save_pretrained(folder)
    return folder


def base(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32)
    keep_stored(model)
    return model


def bits(model: Any) -> dict[str, torch.Tensor]:
    """Every stored part of the base: codes, scales, and what is not quantised."""
    out = {}
    for name, p in model.named_parameters():
        if not name.startswith("rankwise"):
            parts = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else [""]
            out |= {f"{name} {part}": (getattr(p, part) if part else p).detach().clone() for part in parts}
    return out


@pytest.mark.parametrize("config", [nf4, int8])
@pytest.mark.parametrize("recipe", [RECIPE, {"r": 2, "init": "pissa"}], ids=["lora", "pissa"])
def test_a_quantised_base_trains_saves_resumes_and_loads(config: Any, recipe: Any, plain: Path, tmp_path: Path) -> None:
    settings = config()

    def make(folder: Path) -> Any:
        return trainer(folder, recipe, base(plain, settings), max_steps=2, learning_rate=5e-2)

    model = base(plain, settings)
    batch = batch_for(model)
    first = logits(model, batch)
    assert not torch.equal(first, logits(llama(hidden=64), batch)), "the base is really rounded"
    assert model.is_quantized

    whole = make(tmp_path / "a")
    stored = bits(whole.model)
    before = {k: t.detach().clone() for k, t in whole.adapter.tensors().items()}
    whole.train()
    assert whole.session.t == 2
    for k, t in whole.adapter.named_parameters().items():
        assert t.dtype == torch.float32 and not torch.equal(t, before[k]), k
    after = bits(whole.model)
    assert after.keys() == stored.keys() and all(torch.equal(t, stored[k]) for k, t in after.items())
    with rw.view(whole.model, {}):
        assert torch.allclose(logits(whole.model, batch), first, atol=1e-6)

    stopped = make(tmp_path / "b")
    stopped.train()
    shutil.rmtree(tmp_path / "b" / "checkpoint-2")
    torch.manual_seed(99)
    again = make(tmp_path / "b")
    again.train(resume_from_checkpoint=True)
    for k, t in whole.adapter.tensors().items():
        assert torch.equal(again.adapter.tensors()[k], t), k

    rw.load(model, tmp_path / "b" / "checkpoint-2")
    assert torch.equal(logits(model, batch), logits(again.model, batch)) and not torch.allclose(
        logits(model, batch), first, atol=1e-3
    )


@pytest.mark.parametrize("config", [nf4, int8])
def test_another_base_is_told_by_its_codes(config: Any, plain: Path, tmp_path: Path) -> None:
    """One linear with other codes, and the same weights unquantised, are both another base."""
    rw.attach(base(plain, config()), {"r": 2}).save(tmp_path / "a")
    turned = llama(hidden=64)
    with torch.no_grad():
        turned.model.layers[1].mlp.up_proj.weight.neg_()
    turned.save_pretrained(tmp_path / "other")
    for other in (base(tmp_path / "other", config()), llama(hidden=64)):
        with pytest.raises(rw.RankwiseError, match="another base"):
            rw.load(other, tmp_path / "a")
    rw.load(base(plain, config()), tmp_path / "a")


def test_the_trainers_own_view_of_a_quantised_base_is_put_back(plain: Path, tmp_path: Path) -> None:
    model = base(plain, int8())
    trainer(tmp_path, RECIPE, model)
    assert not getattr(model, "_hf_peft_config_loaded", False), "vouched for while the Trainer was made, no longer"
