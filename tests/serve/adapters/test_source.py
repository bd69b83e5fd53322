"""What is not whole, not of this base or not inside the roots is refused with its reason; nothing outside is ever opened."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import OptionError
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.kinds import Limits
from rankwise.serve.adapters.layout import Layout
from rankwise.serve.adapters.source import FolderSource, Sources
from rankwise.serve.types import AdapterRefused, ServeError, UnknownAdapter
from tests.models import llama, logits
from tests.serve.adapters.helpers import attached, batch, folder_of, served_logits

NATIVE, WEIGHTS, CONFIG = "rankwise.safetensors", "adapter_model.safetensors", "adapter_config.json"


def source_of(root: Path, model: Any = None, **options: Any) -> FolderSource:
    return FolderSource(root, AdapterLoader(llama() if model is None else model, **options))


# --- names ------------------------------------------------------------------------------------------------------
def test_names_are_the_folders_that_hold_adapters(tmp_path: Path) -> None:
    _, root = folder_of(tmp_path, "one", "two")
    (root / "empty").mkdir()
    (root / ".hidden").mkdir()
    (root / "README.md").write_text("no adapter")
    outside = tmp_path / "outside"
    shutil.copytree(root / "one", outside)
    (root / "leak").symlink_to(outside)
    (root / "alias").symlink_to(root / "two")
    source = source_of(root)
    assert source.names() == ["alias", "one", "two"]
    assert source.resolve("alias").digest == source.resolve("two").digest != source.resolve("one").digest


def test_unknown_names_list_the_nearest(tmp_path: Path) -> None:
    _, root = folder_of(tmp_path, "customer-a", "customer-b")
    with pytest.raises(UnknownAdapter, match="did you mean 'customer-b' or 'customer-a'") as raised:
        source_of(root).resolve("customer-bb")
    assert raised.value.status == 404 and raised.value.code == "model_not_found"


def test_a_missing_root_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is no folder"):
        source_of(tmp_path / "nowhere")


def test_two_roots_and_two_sources(tmp_path: Path) -> None:
    model, first = folder_of(tmp_path / "1", "a", "b")
    _, second = folder_of(tmp_path / "2", "b", "c", seed=7)
    adapter_loader = AdapterLoader(model)
    both = FolderSource([first, second], adapter_loader)
    assert both.names() == ["a", "b", "c"]
    assert both.resolve("b").digest == FolderSource(first, adapter_loader).resolve("b").digest
    chained = Sources(FolderSource(first, adapter_loader), FolderSource(second, adapter_loader))
    assert chained.names() == both.names() and chained.resolve("c").digest == both.resolve("c").digest
    assert chained.fetch(chained.resolve("c")).manifest.name == "c"
    with pytest.raises(UnknownAdapter):
        chained.resolve("d")


_opened: list[str] = []
_watching = threading.local()


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and getattr(_watching, "on", False):
        _opened.append(str(args[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths that this thread opens or lists, by an audit hook."""
    if not getattr(_hook, "installed", False):
        sys.addaudithook(_hook)
        _hook.installed = True  # type: ignore[attr-defined]
    _opened.clear()
    _watching.on = True
    yield _opened
    _watching.on = False


def hostile_names(n: int) -> list[str]:
    rng = random.Random(4)
    pieces = [
        "..",
        "/",
        "\\",
        "%2e%2e",
        "%2f",
        "\0",
        "a",
        "secret",
        "root",
        ".",
        "~",
        "C:",
        "con",
        "\u2024\u2024",
        "\uff0e\uff0e",
        "\u2215",
        " ",
        "\n",
        "x" * 300,
        "-",
        "$HOME",
        "file://",
    ]
    fixed = [
        "",
        ".",
        "..",
        "../secret",
        "/etc",
        "secret",
        "root/../../secret",
        "a/../../secret",
        "x" * 4096,
        "..\\secret",
        "leak",
        "leak/",
        "deep/leak",
    ]
    return fixed + ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 6))) for _ in range(n - len(fixed))]


def test_two_thousand_hostile_names_open_nothing_outside(tmp_path: Path, opened: list[str]) -> None:
    """Names and paths; the folder beside the root and a link to it are never opened, and no message says where anything lies."""
    _watching.on = False
    model, root = folder_of(tmp_path, "a")
    shutil.copytree(root / "a", tmp_path / "secret")
    (root / "leak").symlink_to(tmp_path / "secret")
    (root / "deep").mkdir()
    (root / "deep" / "leak").symlink_to(tmp_path / "secret")
    source = source_of(root, model)
    _watching.on = True
    answers = set()
    for name in hostile_names(2000):
        for ask in (source.resolve, lambda n: source.resolve_path(n, "x"), lambda n: source.resolve_path(f"{root}/{n}", "x")):
            try:
                assert ask(name).digest == source.resolve("a").digest, f"{name!r} led elsewhere"
            except ServeError as error:
                answers.add(type(error).__name__)
                assert str(tmp_path) not in str(error)
    outside = [p for p in opened if "secret" in p or p.startswith("/etc")]
    assert not outside and answers == {"UnknownAdapter", "AdapterRefused"}
    for name in ("", "..", "../secret", "/etc", "a/../../secret", "x" * 4096, "a\0"):
        with pytest.raises(UnknownAdapter, match="no valid adapter name"):
            source.resolve(name)
    for path in (str(tmp_path / "secret"), "../secret", "leak"):
        with pytest.raises(AdapterRefused, match="is no folder inside|lies outside"):
            source.resolve_path(path, "x")


