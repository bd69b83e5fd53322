"""Names lead to digests; digests are read once, shared, pinned, evicted by age and cost, mixed, and survive a crash."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import ArtefactError, OptionError
from rankwise.serve.adapters.adapter_loader import AdapterLoader
from rankwise.serve.adapters.cache import AdapterCache
from rankwise.serve.adapters.kinds import Limits
from rankwise.serve.adapters.memory import MemorySource
from rankwise.serve.adapters.registry import Registry
from rankwise.serve.adapters.source import FolderSource, Sources
from rankwise.serve.types import AdapterRefused, Overloaded, UnknownAdapter
from tests.models import llama, logits
from tests.serve.adapters.helpers import attached, batch, cache_of, fetched, folder_of, served_logits


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# --- names ------------------------------------------------------------------------------------------------------
def test_two_names_of_one_content_share_one_copy(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a")
    shutil.copytree(root / "a", root / "b")
    cache = cache_of(model, root)
    a, b = fetched(cache, "a"), fetched(cache, "b")
    assert a is b and cache.nbytes == a.manifest.nbytes and cache.tally.loads == {("native", "ok"): 1}
    assert [(n.name, n.manifest.name, n.tier) for n in cache.list()] == [("a", "a", "host"), ("b", "b", "host")]  # type: ignore[union-attr]


def test_a_reload_changes_where_a_name_leads_and_nothing_else(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a", "v1", "v2")
    cache = cache_of(model, root)
    first = cache.load("live", "v1")
    cache.acquire(first.digest)
    held = cache.get(first.digest)
    second = cache.load("live", "v2")
    assert first.digest != second.digest == cache.resolve("live").digest and second.name == "live"
    assert cache.get(first.digest) is held, "a running request keeps its numbers"
    assert cache.fetch(first.digest).result() is held
    cache.release(first.digest)
    assert cache.get(first.digest) is None and cache.get(second.digest) is not None


def test_unload_waits_for_pins_and_reports(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a", "b")
    cache = cache_of(model, root)
    digest = cache.load("mine", "a").digest
    cache.acquire(digest), cache.acquire(digest)
    assert cache.unload("mine", wait=0.01) == 2 and cache.get(digest) is not None
    with pytest.raises(UnknownAdapter):
        cache.resolve("mine")
    threading.Timer(0.05, lambda: (cache.release(digest), cache.release(digest))).start()
    cache.load("mine", "a")
    assert cache.unload("mine", wait=5) == 0
    assert cache.get(digest) is None and cache.nbytes == 0
    with pytest.raises(OptionError, match="more often than it was acquired"):
        cache.release(digest)
    with pytest.raises(UnknownAdapter, match="no valid adapter name|known"):
        cache.unload("never")


def test_nobody_sees_half_of_a_change_of_names(tmp_path: Path) -> None:
    """A name that was loaded over a folder's and is taken away leads there or nowhere, never to the folder."""
    model, root = folder_of(tmp_path, "a", "b")
    cache = cache_of(model, root)
    folders, loaded = cache.resolve("a").digest, cache.load("a", "b").digest
    seen: list[str] = []

    class Watched(Registry):
        """Whoever looks at any moment of a change."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            with contextlib.suppress(UnknownAdapter):
                seen.append(cache.resolve("a").digest)

    cache._registry.__class__ = Watched
    cache.unload("a")
    with pytest.raises(UnknownAdapter):
        cache.resolve("a")
    assert cache.load("a", "b").digest == loaded
    assert seen and {*seen} <= {loaded} and loaded != folders


def test_an_unloaded_folder_is_unknown_until_it_is_loaded_again(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a", "b")
    cache = cache_of(model, root)
    cache.unload("a")
    assert cache.names() == ["b"]
    with pytest.raises(UnknownAdapter):
        cache.resolve("a")
    cache.load("a", "a")
    assert cache.names() == ["a", "b"] and cache.resolve("a").rank == 4


def test_a_refused_load_leaves_the_name_as_it_was(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a", "bad")
    data = bytearray((root / "bad" / "rankwise.safetensors").read_bytes())
    data[-5] ^= 1
    (root / "bad" / "rankwise.safetensors").write_bytes(bytes(data))
    cache = cache_of(model, root, registry=tmp_path / "names.json")
    digest = cache.load("live", "a").digest
    for path in ("bad", "../root/../a", "nowhere", str(tmp_path)):
        with pytest.raises(AdapterRefused):
            cache.load("live", path)
    with pytest.raises(AdapterRefused, match="cannot be called '../x'"):
        cache.load("../x", "a")
    assert cache.resolve("live").digest == digest
    assert json.loads((tmp_path / "names.json").read_text())["names"] == {"live": "a"}


# --- budget -----------------------------------------------------------------------------------------------------
def test_budget_evicts_what_was_longest_out_of_use_for_its_cost(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(4)]
    model, root = folder_of(tmp_path, *names)
    clock = Clock()
    cache = cache_of(model, root, nbytes=1, clock=clock)
    size = cache.resolve("a0").nbytes
    cache._host.budget = 2 * size + 10
    d = {n: cache.resolve(n).digest for n in names}
    for n in ("a0", "a1"):
        clock.now += 1
        cache.fetch(d[n]).result()
    clock.now += 1
    cache.get(d["a0"])
    clock.now += 1
    cache.fetch(d["a2"]).result()
    assert [n for n in names if cache.get(d[n])] == ["a0", "a2"] and cache.tally.evictions == {"host": 1}
    cache._host.kept[d["a0"]].use.cost *= 1000  # dear to bring back: stays though older
    clock.now += 5
    cache.get(d["a2"])
    clock.now += 1
    cache.fetch(d["a3"]).result()
    assert [n for n in names if cache.get(d[n])] == ["a0", "a3"] and cache.nbytes <= cache._host.budget


def test_pins_hold_and_what_does_not_fit_is_turned_away(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a", "b", "c")
    cache = cache_of(model, root)
    a, b = cache.resolve("a"), cache.resolve("b")
    cache._host.budget = a.nbytes + 1
    cache.acquire(a.digest)
    cache.fetch(a.digest).result()
    with pytest.raises(Overloaded, match="leave no room") as raised:
        cache.fetch(b.digest).result()
    assert raised.value.status == 429 and cache.get(a.digest) is not None
    cache.release(a.digest)
    assert cache.fetch(b.digest).result().manifest.digest == b.digest and cache.get(a.digest) is None
    cache._host.budget = 10
    with pytest.raises(AdapterRefused, match="the host tier holds 10"):
        cache.fetch(a.digest).result()
    assert cache.tally.loads == {("native", "ok"): 2, ("native", "error"): 1, ("native", "refused"): 1}


def test_fetch_does_not_wait_and_loads_a_digest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a")
    cache = cache_of(model, root)
    digest = cache.resolve("a").digest
    gate, calls, load = threading.Event(), [], cache.source.fetch
    monkeypatch.setattr(cache.source, "fetch", lambda m: (calls.append(m), gate.wait(10), load(m))[2])
    futures = [cache.fetch(digest) for _ in range(8)]
    assert not futures[0].done() and cache.get(digest) is None
    gate.set()
    assert len({id(f.result(10)) for f in futures}) == 1 and len(calls) == 1
    with pytest.raises(UnknownAdapter, match="No adapter with the digest"):
        cache.fetch("0" * 64)


def test_an_adapter_that_fails_to_load_harms_nobody(tmp_path: Path) -> None:
    """Cut, emptied, gone, swapped for another: refused each time, the others go on, and what was put back is served again."""
    model, root = folder_of(tmp_path, "good", "bad", "other", r=1, targets=["q_proj"])
    cache = cache_of(model, root, adapter_loader={"keep": 0})
    file = root / "bad" / "rankwise.safetensors"
    sound, digest = file.read_bytes(), cache.resolve("bad").digest
    kept, size = fetched(cache, "good"), cache.nbytes
    other = (root / "other" / file.name).read_bytes()
    for data in [b"", None, other, *(sound[: i * 20] for i in range(1, 38))]:
        file.unlink() if data is None else file.write_bytes(data)
        with pytest.raises(AdapterRefused):
            cache.fetch(digest).result(20)
        assert cache.get(kept.manifest.digest) is kept and cache.nbytes == size
        file.write_bytes(sound)
    assert cache.fetch(digest).result(20).manifest.digest == digest
    assert cache.tally.loads == {("native", "ok"): 2, ("native", "refused"): 40}


def test_a_listener_that_fails_keeps_nobody_from_an_adapter(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a")
    cache, told = cache_of(model, root), []
    cache.on_load = lambda *a: (told.append(a), 1 / 0)  # type: ignore[assignment,return-value,func-returns-value]
    assert fetched(cache, "a").manifest.name == "a"
    cache.close()
    assert [t[:2] for t in told] == [("native", "ok")]


def test_a_thread_that_cannot_be_had_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a")
    cache = cache_of(model, root)
    digest = cache.resolve("a").digest
    with monkeypatch.context() as m:
        m.setattr(cache._threads, "submit", lambda *a: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            cache.fetch(digest)
    assert cache.fetch(digest).result(20).manifest.digest == digest


# --- mixes ------------------------------------------------------------------------------------------------------
def test_a_mix_is_the_weighted_sum(tmp_path: Path) -> None:
    """LoRA, DoRA and a routed mixture together: logits equal those of the attached adapters under a view with these strengths."""
    recipes = {
        "lora": {"r": 3},
        "dora": {"form": "dora", "r": 2},
        "routed": {"r": 8, "router": {"name": "smora", "k": 4}},
        "own": {"r": 2, "modules_to_save": ["lm_head"]},
    }
    both = llama()
    for i, (name, recipe) in enumerate(recipes.items()):
        attached(llama(), recipe, seed=i).save(tmp_path / "root" / name)
        rw.load(both, tmp_path / "root" / name, name=name)
    fresh = llama()
    cache = cache_of(fresh, tmp_path / "root")
    for weights in ({"lora": 0.5, "dora": -1.25}, {"routed": 0.3, "lora": 1.0, "own": 0.7}):
        served = cache.fetch(cache.mix(list(weights.items())).digest).result()
        with rw.view(both, weights):
            want = logits(both, batch(both))
        got = served_logits(fresh, cache.layout, served, batch(fresh))
        assert torch.allclose(got, want, atol=1e-5), (got - want).abs().max()
        assert served.manifest.rank == sum({"lora": 3, "dora": 2, "routed": 0, "own": 2}[n] for n in weights)


def test_the_digest_of_a_mix_is_of_digests_and_weights(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a", "b")
    shutil.copytree(root / "a", root / "twin")
    cache = cache_of(model, root)
    one = cache.mix([("a", 0.5), ("b", 0.25)])
    assert one.digest == cache.mix([("b", 0.25), ("twin", 0.5)]).digest == cache.mix([("a", 0.2), ("b", 0.25), ("a", 0.3)]).digest
    assert (
        len({one.digest, cache.mix([("a", 0.25), ("b", 0.5)]).digest, cache.mix([("a", 0.5)]).digest, cache.resolve("a").digest})
        == 4
    )
    assert cache.mix([("a", 1.0)]).digest == cache.resolve("a").digest, "an adapter at weight 1 is itself"
    assert one.parts == tuple(sorted(one.parts)) and one.rank == 8 and one.pages == 1


def test_mixes_that_cannot_be(tmp_path: Path) -> None:
    model = llama()
    for name in ("h1", "h2"):
        attached(llama(), {"r": 2, "modules_to_save": ["lm_head"]}, seed=len(name)).save(tmp_path / name)
    attached(llama(), {"r": 2}).save(tmp_path / "a")
    cache = cache_of(model, tmp_path, limits=Limits(rank=3))
    for parts, why in (
        ([], "at least one"), ([("a", float("nan"))], "finite number"), ([("a", True)], "finite number"), ([("a", "1")], "finite number"),
        ([("a", 1), ("a", -1)], "come to 0"), ([("a", 1), ("h1", 1)], "takes at most 3"),
    ):  # fmt: skip
        with pytest.raises(AdapterRefused, match=why):
            cache.mix(parts)  # type: ignore[arg-type]
    attached(llama(), {"r": 1, "modules_to_save": ["lm_head"]}, seed=9).save(tmp_path / "h3")
    with pytest.raises(AdapterRefused, match="both have a 'lm_head.weight' of their own"):
        cache.mix([("h1", 0.5), ("h3", 0.5)])
    with pytest.raises(UnknownAdapter):
        cache.mix([("a", 0.5), ("nobody", 0.5)])


def test_made_up_mixes_are_not_remembered_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a", "b", r=1, targets=["q_proj"])
    monkeypatch.setattr("rankwise.serve.adapters.cache.MANIFESTS", 50)
    cache = cache_of(model, root)
    first, used = cache.mix([("a", 0.5), ("b", 2.0)]), cache.mix([("a", 0.25), ("b", 2.0)])
    cache.acquire(used.digest)
    last = [cache.mix([("a", 1 + i / 7), ("b", 0.1)]) for i in range(500)][-40:]
    assert len(cache._known) <= 101
    for m in (used, *last):
        assert cache.fetch(m.digest).result().manifest.digest == m.digest
    with pytest.raises(UnknownAdapter):
        cache.fetch(first.digest)


# --- many threads -----------------------------------------------------------------------------------------------
def test_sixteen_threads_load_and_unload_one_name(tmp_path: Path) -> None:
    """Whoever pins a version gets that version's numbers, whatever the others do; nothing is left over."""
    model, root = folder_of(tmp_path, "v0", "v1", "v2", "v3")
    cache = cache_of(model, root, registry=tmp_path / "names.json", workers=3)
    truth = {cache.resolve(f"v{i}").digest: fetched(cache, f"v{i}").pairs["model.layers.0.mlp.down_proj"][0] for i in range(4)}
    faults: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for i in range(12):
                if (i + k) % 5 == 4:
                    with contextlib.suppress(UnknownAdapter):
                        cache.unload("live")
                    continue
                manifest = cache.load("live", f"v{(i * 7 + k) % 4}")
                cache.acquire(manifest.digest)
                served = cache.fetch(manifest.digest).result(30)
                A, B = served.pairs["model.layers.0.mlp.down_proj"][0]  # type: ignore[misc]
                want = truth[manifest.digest]
                assert want is not None and torch.equal(A, want[0]) and torch.equal(B, want[1])
                assert served.manifest.digest == manifest.digest
                cache.release(manifest.digest)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(16)]
    [t.start() for t in threads], [t.join(60) for t in threads]
    assert not faults and not any(t.is_alive() for t in threads)
    assert not cache._pins and not cache._loading
    assert sorted(cache.names())[-4:] == ["v0", "v1", "v2", "v3"]
    cache.close()


