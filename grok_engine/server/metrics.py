"""Prometheus metrics of an app: the engine's counters under vLLM's names, read when they are scraped.

Nothing is counted on a request's way but its errors. `grok:` begins the names of what vLLM does not have.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response

from grok_engine import AsyncLLM, EngineAsleepError, EngineClosedError, EngineStats, Histogram

Values = Mapping[tuple[str, ...], float]  # by the values of the labels that are the metric's own
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "engine")


class _Scalar(NamedTuple):
    """A gauge or a counter. now: what it is about is over where the engine no longer runs."""

    help: str
    labels: tuple[str, ...]
    values: Callable[[EngineStats], Values]
    now: bool = False


def _one(read: Callable[[EngineStats], float]) -> Callable[[EngineStats], Values]:
    return lambda stats: {(): read(stats)}


def _named(read: Callable[[EngineStats], Mapping[Any, float]]) -> Callable[[EngineStats], Values]:
    return lambda stats: {(str(name),): value for name, value in read(stats).items()}


def _usage(stats: EngineStats) -> float:
    s = stats.scheduler
    return s.pages_used / max(s.pages_used + s.pages_free, 1)


def _load(stats: EngineStats) -> Values:
    layers = stats.expert_load or []
    return {(str(i), str(e)): n for i, layer in enumerate(layers) for e, n in enumerate(layer)}


GAUGES = {
    "vllm:num_requests_running": _Scalar(
        "Sequences in the running batch.", (), _one(lambda s: s.scheduler.running), now=True
    ),
    "vllm:num_requests_waiting": _Scalar(
        "Sequences that wait for their first step, or to run again after a preemption.", (),
        _one(lambda s: s.scheduler.waiting), now=True,
    ),
    "vllm:kv_cache_usage_perc": _Scalar("Share of the KV pages in use: 1 is all.", (), _one(_usage), now=True),
    "grok:kv_pages": _Scalar(
        "KV pages: in use, and free (those that keep a known prefix included).", ("state",),
        _named(lambda s: {"used": s.scheduler.pages_used, "free": s.scheduler.pages_free}), now=True,
    ),
}  # fmt: skip
COUNTERS = {
    "vllm:prompt_tokens": _Scalar(
        "Prompt tokens computed; those of preempted sequences count again.", (), _one(lambda s: s.prompt_tokens)
    ),
    "vllm:generation_tokens": _Scalar("Tokens generated.", (), _one(lambda s: s.generated_tokens)),
    "vllm:prefix_cache_queries": _Scalar(
        "Tokens looked up in the prefix cache.", (), _one(lambda s: s.scheduler.query_tokens)
    ),
    "vllm:prefix_cache_hits": _Scalar(
        "Tokens found in the prefix cache.", (), _one(lambda s: s.scheduler.hit_tokens)
    ),
    "vllm:num_preemptions": _Scalar("Sequences preempted.", (), _one(lambda s: s.scheduler.preemptions)),
    "vllm:request_success": _Scalar(
        "Answers that ended, by their finish_reason.", ("finished_reason",), _named(lambda s: s.finished)
    ),
    "grok:prefix_cache_evictions": _Scalar(
        "Pages of known prefixes given to others.", (), _one(lambda s: s.scheduler.evictions)
    ),
    "grok:steps": _Scalar("Steps of the engine.", (), _one(lambda s: s.steps)),
    "grok:step_seconds": _Scalar("Seconds by part of a step.", ("part",), _named(lambda s: s.seconds)),
    "grok:expert_load": _Scalar(
        "Tokens that each expert of each layer got; of engines made with expert_load alone.", ("layer", "expert"), _load
    ),
}  # fmt: skip
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": "From a request's arrival to its first token.",
    "vllm:inter_token_latency_seconds": "From an answer's token to its next.",
    "vllm:e2e_request_latency_seconds": "From a request's arrival to its end.",
    "vllm:request_queue_time_seconds": "From a request's arrival to its first step.",
    "vllm:request_inference_time_seconds": "From a request's first step to its end.",
    "vllm:request_prefill_time_seconds": "From a request's first step to its first token.",
    "vllm:request_decode_time_seconds": "From a request's first token to its end.",
    "vllm:request_time_per_output_token_seconds": "A request's decode time per token after the first.",
    "vllm:request_prompt_tokens": "Tokens of a request's prompt.",
    "vllm:request_generation_tokens": "Tokens of a request's answers.",
    "vllm:iteration_tokens_total": "Tokens computed in a step.",
}
CACHE_INFO = "vllm:cache_config_info"
_CACHE_LABELS = ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
ERRORS = "grok:request_errors"


class Metrics:
    """The metrics of one app, in `registry`, or in one of its own. Apps that share a registry are told apart by the
    labels model_name and engine, which numbers them.

    `close` takes them out of the registry, `open` puts them in again; a dropped app shows nothing more. Any thread may
    scrape.
    """

    def __init__(self, llm: AsyncLLM, model_name: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._llm, self._model_name = llm, model_name
        self._errors = Counter[tuple[str, str]]()
        self._last: EngineStats | None = None
        self.open()

    def open(self) -> None:
        """Show the metrics in the registry. ValueError if others there have their names."""
        _Apps.of(self.registry).add(self)

    def close(self) -> None:
        """Show them no longer."""
        _Apps.of(self.registry).remove(self)

    def error(self, kind: str, status: int) -> None:
        """Count a request that was refused or failed. kind: of a few."""
        self._errors[kind, str(status)] += 1

    async def route(self, request: Request) -> Response:
        """`/metrics`: all of the registry, in Prometheus' text format. In OpenMetrics, which a scraper would prefer,
        prometheus_client writes underscores for the colons of the names."""
        body = await asyncio.to_thread(generate_latest, self.registry)
        return Response(body, headers={"content-type": TEXT_FORMAT})

    def fill(self, families: Mapping[str, Any], engine: int) -> None:
        """Add this app's samples. A closed or sleeping engine has the counts that it was last seen with, and nothing
        that runs."""
        own = [self._model_name, str(engine)]
        for key, count in list(self._errors.items()):
            families[ERRORS].add_metric([*own, *key], count)
        stats, runs = self._last, True
        try:
            stats = self._last = self._llm.stats()
        except (EngineAsleepError, EngineClosedError):
            runs = False
        if stats is None:
            return
        for name, scalar in (GAUGES | COUNTERS).items():
            for labels, value in scalar.values(stats).items():
                families[name].add_metric([*own, *labels], value if runs or not scalar.now else 0)
        for name in HISTOGRAMS:
            histogram = stats.histograms[name.removeprefix("vllm:")]
            families[name].add_metric(own, _buckets(histogram), histogram.sum)
        config, pages = self._llm.engine.config, stats.scheduler.pages_used + stats.scheduler.pages_free
        cache = (config.page_size, pages, config.kv_dtype, config.enable_prefix_caching)
        families[CACHE_INFO].add_metric([*own, *map(str, cache)], 1)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Prometheus counts the values up to each bound."""
    total, found = 0, []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        total += count
        found.append((floatToGoString(bound), float(total)))  # type: ignore[no-untyped-call]
    return found


