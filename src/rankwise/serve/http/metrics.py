"""What a server tells Prometheus: counters, gauges and histograms with the prefix ``rankwise_``.

Adapters are labels only for those with the most traffic, all others together are "other", so thousands of adapters
do not become thousands of series.  A series that loses its label ends; if it comes back it begins at 0, which
``rate()`` takes as a restart.  Sums over all labels therefore may fall when a label changes hands; without that they
equal what was served.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankwise.errors import need

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as error:  # pragma: no cover
    raise need("prometheus_client", "serve", "Metrics") from error

if TYPE_CHECKING:
    from rankwise.serve.adapters.cache import AdapterCache, Listed
    from rankwise.serve.engine.engine import Engine
    from rankwise.serve.engine.options import EngineStats

log = logging.getLogger("rankwise.serve")

OTHER = "other"
NAME = re.compile(r"[a-z][a-z0-9_]*")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)


class Labels:
    """The names that have a label: the ``limit`` busiest, found by counts that are halved as they grow.

    A name takes the place of the least busy labelled one only with twice its count, so labels do not flutter.
    """

    def __init__(self, limit: int, dropped: Callable[[str], None]):
        self.limit, self._dropped = limit, dropped
        self._counts: dict[str, int] = {}
        self._shown: set[str] = set()

    def of(self, name: str) -> str:
        """The label under which one more request of ``name`` is counted."""
        n = self._counts[name] = self._counts.get(name, 0) + 1
        if len(self._counts) > 16 * self.limit:
            self._forget()
        if name in self._shown:
            return name
        if len(self._shown) >= self.limit:
            weakest = min(self._shown, key=lambda s: self._counts.get(s, 0))
            if n <= 2 * self._counts.get(weakest, 0):
                return OTHER
            self._shown.discard(weakest)
            self._dropped(weakest)
        self._shown.add(name)
        return name

    def current(self, name: str) -> str:
        """The label of ``name`` as it is, without counting."""
        return name if name in self._shown else OTHER

    def _forget(self) -> None:
        self._counts = {k: v // 2 for k, v in self._counts.items() if v > 1 or k in self._shown}


class Metrics:
    """One server's numbers; ``observe`` is the engine's observer."""

    def __init__(self, model: str, labels: int = 50, aliases: bool = False):
        self.model, self.aliases = model, aliases
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._labels = Labels(labels, self._drop)
        self._made: dict[str, Any] = {}
        self._sources: tuple[Callable[[], EngineStats], AdapterCache] | None = None
        counter = lambda name, text, *more: Counter(f"rankwise_{name}", text, ("model", "adapter", *more), registry=self.registry)
        self._requests = counter("requests", "Sequences that ended, by how.", "outcome")
        self._prompt = counter("prompt_tokens", "Tokens of prompts, counted once for each sequence.")
        self._generated = counter("generated_tokens", "Tokens made.")
        self._own = {"requests_total", "prompt_tokens_total", "generated_tokens_total", "adapter_resident", "adapter_bytes"}

    def watch(self, engine: Engine, cache: AdapterCache) -> None:
        """Take what they report, and read the gauges from them when metrics are asked for."""
        engine.observer, cache.on_load = self.observe, self._loaded
        self._sources = (engine.stats, cache)
        self.registry.register(self)  # type: ignore[arg-type]

    def _loaded(self, source: str, outcome: str, seconds: float) -> None:
        self.observe("adapter_loads_total", 1.0, {"from": source, "outcome": outcome})
        self.observe("adapter_load_seconds", seconds, {"from": source})

    def served(self, adapter: str, outcome: str, prompt: int, generated: int) -> None:
        """One sequence ended.

        Args:
            adapter: its name, "" for the base, "mix" for a mix.
            outcome: how it ended.
            prompt, generated: tokens.
        """
        with self._lock:
            label = self._labels.of(adapter) if adapter else ""
            self._requests.labels(self.model, label, outcome).inc()
            self._prompt.labels(self.model, label).inc(prompt)
            self._generated.labels(self.model, label).inc(generated)

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """The engine's observer: names ending in ``_total`` count up, all others are distributions.  Never raises."""
        try:
            self._metric(name, tuple(sorted(labels)), value, labels)
        except ValueError as error:
            log.error("metric %s is not kept: %s", name, error)

    def _metric(self, name: str, keys: tuple[str, ...], value: float, labels: Mapping[str, str]) -> None:
        if name in self._own:
            raise ValueError("the HTTP side counts it")
        metric = self._made.get(name)
        if metric is None:
            if not NAME.fullmatch(name):
                raise ValueError("a name has small letters, digits and _ only")
            with self._lock:
                metric = self._made.get(name) or self._new(name, keys)
                self._made[name] = metric
        if metric._labelnames[1:] != keys:
            raise ValueError(f"its labels were {metric._labelnames[1:]} before and are {keys} now")
        named = metric.labels(self.model, *(labels[k] for k in keys))
        named.inc(value) if name.endswith("_total") else named.observe(value)

    def _new(self, name: str, keys: tuple[str, ...]) -> Any:
        text = name.replace("_", " ").removesuffix(" total").capitalize() + "."
        if name.endswith("_total"):
            return Counter("rankwise_" + name.removesuffix("_total"), text, ("model", *keys), registry=self.registry)
        buckets = SECONDS if name.endswith("_seconds") else RATIOS if name.endswith("_ratio") else SIZES
        return Histogram("rankwise_" + name, text, ("model", *keys), buckets=buckets, registry=self.registry)

    def _drop(self, label: str) -> None:
        for metric in (self._requests, self._prompt, self._generated):
            for key in [k for k in metric._metrics if k[1] == label]:
                metric.remove(*key)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """Prometheus' hook: the gauges, read now."""
        if self._sources is None:
            return
        stats, cache = self._sources[0](), self._sources[1]
        adapters = cache.list()
        yield from self._state(stats)
        yield from self._adapters(adapters)
        gone = CounterMetricFamily("rankwise_adapter_evictions", "Adapters put out to make room.", labels=["model", "tier"])
        for tier, n in dict(cache.tally.evictions).items():  # others count on
            gone.add_metric([self.model, tier], n)
        yield gone
        taken = self._own | set(self._made)
        for name, value in stats.counters.items():
            if not {name, f"{name}_total"} & taken and NAME.fullmatch(name):
                yield self._one(CounterMetricFamily, name.removesuffix("_total"), "Counted by the engine.", value)
        if self.aliases:
            yield from self._gateway(stats, adapters)

    def describe(self) -> Iterable[Metric]:
        """Nothing at registration: the gauges are known only once the engine runs."""
        return ()

    def _one(self, family: Any, name: str, text: str, value: float) -> Metric:
        metric = family(f"rankwise_{name}", text, labels=["model"])
        metric.add_metric([self.model], value)
        return metric  # type: ignore[no-any-return]

    def _state(self, stats: EngineStats) -> Iterable[Metric]:
        rows = (
            ("requests_running", "Sequences in the batch.", stats.running),
            ("requests_waiting", "Sequences that wait.", stats.waiting),
            ("kv_blocks_used_ratio", "Share of the cache blocks in use.", stats.kv_used / max(stats.kv_total, 1)),
            ("kv_copies_bytes", "Keys and values kept a second time for rows that decode.", stats.copies_bytes),
            ("healthy", "1 while the engine steps.", float(stats.healthy)),
        )
        if stats.lora_pages_total:
            text = "Share of the LoRA pages in use."
            yield self._one(GaugeMetricFamily, "adapter_cells_used_ratio", text, stats.lora_pages_used / stats.lora_pages_total)
        for name, text, value in rows:
            yield self._one(GaugeMetricFamily, name, text, value)
        yield self._one(CounterMetricFamily, "steps", "Steps of the engine.", stats.steps)

    def _adapters(self, adapters: Sequence[Listed]) -> Iterable[Metric]:
        text, labels = "Adapters in a tier (labelled ones, and how many others).", ["model", "tier", "adapter", "pinned"]
        resident = GaugeMetricFamily("rankwise_adapter_resident", text, labels=labels)
        held = GaugeMetricFamily("rankwise_adapter_bytes", "Bytes of the adapters in a tier.", labels=["model", "tier"])
        counts: dict[tuple[str, str, str], int] = {}
        sizes: dict[str, int] = {}
        for e in adapters:
            key = (e.tier, self._labels.current(e.name), "true" if e.pins else "false")
            counts[key] = counts.get(key, 0) + 1
            sizes[e.tier] = sizes.get(e.tier, 0) + (e.manifest.nbytes if e.manifest is not None else 0)
        for key, n in counts.items():
            resident.add_metric([self.model, *key], n)
        for tier, size in sizes.items():
            held.add_metric([self.model, tier], size)
        yield from (resident, held)

    def _gateway(self, stats: EngineStats, adapters: Sequence[Listed]) -> Iterable[Metric]:
        """The names by which Kubernetes' inference gateways choose a server."""
        rows = (
            ("num_requests_running", stats.running),
            ("num_requests_waiting", stats.waiting),
            ("kv_cache_usage_perc", stats.kv_used / max(stats.kv_total, 1)),
        )
        for name, value in rows:
            metric = GaugeMetricFamily(f"vllm:{name}", "An alias for inference gateways.", labels=["model_name"])
            metric.add_metric([self.model], value)
            yield metric
        busy = [e.name for e in adapters if e.pins]
        names = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "An alias for inference gateways; the value is a time.", labels=names)
        info.add_metric([str(len(adapters)), ",".join(busy[: self._labels.limit]), ""], time.time())
        yield info
