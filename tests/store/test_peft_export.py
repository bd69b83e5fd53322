"""PEFT loads what we export and computes base + ΔW; what PEFT cannot hold is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.delta import AdapterState, LowRank
from rankwise.errors import ArtefactError
from rankwise.sites import find_sites
from rankwise.store import tensorfile
from rankwise.store.peft.export import export_peft, read_peft
from tests.store import store_models as models

peft = pytest.importorskip("peft")


def by_peft(model: nn.Module, path: Path) -> Tensor:
    """The logits of PEFT with the folder loaded; a missing key or other complaint of PEFT is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|mismatch|ignored|not found|unexpected).*")
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match any targeted module.*gate")
        return models.logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval())


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())


CASES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llama": (models.llama, ("q_proj", "v_proj", "down_proj")),
    "embedding and head": (models.llama, ("embed_tokens", "lm_head", "q_proj")),
    "gpt2 parts": (models.gpt2, ("c_attn[q]", "c_attn[v]", "c_proj", "c_fc")),
    "convolutions": (models.mixed, ("embed", "conv", "grouped", "square", "head")),
    "experts": (models.qwen3_moe, ("experts.gate_up_proj", "experts.down_proj", "q_proj")),
    "one stack": (models.qwen3_moe, ("experts.down_proj", "q_proj")),
    "parts of a stack, router": (models.qwen3_moe, ("gate_up_proj[gate]", "gate_up_proj[up]", "mlp.gate")),
    "dense beside experts": (lambda: models.qwen3_moe(mlp_only_layers=[0]), ("gate_proj", "experts.gate_up_proj", "up_proj")),
    "mixtral": (models.mixtral, ("experts.gate_up_proj", "experts.down_proj", "q_proj")),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    make, ends = CASES[case]
    model = make()
    state = models.random_state(model, models.every(model, *ends))
    want = models.logits(models.with_change(model, state))
    assert (want - models.logits(model)).abs().max() > 0.05
    export_peft(tmp_path / "a", state, find_sites(model), base_model="toy")
    assert (by_peft(model, tmp_path / "a") - want).abs().max() < 1e-5
    again, _ = read_peft(tmp_path / "a", find_sites(model))
    assert (models.logits(models.with_change(model, again)) - want).abs().max() < 1e-6


def test_mixed_scales_are_baked_and_need_no_alpha_pattern(tmp_path: Path) -> None:
    model = models.llama()
    names = models.every(model, "q_proj", "v_proj", "o_proj")
    state = models.random_state(
        model, names, r={n: 3 + i % 3 for i, n in enumerate(names)}, scale={n: 0.3 + 0.1 * i for i, n in enumerate(names)}
    )
    export_peft(tmp_path, state, find_sites(model))
    want = models.logits(models.with_change(model, state))
    assert (by_peft(model, tmp_path) - want).abs().max() < 1e-5
    config = config_of(tmp_path)
    assert config["alpha_pattern"] == {} and config["use_rslora"] is False
    tensors, _ = tensorfile.read_tensors(tmp_path, "adapter_model.safetensors")
    for name, d in state.sites.items():  # a reader that knows only lora_alpha and the tensor's own rank is right too
        B, A = tensors[f"base_model.model.{name}.lora_B.weight"], tensors[f"base_model.model.{name}.lora_A.weight"]
        torch.testing.assert_close(config["lora_alpha"] / A.shape[0] * B @ A, d.scale * d.B @ d.A, atol=1e-6, rtol=1e-5)


def test_a_common_alpha_is_kept_as_it_is(tmp_path: Path) -> None:
    model = models.llama()
    state = models.random_state(model, models.every(model, "q_proj"), r=8, scale=2.0)
    export_peft(tmp_path, state, find_sites(model))
    assert (config_of(tmp_path)["r"], config_of(tmp_path)["lora_alpha"]) == (8, 16)
    again, _ = read_peft(tmp_path, find_sites(model))
    for name, d in state.sites.items():
        assert torch.equal(again.sites[name].A, d.A) and torch.equal(again.sites[name].B, d.B) and again.sites[name].scale == 2.0


def test_core_and_negative_scale(tmp_path: Path) -> None:
    model = models.llama()
    g = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    for core in (torch.randn(4, generator=g), torch.randn(4, 4, generator=g)):
        A, B = torch.randn(4, 32, generator=g), torch.randn(32, 4, generator=g)
        export_peft(tmp_path, AdapterState({name: LowRank(A, B, -0.5, core)}), find_sites(model))
        got = read_peft(tmp_path, find_sites(model))[0].sites[name]
        middle = core.diag() if core.dim() == 1 else core
        torch.testing.assert_close(got.scale * got.B @ got.A, -0.5 * B @ middle @ A, atol=1e-5, rtol=1e-5)