def test_a_link_swapped_between_check_and_use_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is exchanged for a link out of the root after it was found to be inside."""
    model, root = folder_of(tmp_path, "a")
    shutil.copytree(root / "a", tmp_path / "secret")
    source = source_of(root, model)
    check = source._inside

    def swap(folder: Path) -> Path | None:
        real = check(folder)
        shutil.rmtree(root / "a")
        (root / "a").symlink_to(tmp_path / "secret")
        return real

    monkeypatch.setattr(source, "_inside", swap)
    with pytest.raises(AdapterRefused, match="cannot be served"):
        source.resolve("a")


# --- content ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["adapter_model.bin", "adapter.pt", "lora.ckpt", "lora.safetensors", "lora.pkl"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    _, root = folder_of(tmp_path, "good")
    (root / "bad").mkdir()
    if suffix.endswith(".pt"):
        with zipfile.ZipFile(root / "bad" / suffix, "w") as z:
            z.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    else:
        (root / "bad" / suffix).write_bytes(pickle.dumps(Bomb()))
    if suffix == "adapter_model.bin":
        (root / "bad" / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterRefused, match="pickled file|can run code"):
        source_of(root).resolve("bad")
    assert not (tmp_path / "exploded").exists()


def test_another_base_is_refused_and_told_what_differs(tmp_path: Path) -> None:
    model = llama(hidden=64)
    adapter = attached(model, {"r": 2})
    adapter.save(tmp_path / "native")
    adapter.export(tmp_path / "peft")
    attached(llama(seed=5), {"r": 2}).save(tmp_path / "other-values")
    from tests.models import FAMILIES

    attached(FAMILIES["gpt2"][0](), {"r": 2}).export(tmp_path / "architecture")
    attached(FAMILIES["qwen3"][0](), {"r": 2}).save(tmp_path / "class")
    source = source_of(tmp_path)
    for name, why in {
        "native": "another base: .*64",
        "peft": "with this config takes 2×",
        "other-values": "another base: content: the weights' values differ",
        "architecture": "not in this model",
        "class": "the class is 'LlamaForCausalLM', not 'Qwen3ForCausalLM'",
    }.items():
        with pytest.raises(AdapterRefused, match=why) as raised:
            source.resolve(name)
        assert raised.value.status == 400 and name in str(raised.value)
    assert source_of(tmp_path, check_base=False).resolve("other-values").rank == 2


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    import transformers as T

    wide = T.LlamaForCausalLM(T.LlamaConfig(**{**llama().config.to_dict(), "vocab_size": 80}))
    attached(wide, {"r": 2, "targets": ["q_proj"], "modules_to_save": ["lm_head"]}).export(tmp_path / "a")
    with pytest.raises(AdapterRefused, match="lm_head"):
        source_of(tmp_path).resolve("a")


def rewrite(file: Path, change: Any, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with its tensors changed, without any stamp of ours."""
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(file)), file, metadata)


def test_every_tensor_is_mapped_or_an_error(tmp_path: Path) -> None:
    model = llama()
    adapter = attached(model, {"r": 2, "targets": ["q_proj"]})
    for name in ("nan", "extra", "missing", "foreign", "shape"):
        adapter.export(tmp_path / name)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(tmp_path / "nan" / WEIGHTS, lambda t: {**t, key: t[key].index_fill(1, torch.tensor(3), float("nan"))})
    rewrite(tmp_path / "extra" / WEIGHTS, lambda t: {**t, "base_model.model.model.extra.weight": torch.ones(2)})
    rewrite(tmp_path / "missing" / WEIGHTS, lambda t: {k: v for k, v in t.items() if k != key})
    rewrite(tmp_path / "foreign" / WEIGHTS, lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()})
    rewrite(tmp_path / "shape" / WEIGHTS, lambda t: {**t, key: t[key][:1]})
    source = source_of(tmp_path)
    for name, why in {
        "nan": "not finite",
        "extra": "belongs to nothing",
        "missing": "expected",
        "foreign": "not in this model",
        "shape": "1×32",
    }.items():
        with pytest.raises(AdapterRefused, match=why):
            source.resolve(name)


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_a_native_file_of_numbers_that_are_not(form: str, tmp_path: Path) -> None:
    """Written with a right digest, as our own save would never."""
    from rankwise.store.native import load_native, save_native

    attached(llama(), {"form": form, "r": 1, "targets": ["q_proj"]}).save(tmp_path / "a")
    tensors, head = load_native(tmp_path / "a")
    key = sorted(tensors)[-1]
    save_native(tmp_path / "a", {**tensors, key: torch.full_like(tensors[key], float("inf"))}, head)
    with pytest.raises(AdapterRefused, match="not finite"):
        source_of(tmp_path).resolve("a")


