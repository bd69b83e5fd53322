"""kohya's files against diffusers' own reader of them, both namings of a U-Net's blocks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import ArtefactError, OptionError
from rankwise.sites import find_sites
from rankwise.store.interchange import by_module
from rankwise.store.sgm import layout, old_names
from tests.store.unet import TARGETS, adapted, draw, gap, read, text_encoder, unet


def through_diffusers(folder: Path, name: str, config: Any = None) -> Any:
    """What diffusers' loader of kohya's files makes of one, on a fresh U-Net."""
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    more = {"unet_config": config} if config is not None else {}
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(folder), weight_name=name, **more)
    model = unet()
    model.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    return model


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_the_real_library_reads_our_file_to_equal_outputs(rank_stabilised: bool, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model, ours = unet(), unet()
    base = draw(ours)
    adapter = adapted(model, scale="alpha/sqrt_r" if rank_stabilised else "alpha/r")
    file = adapter.export(tmp_path, format="kohya")
    tensors = load_file(file)
    alphas = {float(t) for k, t in tensors.items() if k.endswith(".alpha")}
    assert sorted(alphas) == pytest.approx([5 * 3**0.5 if rank_stabilised else 5.0])
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape == (3, 16, 3, 3)
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"].shape == (16, 3, 1, 1)
    assert gap(draw(through_diffusers(tmp_path, file.name)), draw(model), base) < 1e-4
    loaded = rw.load(ours, file)
    assert gap(draw(ours), draw(model), base) < 1e-6
    mine = adapter.tensors()
    assert all(torch.equal(t, mine[k]) for k, t in loaded.tensors().items())


def in_the_first_code_s_names(model: Any, targets: list[str], folder: Path) -> Path:
    """A kohya file of ``model`` adapted at ``targets``, its blocks renamed."""
    tensors = load_file(adapted(model, targets).export(folder / "a", format="kohya"))
    modules = list(by_module(find_sites(unet())))
    old: dict[str, Tensor] = {}
    for module in modules:
        name = f"lora_unet_{module.replace('.', '_')}"
        for what in ("lora_down.weight", "lora_up.weight", "alpha"):
            if f"{name}.{what}" in tensors:
                old[f"lora_unet_{old_names(module, layout(modules))[0].replace('.', '_')}.{what}"] = tensors[f"{name}.{what}"]
    assert len(old) == len(tensors) and not set(old) & set(tensors)
    save_file(old, folder / "old.safetensors")
    return folder / "old.safetensors"


def test_the_first_code_s_block_names_lead_to_the_same_modules(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model, ours = unet(), unet()
    base = draw(ours)
    rw.load(ours, in_the_first_code_s_names(model, TARGETS, tmp_path))
    assert gap(draw(ours), draw(model), base) < 1e-6


def test_the_real_library_reads_the_first_code_s_names_alike(tmp_path: Path) -> None:
    """Without the upsampler of a level that has no attention: diffusers takes its place in the block for an attention's."""
    pytest.importorskip("diffusers")
    model = unet()
    base = draw(model)
    in_the_first_code_s_names(model, [t for t in TARGETS if not t.startswith("upsamplers")], tmp_path)
    assert gap(draw(through_diffusers(tmp_path, "old.safetensors", model.config)), draw(model), base) < 1e-4


