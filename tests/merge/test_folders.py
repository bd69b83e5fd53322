"""Adapter folders as sources: every scaling rule, what is refused, and memory that does not grow with their number."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankwise as rw
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import ArtefactError, MergeError
from rankwise.merge import merge_states, read_state
from rankwise.merge.engine import folders as module
from rankwise.merge.engine.folders import export_merged, open_folder, open_folders
from rankwise.store.native import save_state
from tests.models import llama

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def peft(path: Path, seed: int, sites: dict[str, tuple[int, int, int]], **config: Any) -> Path:
    """A PEFT folder of random factors: site → (r, in, out)."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for n, (r, inp, out) in sites.items():
        tensors[f"base_model.model.{n}.lora_A.weight"] = torch.randn(r, inp, generator=g)
        tensors[f"base_model.model.{n}.lora_B.weight"] = torch.randn(out, r, generator=g)
    path.mkdir()
    save_file(tensors | config.pop("extra", {}), path / "adapter_model.safetensors")
    full = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(sites), **config}
    (path / "adapter_config.json").write_text(json.dumps(full))
    return path


def product(path: Path, site: str) -> torch.Tensor:
    t = load_file(path / "adapter_model.safetensors")
    return t[f"base_model.model.{site}.lora_B.weight"] @ t[f"base_model.model.{site}.lora_A.weight"]


TWO = {Q: (4, 8, 10), UP: (6, 8, 12)}


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (8 / 4, 8 / 6)),
        ({"use_rslora": True}, (8 / 2, 8 / 6**0.5)),
        ({"alpha_pattern": {"q_proj": 3}}, (3 / 4, 8 / 6)),
        ({"alpha_pattern": {"model.layers.1.mlp.up_proj": 5}, "use_rslora": True}, (8 / 2, 5 / 6**0.5)),
        ({"fan_in_fan_out": True}, (8 / 4, 8 / 6)),
    ],
)
def test_scales_of_a_peft_folder(tmp_path: Path, config: dict[str, Any], scales: tuple[float, float]) -> None:
    path = peft(tmp_path / "a", 0, TWO, rank_pattern={"up_proj": 6}, **config)
    found = open_folder(path)
    assert list(found.sites) == [Q, UP] and UP in found.sites and "x" not in found.sites
    for site, scale in zip((Q, UP), scales, strict=True):
        assert torch.allclose(found.sites[site].dense(), scale * product(path, site), atol=1e-5)
    got = merge_states([found], [1.0], "cat")
    assert torch.allclose(got.sites[UP].dense(), scales[1] * product(path, UP), atol=1e-4)


@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_folder_reads_as_with_its_model(tmp_path: Path, format: str) -> None:
    model = llama()
    adapter = rw.attach(model, {"r": 3, "alpha": 5, "scale": "alpha/sqrt_r"})
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    adapter.export(tmp_path / "a", format)
    adapter.detach()
    lazy, read = open_folder(tmp_path / "a"), read_state(model, tmp_path / "a")
    assert set(lazy.sites) == set(read.sites) and lazy.base != ""
    for n, d in read.sites.items():
        assert torch.allclose(lazy.sites[n].dense(), d.dense(), rtol=1e-6, atol=0)


def test_a_saved_state_is_a_source(tmp_path: Path) -> None:
    state = AdapterState({Q: LowRank(torch.ones(2, 3), torch.ones(4, 2), 0.5)}, {"head.weight": torch.arange(3.0)})
    save_state(tmp_path / "s", state)
    found = open_folder(tmp_path / "s")
    assert torch.equal(found.sites[Q].dense(), torch.ones(4, 3)) and torch.equal(found.full["head.weight"], torch.arange(3.0))