def test_a_scale_that_overflows_is_refused(tmp_path: Path) -> None:
    adapter = attached(llama(), {"r": 1, "targets": ["q_proj"]})
    adapter.export(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    rewrite(tmp_path / "a" / WEIGHTS, lambda t: {k: v * 1e12 for k, v in t.items()})
    (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, "lora_alpha": 1e29}))
    with pytest.raises(AdapterRefused, match="once its scale is applied"):
        source_of(tmp_path).resolve("a")


@pytest.mark.parametrize("name", [NATIVE, WEIGHTS])
def test_flipped_bits_and_cut_files(name: str, tmp_path: Path) -> None:
    """A flipped bit in our files, or a cut one: refused, unless it is in a remark and every number is as it was."""
    adapter = attached(llama(), {"r": 1, "targets": ["q_proj"]})
    adapter.save(tmp_path / "a") if name == NATIVE else adapter.export(tmp_path / "a")
    sound = (tmp_path / "a" / name).read_bytes()
    good = source_of(tmp_path).resolve("a").digest
    rng = random.Random(1)
    source = source_of(tmp_path)
    refused = 0
    for _ in range(60):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "a" / name).write_bytes(bytes(data))
        try:
            assert source.resolve("a").digest == good
        except AdapterRefused:
            refused += 1
    assert refused == 60 if name == NATIVE else refused > 50
    for n in [0, 7, 8, 100, len(sound) - 1, *(rng.randrange(len(sound)) for _ in range(20))]:
        (tmp_path / "a" / name).write_bytes(sound[:n])
        with pytest.raises(AdapterRefused):
            source.resolve("a")
    (tmp_path / "a" / name).write_bytes(sound)
    assert source.resolve("a").digest == good, "a sound file is served again"


def test_limits_on_both_sides(tmp_path: Path) -> None:
    model = llama()
    attached(model, {"r": 8}).save(tmp_path / "a")
    exact = source_of(tmp_path).resolve("a")
    assert (exact.rank, exact.pages) == (8, 1)
    assert source_of(tmp_path, limits=Limits(rank=8, nbytes=exact.nbytes)).resolve("a") == exact
    with pytest.raises(AdapterRefused, match="rank 8 at its widest module; this server takes at most 7"):
        source_of(tmp_path, limits=Limits(rank=7)).resolve("a")
    with pytest.raises(AdapterRefused, match="bytes; this server takes at most"):
        source_of(tmp_path, limits=Limits(nbytes=exact.nbytes - 1)).resolve("a")


def test_a_file_far_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a")
    monkeypatch.setattr("rankwise.serve.adapters.kinds.HEADERS", 0)
    monkeypatch.setattr("rankwise.serve.adapters.adapter_loader.read_adapter", lambda *a, **k: pytest.fail("it was read"))
    with pytest.raises(AdapterRefused, match="reads at most 2,000"):
        source_of(root, model, limits=Limits(nbytes=1000)).resolve("a")