class _Apps(Collector):
    """All apps of one registry, so that each name is there once."""

    _all: ClassVar[WeakKeyDictionary[CollectorRegistry, _Apps]] = WeakKeyDictionary()

    @classmethod
    def of(cls, registry: CollectorRegistry) -> _Apps:
        return cls._all.setdefault(registry, cls())

    def __init__(self) -> None:
        self._apps: WeakValueDictionary[int, Metrics] = WeakValueDictionary()  # by number
        self._registered = False

    def add(self, app: Metrics) -> None:
        if app in self._apps.values():
            return
        if not self._registered:
            app.registry.register(self)
            self._registered = True
        taken = set(self._apps)
        self._apps[next(i for i in range(len(taken) + 1) if i not in taken)] = app

    def remove(self, app: Metrics) -> None:
        for engine in [i for i, other in self._apps.items() if other is app]:
            del self._apps[engine]
        if self._registered and not self._apps:
            app.registry.unregister(self)
            self._registered = False

    def describe(self) -> list[Metric]:
        """What the registry reserves the names of."""
        return list(_families().values())

    def collect(self) -> Iterator[Metric]:
        families = _families()
        for engine, app in sorted(self._apps.items()):
            app.fill(families, engine)
        return (family for family in families.values() if family.samples)


def _families() -> dict[str, Metric]:
    """Every metric without a sample, by name."""
    families: dict[str, Metric] = {}
    for name, scalar in GAUGES.items():
        families[name] = GaugeMetricFamily(name, scalar.help, labels=[*_LABELS, *scalar.labels])
    for name, scalar in COUNTERS.items():
        families[name] = CounterMetricFamily(name, scalar.help, labels=[*_LABELS, *scalar.labels])
    for name, text in HISTOGRAMS.items():
        families[name] = HistogramMetricFamily(name, text, labels=_LABELS)
    families[CACHE_INFO] = GaugeMetricFamily(CACHE_INFO, "The KV cache.", labels=[*_LABELS, *_CACHE_LABELS])
    families[ERRORS] = CounterMetricFamily(
        ERRORS, "Requests refused or failed, by the kind of error and HTTP status.", labels=[*_LABELS, "kind", "status"]
    )
    return families