def test_heads_are_carried_and_embeddings_and_old_experts_read(tmp_path: Path) -> None:
    extra = {"base_model.model.score.weight": torch.ones(2, 8), "base_model.model.emb.lora_embedding_A": torch.ones(4, 30),
             "base_model.model.emb.lora_embedding_B": torch.ones(8, 4)}  # fmt: skip
    a = peft(tmp_path / "a", 0, {Q: (4, 8, 10)}, extra=extra, modules_to_save=["score"])
    b = peft(tmp_path / "b", 1, {Q: (4, 8, 10), "model.layers.0.experts.3.w1": (4, 8, 6)})
    got = merge_states(open_folders([a, b]), [0.5, 0.5], "cat")
    assert torch.equal(got.full["score.weight"], torch.ones(2, 8))
    assert (
        torch.allclose(got.sites["emb"].dense(), torch.full((8, 30), 4 * 2.0 * 0.5)) and "model.layers.0.experts.3.w1" in got.sites
    )


def test_what_is_written_is_an_adapter_for_peft(tmp_path: Path) -> None:
    """Linear, embedding and head, of unequal ranks, merged without a model and loaded by PEFT with one."""
    import peft

    for i in range(2):
        config = peft.LoraConfig(
            r=2 + i, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"] if i else None
        )
        net = peft.get_peft_model(llama(), config)
        with torch.no_grad():
            for n, p in net.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i + p.numel())))
        net.save_pretrained(tmp_path / str(i), save_embedding_layers=False)
    sources = open_folders([tmp_path / "0", tmp_path / "1"], check_base=False)
    export_merged(tmp_path / "m", merge_states(sources, [0.7, 0.3], "cat"), sources)
    made = peft.PeftModel.from_pretrained(llama(), tmp_path / "m")
    q = made.base_model.model.model.layers[1].self_attn.q_proj
    e = made.base_model.model.model.embed_tokens
    for site, got in (
        ("model.layers.1.self_attn.q_proj", q.get_delta_weight("default")),
        ("model.embed_tokens", e.get_delta_weight("default").mT),
    ):
        wanted = 0.7 * sources[0].sites[site].dense() + 0.3 * sources[1].sites[site].dense()
        assert torch.allclose(got, wanted, atol=1e-4), site
    assert torch.equal(made.base_model.model.lm_head.modules_to_save["default"].weight, llama().lm_head.weight)


def test_a_sum_wider_than_the_matrix_is_written_narrow(tmp_path: Path) -> None:
    sources = open_folders([peft(tmp_path / str(t), t, {Q: (4, 8, 10)}) for t in range(5)])
    total = merge_states(sources, None, "cat")
    export_merged(tmp_path / "m", total, sources)
    got = open_folder(tmp_path / "m").sites[Q]
    assert (
        total.sites[Q].exact_rank == 20 and got.exact_rank == 8 and torch.allclose(got.dense(), total.sites[Q].dense(), atol=1e-4)
    )


def test_a_convolution_is_flattened(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 3, 2, 2, generator=g), torch.randn(6, 4, 1, 1, generator=g)
    pair = {"base_model.model.conv.lora_A.weight": A, "base_model.model.conv.lora_B.weight": B}
    got = open_folder(peft(tmp_path / "a", 0, {Q: (4, 8, 10)}, extra=pair)).sites["conv"].dense()
    assert torch.allclose(got, 2 * (B.flatten(1) @ A.flatten(1)), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "extra", "says"),
    [
        ({"use_dora": True}, {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(10)}, r"magnitudes \(DoRA\).*depends on W"),
        ({"lora_bias": True}, {f"base_model.model.{Q}.lora_B.bias": torch.ones(10)}, "changes of biases"),
        ({}, {f"base_model.model.{Q}.base_layer.lora_A.weight": torch.ones(4, 8), f"base_model.model.{Q}.base_layer.lora_B.weight": torch.ones(10, 4)}, "without the model"),
        ({}, {"base_model.model.emb.lora_embedding_A": torch.ones(4, 9), "base_model.model.emb.lora_embedding_B": torch.ones(8, 4),
              "base_model.model.emb.base_layer.weight": torch.ones(9, 8)}, "copies of base weights"),
        ({}, {"base_model.model.stray.weight": torch.ones(3)}, "belongs to nothing"),
        ({"r": 5}, {}, "takes 5×8"),
    ],
)  # fmt: skip
def test_what_needs_the_model_is_refused(tmp_path: Path, config: dict[str, Any], extra: dict[str, Any], says: str) -> None:
    path = peft(tmp_path / "a", 0, {Q: (4, 8, 10)}, extra=extra, **config)
    with pytest.raises((MergeError, ArtefactError), match=says):
        open_folder(path)