# --- versions ---------------------------------------------------------------------------------------------------
def test_a_digest_is_of_content_config_and_scale(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a")
    shutil.copytree(root / "a", root / "copy")
    attached(llama(), {"r": 4, "alpha": 8}, seed=0).save(root / "scaled")
    rw.load(model, root / "a", name="another name").save(root / "renamed")
    adapter = rw.adapters(model)["another name"]
    adapter.export(root / "p1")
    adapter.export(root / "p2")
    config = json.loads((root / "p2" / CONFIG).read_text())
    (root / "p2" / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere"}))
    source = source_of(root)
    digests = {n: source.resolve(n).digest for n in source.names()}
    assert digests["a"] == digests["copy"] == digests["renamed"]
    assert digests["p1"] == digests["p2"], "a moved base is no other adapter"
    assert len({digests["a"], digests["scaled"], digests["p1"]}) == 3
    assert source.resolve("copy").name == "copy"


def test_a_change_on_disk_is_noticed(tmp_path: Path) -> None:
    """After resolving, before fetching, and in between: never the new numbers under the old digest, nor the old under the new."""
    model, root = folder_of(tmp_path, "a")
    source = source_of(root, model, keep=0)
    first = source.resolve("a")
    old = source.fetch(first)
    attached(llama(), {"r": 4}, seed=50).save(root / "a")
    with pytest.raises(AdapterRefused, match="changed on disk since it was resolved"):
        source.fetch(first)
    second = source.resolve("a")
    new = source.fetch(second)
    assert second.digest != first.digest and new.manifest.digest == second.digest
    assert not torch.equal(
        served_logits(model, source.adapter_loader.layout, old, batch(model)),
        served_logits(model, source.adapter_loader.layout, new, batch(model)),
    )


def test_a_version_that_was_seen_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a")
    source = source_of(root, model)
    first = source.resolve("a")
    monkeypatch.setattr("rankwise.serve.adapters.adapter_loader.read_adapter", lambda *a, **k: pytest.fail("read again"))
    assert source.resolve("a") == first and source.fetch(first).manifest.digest == first.digest


def test_coded_files_are_decoded_on_load(tmp_path: Path) -> None:

    model = llama()
    adapter = attached(model, {"r": 4})
    adapter.save(tmp_path / "lossless", codec="lossless")
    adapter.save(tmp_path / "small", codec={"name": "intk", "k": 8})
    adapter.save(tmp_path / "difference", codec="delta", reference=tmp_path / "lossless")
    want = logits(model, batch(model))
    fresh = llama()
    source = source_of(tmp_path, fresh)
    served = source.fetch(source.resolve("lossless"))
    assert torch.allclose(served_logits(fresh, source.adapter_loader.layout, served, batch(fresh)), want, atol=1e-5)
    rw.load(model, tmp_path / "small", name="coded")
    served = source.fetch(source.resolve("small"))
    assert torch.allclose(
        served_logits(fresh, source.adapter_loader.layout, served, batch(fresh)), logits(model, batch(model)), atol=1e-5
    )
    with pytest.raises(AdapterRefused, match="difference from another adapter"):
        source.resolve("difference")


def test_gguf_files_are_served(tmp_path: Path) -> None:
    model = llama()
    adapter = attached(model, {"r": 4, "alpha": 8})
    adapter.export(tmp_path / "g" / "lora.gguf", format="gguf", dtype="f32")
    want = logits(model, batch(model))
    fresh = llama()
    source = source_of(tmp_path, fresh)
    served = source.fetch(source.resolve("g"))
    assert served.manifest.meta["format"] == "foreign"
    assert torch.allclose(served_logits(fresh, source.adapter_loader.layout, served, batch(fresh)), want, atol=1e-5)


def test_one_read_for_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.serve.adapters import adapter_loader as module

    model, root = folder_of(tmp_path, "a", "b")
    source = source_of(root, model)
    reads: list[str] = []
    whole = module.read_adapter

    def slow(at: int, folder: Path, name: str, *more: Any, **options: Any) -> Any:
        reads.append(name)
        time.sleep(0.05)  # all sixteen are here before the first is done
        return whole(at, folder, name, *more, **options)

    monkeypatch.setattr(module, "read_adapter", slow)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: found.append(source.resolve(n))) for n in ["a", "b"] * 8]
    [t.start() for t in threads], [t.join() for t in threads]
    assert sorted(reads) == ["a", "b"] and len({m.digest for m in found}) == 2 and len(found) == 16
    assert not source.adapter_loader._locks._all, "a lock was left behind"


# --- layout -----------------------------------------------------------------------------------------------------
def test_groups_and_spots() -> None:
    from tests.models import FAMILIES

    layout = Layout(llama())
    assert [g.name for g in layout.groups[:4]] == [
        f"model.layers.0.{n}" for n in ("self_attn#0:32", "self_attn.o_proj", "mlp#1:32", "mlp.down_proj")
    ]
    qkv = layout.groups[0]
    assert qkv.outs == (32, 16, 16) and [m.rpartition(".")[2] for m in qkv.modules] == ["q_proj", "k_proj", "v_proj"]
    assert "lm_head" not in layout.spots and "lm_head" in layout.called and "model.embed_tokens" in layout.called
    assert Layout(llama(), head=True).spots["lm_head"].group == "lm_head"
    phi = Layout(FAMILIES["phi3"][0]())
    v = phi.spots["model.layers.0.self_attn.qkv_proj[v]"]
    assert (v.group, v.j, v.out) == ("model.layers.0.self_attn.qkv_proj", 0, 64) and v.rows.tolist() == list(range(48, 64))  # type: ignore[union-attr]


def test_an_adapted_model_is_no_base(tmp_path: Path) -> None:
    model = llama()
    rw.attach(model, {"r": 2})
    with pytest.raises(OptionError, match="detach"):
        AdapterLoader(model)