def test_a_tie_gets_both_ends(tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    state = models.random_state(model, ["model.embed_tokens"])
    export_peft(tmp_path, state, find_sites(model))
    want = models.logits(models.with_change(model, state))  # one storage: the change is at both ends
    assert (by_peft(model, tmp_path) - want).abs().max() < 1e-5
    again, info = read_peft(tmp_path, find_sites(model))
    assert list(again.sites) == ["model.embed_tokens"] and info["untied"] == []
    export_peft(tmp_path, state, find_sites(model), tied=False)
    assert (by_peft(model, tmp_path) - want).abs().max() > 1e-3
    assert read_peft(tmp_path, find_sites(model))[1]["untied"] == ["model.embed_tokens"]


@pytest.mark.parametrize(
    "make,ends", [(models.llama, ("q_proj", "embed_tokens")), (models.gpt2, ("c_attn", "c_fc")), (models.mixed, ("conv",))]
)
def test_dora(make: Any, ends: tuple[str, ...], tmp_path: Path) -> None:
    model = make()
    state = models.random_state(model, models.every(model, *ends), scale=0.5)
    sites, judge = find_sites(model), copy.deepcopy(model)
    magnitude = {}
    for name, d in state.sites.items():
        V = sites[name].read() + d.scale * d.B @ d.A
        magnitude[name] = V.norm(dim=1) * (1 + 0.3 * torch.rand(len(V), generator=torch.Generator().manual_seed(1)))
        find_sites(judge)[name].write((magnitude[name] / V.norm(dim=1))[:, None] * V)
    export_peft(tmp_path, state, sites, magnitude=magnitude)
    assert (by_peft(model, tmp_path) - models.logits(judge)).abs().max() < 1e-5
    _, info = read_peft(tmp_path, sites)
    assert all(torch.equal(info["magnitude"][n], m) for n, m in magnitude.items())
    lone = dict(list(magnitude.items())[:1])
    if len(magnitude) > 1:
        with pytest.raises(ArtefactError, match="every site or none"):
            export_peft(tmp_path, state, sites, magnitude=lone)


def test_dora_of_parts_needs_every_row(tmp_path: Path) -> None:
    model = models.gpt2()
    names = models.every(model, "h.0.attn.c_attn[q]", "h.0.attn.c_attn[k]", "h.0.attn.c_attn[v]")
    state, sites, judge = models.random_state(model, names), find_sites(model), copy.deepcopy(model)
    magnitude = {}
    for name, d in state.sites.items():
        V = sites[name].read() + d.scale * d.B @ d.A
        magnitude[name] = V.norm(dim=1) * 1.5
        find_sites(judge)[name].write(1.5 * V)
    export_peft(tmp_path, state, sites, magnitude=magnitude)
    assert (by_peft(model, tmp_path) - models.logits(judge)).abs().max() < 1e-5
    fewer = AdapterState({n: state.sites[n] for n in names[:2]})
    with pytest.raises(ArtefactError, match="every row"):
        export_peft(tmp_path, fewer, sites, magnitude={n: magnitude[n] for n in names[:2]})


def test_bias_and_whole_modules(tmp_path: Path) -> None:
    model = models.gpt2()
    state = models.random_state(model, models.every(model, "c_fc"))
    g = torch.Generator().manual_seed(2)
    bias = {"transformer.h.0.mlp.c_fc": torch.randn(128, generator=g)}
    full = {"transformer.ln_f.weight": torch.rand(32, generator=g), "transformer.ln_f.bias": torch.randn(32, generator=g)}
    state = dataclasses.replace(state, full=full)
    judge = models.with_change(model, state)
    judge.transformer.h[0].mlp.c_fc.bias.data += bias["transformer.h.0.mlp.c_fc"]
    export_peft(tmp_path, state, find_sites(model), bias=bias)
    assert (by_peft(model, tmp_path) - models.logits(judge)).abs().max() < 1e-5
    again, info = read_peft(tmp_path, find_sites(model))
    assert {k: v.tolist() for k, v in again.full.items()} == {k: v.tolist() for k, v in full.items()}
    torch.testing.assert_close(info["bias"]["transformer.h.0.mlp.c_fc"], bias["transformer.h.0.mlp.c_fc"])
    half = dataclasses.replace(state, full={"transformer.ln_f.weight": full["transformer.ln_f.weight"]})
    export_peft(tmp_path, half, find_sites(model))  # completed from the live module
    assert set(read_peft(tmp_path, find_sites(model))[0].full) == set(full)
    with pytest.raises(ArtefactError, match=r"ln_f\.bias"):
        export_peft(tmp_path, half, {n: s.spec for n, s in find_sites(model).items()})


def test_short_names_are_exact(tmp_path: Path) -> None:
    model = models.llama()
    modules = [n for n, _ in model.named_modules()]
    state = models.random_state(model, models.every(model, "q_proj", "layers.1.mlp.down_proj"))
    export_peft(tmp_path, state, find_sites(model), modules=modules)
    assert config_of(tmp_path)["target_modules"] == ["1.mlp.down_proj", "q_proj"]
    assert (by_peft(model, tmp_path) - models.logits(models.with_change(model, state))).abs().max() < 1e-5


def test_only_the_stable_core_is_written_and_bytes_repeat(tmp_path: Path) -> None:
    model = models.llama()
    state = models.random_state(model, models.every(model, "q_proj"))
    export_peft(tmp_path / "a", state, find_sites(model))
    export_peft(tmp_path / "b", AdapterState(dict(reversed(state.sites.items()))), find_sites(model))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not {"lora_bias", "target_parameters", "megatron_core", "eva_config", "peft_version"} & set(config_of(tmp_path / "a"))
    assert not any("default" in k for k in tensorfile.read_tensors(tmp_path / "a", "adapter_model.safetensors")[0])


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    model = models.llama()
    state = models.random_state(model, models.every(model, "q_proj"))
    export_peft(tmp_path / "a", state, find_sites(model))
    (tmp_path / "a" / "README.md").write_text("mine")
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "sub" / "x").write_text("y")
    export_peft(tmp_path / "a", models.random_state(model, models.every(model, "v_proj")), find_sites(model))
    assert (tmp_path / "a" / "README.md").read_text() == "mine" and (tmp_path / "a" / "sub" / "x").read_text() == "y"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = models.llama()
    sites, q = find_sites(model), "model.layers.0.self_attn.q_proj"
    good = models.random_state(model, [q]).sites[q]

    class Other:
        kind = "columns"

    cases: list[tuple[str, AdapterState]] = [
        ("lower", AdapterState({q: Other()})),  # type: ignore[dict-item]
        ("not there", AdapterState({"nowhere": good})),
        ("nothing to export", AdapterState({})),
        ("empty", AdapterState({q: LowRank(torch.zeros(4, 0), torch.zeros(0, 4), 1.0)})),
        ("adapted and saved whole", AdapterState({q: good}, {f"{q}.weight": torch.zeros(32, 32)})),
        ("no parameters", AdapterState({q: good}, {"model.norm.nothing": torch.zeros(3)})),
        ("plain", AdapterState({"model.norm.weight": LowRank(torch.zeros(1, 1), torch.zeros(32, 1), 1.0)})),
    ]
    for message, state in cases:
        with pytest.raises(ArtefactError, match=message):
            export_peft(tmp_path / "a", state, sites)
    assert not (tmp_path / "a").exists()
    dilated = nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2))
    with pytest.raises(ArtefactError, match="dilated"):
        export_peft(tmp_path / "a", models.random_state(dilated, ["0"]), find_sites(dilated))
    with pytest.raises(ArtefactError, match="lora_dropout"):
        moe = models.qwen3_moe()
        export_peft(
            tmp_path / "a",
            models.random_state(moe, models.every(moe, "experts.down_proj")),
            find_sites(moe),
            config_extra={"lora_dropout": 0.1},
        )