def test_other_forms_and_damage_are_refused(tmp_path: Path) -> None:
    model = llama()
    rw.attach(model, {"form": "dora", "r": 2}).save(tmp_path / "dora")
    with pytest.raises(MergeError, match="of the form 'dora'"):
        open_folder(tmp_path / "dora")
    rw.attach(llama(), {"init": "pissa", "r": 2}).save(tmp_path / "pissa")
    with pytest.raises(MergeError, match="beside its factors"):
        open_folder(tmp_path / "pissa")
    rw.attach(llama(), {"r": 2}).save(tmp_path / "a")
    file = tmp_path / "a/rankwise.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ArtefactError, match="damaged"):
        open_folder(tmp_path / "a")
    nan = peft(tmp_path / "nan", 0, {Q: (4, 8, 10)}, extra={f"base_model.model.{Q}.lora_A.weight": torch.full((4, 8), torch.nan)})
    with pytest.raises(ArtefactError, match="not finite"):
        merge_states([open_folder(nan)])
    with pytest.raises(ArtefactError, match="holds no adapter"):
        open_folder(tmp_path)


def test_adapters_of_different_bases(tmp_path: Path) -> None:
    paths = [peft(tmp_path / n, 0, {Q: (4, 8, 10)}, base_model_name_or_path=base) for n, base in (("a", "x/y"), ("b", "x/z"))]
    with pytest.raises(MergeError, match="a of x/y, b of x/z"):
        open_folders(paths)
    assert len(open_folders(paths, check_base=False)) == 2


def test_one_site_of_each_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = {f"m.{i}": (2, 8, 8) for i in range(6)}
    sources = [open_folder(peft(tmp_path / str(t), t, sites, r=2)) for t in range(5)]
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]
    read = module._TensorFile.read

    def counted(self: Any, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive.add(tensor)
        most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(module._TensorFile, "read", counted)
    merge_states(sources, None, "svd")
    assert 0 < most[0] <= 2 * len(sources), "only one site's A and B of each adapter"


CHILD = """
import resource, sys
import torch
from rankwise.merge import merge_states
from rankwise.merge.engine.folders import open_folders
sources = open_folders(sys.argv[2:])
merge_states(sources[:2], None, sys.argv[1], rank=4)  # imports and work space
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_states(sources, None, sys.argv[1], rank=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_adapters(tmp_path: Path) -> None:
    sites = {f"m.{i}": (16, 512, 512) for i in range(16)}
    paths = [str(peft(tmp_path / str(t), t, sites, r=16)) for t in range(24)]
    held = 24 * 16 * 2 * 16 * 512 * 4 / 1024  # kB of all adapters: 25 MB in fp32, twice that in the fp64 that sums take
    done = subprocess.run([sys.executable, "-c", CHILD, "lego", *paths], capture_output=True, text=True, check=True)
    grown = float(done.stdout.split()[-1])
    assert grown < 0.5 * held, f"{grown / 1024:.0f} MB beside {held / 1024:.0f} MB of adapters"


def test_an_embedding_of_a_native_adapter_is_written_as_one(tmp_path: Path) -> None:
    """Read without its model: PEFT would leave aside an embedding's factors under a linear layer's names."""
    import peft

    model = llama()
    adapter = rw.attach(model, {"r": 3, "targets": ["embed_tokens", "q_proj"]})
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    adapter.export(tmp_path / "a", "native")
    adapter.detach()
    source = open_folder(tmp_path / "a")
    export_merged(tmp_path / "out", merge_states([source], [1.0]), [source])
    read = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "out"))
    want = source.sites["model.embed_tokens"].dense()
    got = read.base_model.model.model.embed_tokens.get_delta_weight("default")
    assert torch.allclose(got.mT, want, atol=1e-5) and float(want.norm()) > 0