def test_ten_thousand_steps_of_churn_never_serve_another_adapter(tmp_path: Path) -> None:
    """Random loads, reloads, unloads, pins and evictions under a small budget: the numbers always fit the digest."""
    import random

    names = [f"v{i}" for i in range(6)]
    model, root = folder_of(tmp_path, *names, targets=["q_proj"], r=1)
    cache = cache_of(model, root, workers=1)
    size = max(cache.resolve(n).nbytes for n in names)
    truth = {cache.resolve(n).digest: cache.source.fetch(cache.resolve(n)).pairs for n in names}
    cache._host.budget = 3 * size + 1
    rng, held, module = random.Random(2), [], "model.layers.0.self_attn#0:32"
    for _ in range(10_000):
        what = rng.random()
        if what < 0.05 and len(held) < 3:
            digest = cache.load(rng.choice(["x", "y"]), rng.choice(names)).digest
            cache.acquire(digest), held.append(digest)
        elif what < 0.1 and held:
            cache.release(held.pop(rng.randrange(len(held))))
        elif what < 0.12:
            with contextlib.suppress(UnknownAdapter):
                cache.unload(rng.choice(["x", "y"]))
        else:
            digest = rng.choice(list(truth))
            served = cache.get(digest)
            if served is None and what > 0.97:
                try:
                    served = cache.fetch(digest).result(20)
                except Overloaded:
                    assert len(set(held)) == 3
            if served is not None:
                assert served.manifest.digest == digest
                assert torch.equal(served.pairs[module][0][0], truth[digest][module][0][0])  # type: ignore[index]
        assert cache.nbytes <= cache._host.budget and all(cache.get(d) is not None for d in held)
    assert cache.tally.evictions["host"] > 20