def test_old_names_of_sdxl() -> None:
    """Documented pairs of a U-Net with two residual blocks a level, three levels."""
    shape = (2, frozenset({"0", "1"}))
    pairs = {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": "input_blocks.8.1.transformer_blocks.9.attn2.to_k",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block.1.transformer_blocks.0.ff.net.2",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "up_blocks.2.resnets.0.time_emb_proj": "output_blocks.6.0.emb_layers.1",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    assert {m: old_names(m, shape)[0] for m in pairs} == pairs
    assert old_names("text_model.encoder", shape) == []


def test_text_encoders_and_dora(tmp_path: Path) -> None:
    model, fresh = text_encoder(), text_encoder()
    base = read(fresh)
    adapter = adapted(model, ["q_proj", "fc1"], "dora")
    file = adapter.export(tmp_path, format="kohya", prefix="lora_te1")
    tensors = load_file(file)
    assert all(k.startswith("lora_te1_") for k in tensors)
    assert {tuple(t.shape) for k, t in tensors.items() if k.endswith("fc1.dora_scale")} == {(24, 1)}
    rw.load(fresh, file)
    assert gap(read(fresh), read(model), base) < 1e-6
    written_for_the_old_names = {k.replace("lora_te1_", "lora_te1_text_model_"): t for k, t in tensors.items()}
    save_file(written_for_the_old_names, tmp_path / "old.safetensors")
    again = text_encoder()
    rw.load(again, tmp_path / "old.safetensors")
    assert torch.equal(read(again), read(fresh))


def test_two_components_in_one_file(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    model, fresh = (nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()}) for _ in range(2))
    file = adapted(model, ["to_q", "q_proj"]).export(tmp_path, format="kohya")
    assert {k.split("_")[1] for k in load_file(file)} == {"unet", "te"}
    base = draw(fresh["unet"]), read(fresh["text_encoder"])
    rw.load(fresh, file)
    assert gap(draw(fresh["unet"]), draw(model["unet"]), base[0]) < 1e-6
    assert gap(read(fresh["text_encoder"]), read(model["text_encoder"]), base[1]) < 1e-6
    with pytest.raises(ArtefactError, match="no module of this model.*ModuleDict"):
        rw.load(unet(), file)


class Twins(nn.Module):
    """Two modules that differ only in where the dots are."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Linear(6, 6)})
        self.a_b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a_b(self.a["b"](x)))


def test_names_that_underscores_hide_are_refused(tmp_path: Path) -> None:
    adapter = adapted(Twins(), ["a.b"])
    with pytest.raises(ArtefactError, match="'lora_unet_a_b' stands for 'a.b' and for 'a_b'"):
        adapter.export(tmp_path, format="kohya", component="unet")
    file = adapted(Twins(), ["c"]).export(tmp_path, format="kohya", component="unet")
    tensors = {k.replace("_c.", "_a_b."): t for k, t in load_file(file).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ArtefactError, match="stands for"):
        rw.load(Twins(), tmp_path / "x.safetensors")


def test_missing_alpha_is_one_and_the_tensor_s_own_rank_divides(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    A, B, x = torch.randn(2, 6, generator=g), torch.randn(6, 2, generator=g), torch.randn(3, 6, generator=g)
    for alpha, scale in ((None, 1.0), (0.0, 1.0), (4.0, 2.0), (-1.0, -0.5)):
        tensors = {"lora_unet_c.lora_down.weight": A, "lora_unet_c.lora_up.weight": B}
        if alpha is not None:
            tensors["lora_unet_c.alpha"] = torch.tensor(alpha)
        save_file(tensors, tmp_path / "x.safetensors")
        torch.manual_seed(0)
        model = Twins()
        with torch.no_grad():
            before, inner = model(x), model.a_b(model.a["b"](x))
            rw.load(model, tmp_path / "x.safetensors")
            torch.testing.assert_close(model(x) - before, scale * inner @ A.T @ B.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "tensor", "words"),
    [
        ("lora_unet_c.hada_w1_a", torch.ones(2, 2), "another LyCORIS form"),
        ("lora_unet_c.lokr_w1", torch.ones(2, 2), "another LyCORIS form"),
        ("lora_unet_c.surprise", torch.ones(1), "no key of a kohya"),
        ("lora_unet_z.lora_down.weight", torch.ones(2, 6), "'lora_unet_z'"),
        ("lora_unet_c.alpha", torch.ones(2), "no single finite number"),
        ("lora_unet_c.dora_scale", torch.ones(1, 6), "another method"),
    ],
)
def test_other_keys_are_refused(key: str, tensor: Tensor, words: str, tmp_path: Path) -> None:
    save_file(
        {"lora_unet_c.lora_down.weight": torch.ones(2, 6), "lora_unet_c.lora_up.weight": torch.ones(6, 2), key: tensor},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(ArtefactError, match=words):
        rw.load(Twins(), tmp_path / "x.safetensors")


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    adapter = adapted(Twins(), ["c"])
    with pytest.raises(OptionError, match="'vae'"):
        adapter.export(tmp_path, format="kohya", component="vae")
    with pytest.raises(OptionError, match="'lora_x'"):
        adapter.export(tmp_path, format="kohya", component="unet", prefix="lora_x")
