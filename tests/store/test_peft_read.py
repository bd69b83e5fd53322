"""We load what PEFT saves, to equal logits; settings and keys that we cannot honour are refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.errors import ArtefactError
from rankwise.sites import find_sites
from rankwise.store import tensorfile
from rankwise.store.peft.export import export_peft, read_peft
from tests.store import store_models as models

peft = pytest.importorskip("peft")


def made_by_peft(model: nn.Module, path: Path, **config: Any) -> Tensor:
    """Save a PEFT adapter with random factors; returns PEFT's logits."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    for name, p in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(p, std=0.15)
        elif "magnitude" in name:
            p.data *= 1.2
        elif "modules_to_save" in name:
            p.data += 0.1
    adapted.save_pretrained(path)
    return models.logits(adapted)


def by_us(model: nn.Module, path: Path) -> Tensor:
    """Logits of the base with everything that we read written into its weights."""
    state, info = read_peft(path, find_sites(model))
    judge = models.with_change(model, state)
    sites = find_sites(judge)
    for name, m in info["magnitude"].items():
        V = sites[name].read()
        sites[name].write((m / V.norm(dim=1))[:, None] * V)
    for name, b in info["bias"].items():
        sites[name].bias.data += b
    return models.logits(judge)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (models.llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 10}),
    "rslora": (models.llama, {"target_modules": ["q_proj"], "r": 4, "use_rslora": True}),
    "patterns": (models.llama, {"target_modules": "all-linear", "r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 3},
                                # PEFT sorts the patterns as it saves, so overlapping ones may not load again, there or here
                                "alpha_pattern": {r"model.layers.\d.self_attn.v_proj": 1, "proj": 7}}),
    "dora": (models.llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora conv1d-style": (models.gpt2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "lora_bias": (models.gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "saved modules": (models.gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
    "bias lora_only": (models.gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "bias all": (models.gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "embedding": (models.llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (models.llama, {"target_modules": ["lm_head"]}),
    "convolutions": (models.mixed, {"target_modules": ["conv", "square", "embed", "head"], "r": 3}),
    "some layers": (models.llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "experts": (models.qwen3_moe, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
    "old expert names": (models.qwen3_moe, {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"], "r": 4, "lora_alpha": 6}),
    "one stack": (models.mixtral, {"target_modules": [], "target_parameters": ["gate_up_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    model = make()
    want = made_by_peft(model, tmp_path, **config)
    assert (want - models.logits(model)).abs().max() > 1e-3
    assert (by_us(model, tmp_path) - want).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["plain", "patterns", "experts", "rslora"])
def test_there_and_back_again(case: str, tmp_path: Path) -> None:
    make, config = CASES[case]
    model = make()
    want = made_by_peft(model, tmp_path / "a", **config)
    state, _ = read_peft(tmp_path / "a", find_sites(model))
    export_peft(tmp_path / "b", state, find_sites(model))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b").eval()
    assert (models.logits(again) - want).abs().max() < 1e-5


def test_experts_saved_one_by_one(tmp_path: Path) -> None:
    """Files from before the experts were fused: PEFT 0.21 converts them on load, and so do we."""
    model = models.qwen3_moe()
    g, tensors = torch.Generator().manual_seed(5), {}
    for layer in range(2):
        for e in range(4):
            for leaf, out, inp in (("gate_proj", 24, 32), ("up_proj", 24, 32), ("down_proj", 32, 24)):
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{leaf}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(4, inp, generator=g) * 0.2
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4, generator=g) * 0.2
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    write(tmp_path, config, tensors)
    want = models.logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval())
    assert (by_us(model, tmp_path) - want).abs().max() < 1e-5
    assert (want - models.logits(model)).abs().max() > 1e-3
    gone = {k: v for k, v in tensors.items() if "experts.2.up_proj" not in k}
    write(tmp_path, config, gone)
    with pytest.raises(ArtefactError, match="3 of 4 experts"):
        read_peft(tmp_path, find_sites(model))


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").write_bytes(b"".join(tensorfile.pack(tensors, metadata or {"format": "pt"})))


Q = "model.layers.0.self_attn.q_proj"


def plain(prefix: str = "base_model.model.") -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [Q]}
    return config, {f"{prefix}{Q}.lora_A.weight": torch.ones(4, 32), f"{prefix}{Q}.lora_B.weight": torch.ones(32, 4)}


WRONG: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("peft_type is 'IA3'", {"peft_type": "IA3"}, {}),
    ("peft_type is 'None'", {"peft_type": None}, {}),
    ("r must be", {"r": 0}, {}),
    ("r must be", {"r": -4}, {}),
    ("r must be", {"r": 4097}, {}),
    ("r must be", {"r": True}, {}),
    ("lora_alpha must be", {"lora_alpha": 0}, {}),
    ("lora_alpha must be", {"lora_alpha": 1e300}, {}),
    ("lora_alpha must be", {"lora_alpha": "8"}, {}),
    ("use_rslora must be", {"use_rslora": 1}, {}),
    ("rank_pattern must be", {"rank_pattern": {"q_proj": 0}}, {}),
    ("target_modules must be", {"target_modules": [1]}, {}),
    ("bias must be", {"bias": "some"}, {}),
    ("is not a pattern", {"rank_pattern": {"(": 4}}, {}),
    ("repeats a group", {"target_modules": "(a+)+b"}, {}),
    ("too complex", {"target_modules": ".*a.*b.*c.*d.*e.*f.*g.*h"}, {}),
    ("activated LoRA", {"alora_invocation_tokens": [1, 2]}, {}),
    ("QALoRA", {"use_qalora": True}, {}),
    ("KaSA", {"kasa_config": {"beta": 1}}, {}),
    ("layers are repeated", {"layer_replication": [[0, 2]]}, {}),
    ("rows of an embedding", {"trainable_token_indices": [1]}, {}),
    ("valid only on the changed base", {"init_lora_weights": "pissa_niter_4"}, {}),
    ("unknown key 'warp'", {"warp": 9}, {}),
    ("expected .*magnitude", {"use_dora": True}, {}),
    ("expected .*bias", {"lora_bias": True}, {}),
    ("takes 8×32", {"r": 8}, {}),
    ("no tensors in the file", {"target_modules": ["q_proj"]}, {}),
    ("not in this model.*did you mean", {}, {"model.layers.0.self_attn.q_prot": (4, 32)}),
    ("missing|expected", {}, {f"{Q}.lora_B.weight": None}),
    ("is 4×31", {}, {f"{Q}.lora_A.weight": (4, 31)}),
    ("belongs to nothing", {}, {"model.norm.weight": (32,)}),
    ("adapter's name", {}, {f"{Q}.lora_A.default.weight": (4, 32)}),
    ("is empty", {}, {f"{Q}.lora_A.weight": (0, 32)}),
    ("factors for .*weight", {}, {f"{Q}.base_layer.base_layer.lora_A.weight": (4, 32)}),
]  # fmt: skip


@pytest.mark.parametrize("message,config,tensors", WRONG)
def test_well_formed_but_wrong(message: str, config: dict[str, Any], tensors: dict[str, Any], tmp_path: Path) -> None:
    base, good = plain()
    for key, shape in tensors.items():
        if key.endswith("q_prot"):
            for part, s in (("A", (4, 32)), ("B", (32, 4))):
                good[f"base_model.model.{key}.lora_{part}.weight"] = torch.ones(s)
        elif shape is None:
            del good[f"base_model.model.{key}"]
        else:
            good[f"base_model.model.{key}"] = torch.ones(shape)
    write(tmp_path, base | config, good)
    with pytest.raises(ArtefactError, match=message):
        read_peft(tmp_path, find_sites(models.llama()))


def test_neutral_values_of_unknown_keys_are_fine(tmp_path: Path) -> None:
    config, tensors = plain()
    write(
        tmp_path, config | {"future": None, "other_future": False, "more": {}, "lora_dropout": 0.3, "peft_version": "9.9"}, tensors
    )
    state, info = read_peft(tmp_path, find_sites(models.llama()))
    assert list(state.sites) == [Q] and info["dropout"] == 0.3
    numbers = tensors[f"base_model.model.{Q}.lora_A.weight"].clone()
    numbers[0, 0] = float("nan")
    write(tmp_path, config, tensors | {f"base_model.model.{Q}.lora_A.weight": numbers})
    with pytest.raises(ArtefactError, match="not finite"):
        read_peft(tmp_path, find_sites(models.llama()))


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", "", "base_model.model.base_model.model."])
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    write(tmp_path, *plain(prefix))
    assert list(read_peft(tmp_path, find_sites(models.llama()))[0].sites) == [Q]
    if prefix.count("base_model") > 1:
        return
    config, tensors = plain(prefix)
    write(tmp_path, config, {k.replace("model.layers", "layers"): v for k, v in tensors.items()})
    assert list(read_peft(tmp_path, find_sites(models.llama()))[0].sites) == [Q]


def test_without_a_model(tmp_path: Path) -> None:
    write(tmp_path, *plain())
    state, _ = read_peft(tmp_path)
    assert list(state.sites) == [Q] and state.sites[Q].scale == 2.0


def test_no_folder_and_no_hub(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "nobody/nothing-here-0000"):
        with pytest.raises(ArtefactError, match="no folder"):
            read_peft(path, {})
    with pytest.raises(ArtefactError, match="could not be fetched: HF_HUB_OFFLINE"):
        read_peft("nobody/nothing-here-0000", {})
    with pytest.raises(ArtefactError, match="needs adapter_config"):
        read_peft(tmp_path, {})
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(ArtefactError, match=r"adapter_model.bin.*run code"):
        read_peft(tmp_path, {})


def test_a_config_names_code_and_a_remote(tmp_path: Path) -> None:
    """`auto_mapping` and the base's name are notes: nothing is imported or fetched for them."""
    import sys

    config, tensors = plain()
    write(
        tmp_path,
        config
        | {"auto_mapping": {"base_model_class": "Evil", "parent_library": "antigravity"}, "base_model_name_or_path": "evil/x"},
        tensors,
    )
    sites = find_sites(models.llama())
    before, seen = set(sys.modules), []
    sys.addaudithook(lambda event, args: seen.append((event, args)) if event.startswith(("socket.", "subprocess.")) else None)
    read_peft(tmp_path, sites)
    assert not seen and "antigravity" not in sys.modules and not set(sys.modules) - before