# --- restart ----------------------------------------------------------------------------------------------------
def _load_for_ever(model: Any, root: Path, registry: Path, out: int) -> None:
    """In a child process: load and unload names until killed, telling after each step."""
    cache = cache_of(model, root, registry=registry)
    i = 0
    while True:
        i += 1
        cache.load(f"n{i % 5}", f"v{i % 3}")
        if i % 7 == 0:
            cache.unload(f"n{i % 5}")
        os.write(out, b".")


def test_the_registry_survives_kills(tmp_path: Path) -> None:
    """Killed in the middle of loading and unloading; the next start has the names, each leading to its adapter."""
    model, root = folder_of(tmp_path, "v0", "v1", "v2", r=1, targets=["q_proj"])
    registry = tmp_path / "state" / "names.json"
    for kill in range(6):
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                _load_for_ever(model, root, registry, tell)
            finally:
                os._exit(1)
        os.close(tell)
        steps = sum(len(os.read(told, 1)) for _ in range(8 + kill))
        time.sleep(0.0007 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        assert steps == 8 + kill, "the child died by itself"
        said = json.loads(registry.read_text())
        cache = cache_of(model, root, registry=registry)
        assert set(said["names"]) - {"last"} <= {f"n{i}" for i in range(5)} and len(said["names"]) >= 3
        for name, path in said["names"].items():
            assert cache.resolve(name).digest == cache.resolve(path).digest
        cache.load("last", "v0")
        assert [p.name for p in registry.parent.iterdir()] == ["names.json"], "a temporary was left behind"


def test_a_damaged_registry_is_not_an_empty_one(tmp_path: Path) -> None:
    model, root = folder_of(tmp_path, "a")
    for text in ('{"version": 2}', "{", '{"names": {"../x": "a"}}', '{"names": {"x": 3}}'):
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(ArtefactError, match="registry of loaded adapters"):
            cache_of(model, root, registry=tmp_path / "names.json")


def test_a_registry_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, root = folder_of(tmp_path, "a")
    cache = cache_of(model, root, registry=tmp_path / "names.json")

    def full(*a: Any, **k: Any) -> None:
        raise ArtefactError("names.json could not be written: no space left.")

    monkeypatch.setattr("rankwise.serve.adapters.registry.replace_file", full)
    with pytest.raises(ArtefactError, match="no space"):
        cache.load("x", "a")
    assert cache.names() == ["a"]
    with pytest.raises(UnknownAdapter):
        cache.resolve("x")


# --- from training ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "recipe",
    [
        {"r": 3},
        {"form": "dora", "r": 2},
        {"r": 8, "router": {"name": "smora", "k": 4}},
        {"form": "mos", "r": 3},
        {"form": "dense", "targets": ["q_proj"]},
    ],
    ids=["lora", "dora", "smora", "mos", "dense"],
)
def test_published_adapters_are_copies_and_versions(recipe: dict[str, Any], tmp_path: Path) -> None:
    training, fresh = llama(), llama()
    adapter = attached(training, recipe)
    adapter_loader = AdapterLoader(fresh)
    (tmp_path / "root").mkdir()
    memory = MemorySource(adapter_loader.layout)
    cache = AdapterCache(Sources(memory, FolderSource(tmp_path / "root", adapter_loader)), adapter_loader.layout)
    first = memory.publish("job", adapter)
    want = logits(training, batch(training))
    cache.acquire(cache.resolve("job").digest)
    old = fetched(cache, "job")
    with torch.no_grad():
        [p.mul_(1.5) for p in adapter.trainable_parameters()]
    second = memory.publish("job", adapter)
    assert first.digest != second.digest == cache.resolve("job").digest
    new = fetched(cache, "job")
    assert torch.allclose(served_logits(fresh, adapter_loader.layout, old, batch(fresh)), want, atol=1e-5), (
        "training moved what was published"
    )
    assert torch.allclose(
        served_logits(fresh, adapter_loader.layout, new, batch(fresh)), logits(training, batch(training)), atol=1e-5
    )
    assert cache.get(first.digest) is old
    with pytest.raises(AdapterRefused, match="cannot be called"):
        memory.publish("../x", adapter)
    memory.withdraw("job")
    with pytest.raises(UnknownAdapter):
        cache.resolve("job")
    with pytest.raises(AdapterRefused, match="takes no paths|no source|is no folder"):
        cache.load("job", "job")