def test_a_classifier_head_is_completed(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_labels=3, pad_token_id=0
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    state = models.random_state(model, models.every(model, "q_proj"))
    export_peft(tmp_path, state, find_sites(model), task_type="SEQ_CLS")
    assert (by_peft(model, tmp_path) - models.logits(models.with_change(model, state))).abs().max() < 1e-5


def test_a_mixed_pair_is_seen(tmp_path: Path) -> None:
    model = models.llama()
    sites = find_sites(model)
    export_peft(tmp_path / "a", models.random_state(model, models.every(model, "q_proj"), scale=2.0), sites)
    export_peft(tmp_path / "b", models.random_state(model, models.every(model, "q_proj"), scale=4.0), sites)
    (tmp_path / "a" / "adapter_config.json").write_bytes((tmp_path / "b" / "adapter_config.json").read_bytes())
    with pytest.raises(ArtefactError, match="do not belong together"):
        read_peft(tmp_path / "a", sites)
    config = config_of(tmp_path / "b") | {"base_model_name_or_path": "moved/elsewhere", "inference_mode": False}
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config))
    read_peft(tmp_path / "b", sites)  # notes may change


def test_readers_while_it_is_exported_again_and_again(tmp_path: Path) -> None:
    """Each reader sees one whole version, never config and tensors of two."""
    import threading
    import time

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    specs = {n: s.spec for n, s in find_sites(model).items()}
    versions = [models.random_state(model, ["0", "1"], r=r, scale=float(r)) for r in (1, 2, 3)]
    export_peft(tmp_path / "x", versions[0], specs)
    end, faults, reads, writes = time.monotonic() + 1.0, [], [], []

    def run(step: Any) -> None:
        try:
            while time.monotonic() < end:
                step()
        except BaseException as e:
            faults.append(e)

    def read() -> None:
        state, _ = read_peft(tmp_path / "x", specs, hub=False)
        want = versions[state.sites["0"].A.shape[0] - 1]
        assert all(torch.equal(state.sites[n].dense(), want.sites[n].dense()) for n in ("0", "1"))
        reads.append(1)

    def write() -> None:
        export_peft(tmp_path / "x", versions[len(writes) % 3], specs)
        writes.append(1)

    threads = [threading.Thread(target=run, args=(f,)) for f in (write, read, read, read)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults, faults[:2]
    assert len(reads) > 10 and len(writes) > 5
