"""What a scrape of the server gives, read as Prometheus reads it."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from grok_engine import AsyncLLM, LLMEngine, SamplingParams
from grok_engine.server import create_app
from grok_engine.server.metrics import CACHE_INFO, COUNTERS, ERRORS, GAUGES, HISTOGRAMS, Metrics
from tests.server.calls import Exchange, ask, refusal, run

DOCS = Path(__file__).parents[2] / "docs"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
LABELS = (("engine", "0"), ("model_name", "m"))


def scrape(registry: CollectorRegistry) -> Samples:
    """Every sample by name and labels; each is there once, and each family too."""
    found: Samples = {}
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted((*LABELS, *labels.items())))]


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    async def serve() -> AsyncLLM:
        llm = AsyncLLM(LLMEngine("tiny", expert_load=True, num_pages=100))
        prompt = "To Sherlock Holmes she is always the woman. I have seldom heard him mention her"
        for stop in (None, "e", None):
            async for _ in llm.generate(prompt, SamplingParams(max_tokens=12, seed=1, stop=stop, ignore_eos=True)):
                pass
        stream = llm.generate("x", SamplingParams(max_tokens=500, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        await llm.drain()
        await llm.wake_up()
        return llm

    llm = asyncio.run(serve())
    yield llm
    asyncio.run(llm.close())


def test_counts_are_those_of_the_engine(llm: AsyncLLM) -> None:
    metrics = Metrics(llm, "m")
    metrics.error("invalid_request_error", 400)
    metrics.error("invalid_request_error", 400)
    found, stats = scrape(metrics.registry), llm.stats()
    scheduler = stats.scheduler
    assert value(found, "vllm:num_requests_running") == value(found, "vllm:num_requests_waiting") == 0
    assert value(found, "vllm:kv_cache_usage_perc") == 0
    assert value(found, "grok:kv_pages", state="free") == 100
    assert value(found, "vllm:prompt_tokens_total") == stats.prompt_tokens > 0
    assert value(found, "vllm:generation_tokens_total") == stats.generated_tokens > 24
    assert value(found, "vllm:prefix_cache_queries_total") == scheduler.query_tokens
    assert value(found, "vllm:prefix_cache_hits_total") == scheduler.hit_tokens > 0
    reasons = {"stop": 1, "length": 2, "abort": 1, "error": 0}
    for reason, count in reasons.items():
        assert value(found, "vllm:request_success_total", finished_reason=reason) == count
    assert value(found, "grok:request_errors_total", kind="invalid_request_error", status="400") == 2
    assert stats.expert_load is not None
    for layer, counts in enumerate(stats.expert_load):
        for expert, count in enumerate(counts):
            assert value(found, "grok:expert_load_total", layer=str(layer), expert=str(expert)) == count
    assert value(found, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100", cache_dtype="bfloat16",
                 enable_prefix_caching="True") == 1  # fmt: skip
    for name in HISTOGRAMS:
        mine = stats.histograms[name.removeprefix("vllm:")]
        buckets = [v for (n, _), v in found.items() if n == f"{name}_bucket"]
        assert buckets == sorted(buckets), name
        assert buckets[-1] == value(found, f"{name}_count") == sum(mine.counts), name
        assert value(found, f"{name}_sum") == pytest.approx(mine.sum)
    assert value(found, "vllm:e2e_request_latency_seconds_count") == 4
    assert value(found, "vllm:e2e_request_latency_seconds_bucket", le="+Inf") == 4


def test_gauges_while_requests_run() -> None:
    async def run() -> None:
        async with AsyncLLM(LLMEngine("tiny", max_num_seqs=1, num_pages=80)) as llm:
            metrics = Metrics(llm, "m")
            params = SamplingParams(max_tokens=400, ignore_eos=True)
            streams = [llm.generate("x", params) for _ in range(3)]
            await anext(streams[0])
            found = scrape(metrics.registry)
            assert value(found, "vllm:num_requests_running") == 1
            assert value(found, "vllm:num_requests_waiting") == 2
            used = value(found, "grok:kv_pages", state="used")
            assert used >= 1
            assert used + value(found, "grok:kv_pages", state="free") == 80
            assert value(found, "vllm:kv_cache_usage_perc") == pytest.approx(used / 80)
            assert not any(name.startswith("grok:expert_load") for name, _ in found)
            for stream in streams:
                await stream.aclose()
            await llm.drain()
            counted = value(scrape(metrics.registry), "vllm:generation_tokens_total")
            await llm.sleep()
            asleep = scrape(metrics.registry)
            assert value(asleep, "vllm:generation_tokens_total") == counted > 0
            assert value(asleep, "vllm:num_requests_running") == value(asleep, "grok:kv_pages", state="used") == 0
        closed = scrape(metrics.registry)
        assert value(closed, "vllm:generation_tokens_total") == counted

    asyncio.run(run())


def test_two_apps_share_a_registry_and_leave_nothing(llm: AsyncLLM) -> None:
    registry = CollectorRegistry()
    own = Counter("mine", "of the program", registry=registry)
    own.inc()
    nothing = scrape(registry)
    one, two = Metrics(llm, "m", registry), Metrics(llm, "m", registry)
    one.error("server_error", 500)
    found = scrape(registry)
    key = "vllm:prompt_tokens_total"
    assert [labels for name, labels in found if name == key] == [
        (("engine", "0"), ("model_name", "m")), (("engine", "1"), ("model_name", "m")),
    ]  # fmt: skip
    one.close()
    one.close()
    assert [dict(labels)["engine"] for name, labels in scrape(registry) if name == key] == ["1"]
    one.open()
    assert len([name for name, _ in scrape(registry) if name == key]) == 2
    two.close()
    one.close()
    assert scrape(registry) == nothing
    Counter("vllm:prompt_tokens", "another's", registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Metrics(llm, "m", registry)
    other = Metrics(llm, "m")  # in a registry of its own
    assert len(scrape(other.registry)) > 100


def test_a_dropped_app_shows_nothing(llm: AsyncLLM) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(llm, "m", registry)
    assert scrape(registry)
    del metrics
    gc.collect()
    assert scrape(registry) == {}


def test_a_scraper_finds_the_names_whatever_format_it_prefers(llm: AsyncLLM) -> None:
    """What Prometheus sends. In OpenMetrics prometheus_client would turn `vllm:` into `vllm_`."""
    prefers = "application/openmetrics-text;version=1.0.0;escaping=underscores,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    response = ask(create_app(llm), "GET", "/metrics", headers={"accept": prefers})
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert len(list(text_string_to_metric_families(response.text))) > 20
    names = {re.split(r"[{ ]", line)[0] for line in response.text.splitlines() if not line.startswith("#")}
    assert {name.partition(":")[0] for name in names} == {"vllm", "grok"}


def names() -> set[str]:
    counters = {f"{name}_total" for name in (*COUNTERS, ERRORS)}
    return {*GAUGES, *counters, *HISTOGRAMS, CACHE_INFO}


def test_the_documentation_lists_every_metric() -> None:
    section = (DOCS / "serving.md").read_text().split("## Metrics\n", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"`((?:vllm|grok):\w+)", section)) == names()


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    text = (DOCS / "grafana.json").read_text()
    panels = json.loads(text)["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = set(re.findall(r"(?:vllm|grok):\w+", " ".join(expressions)))
    parts = {f"{name}{suffix}" for name in HISTOGRAMS for suffix in ("_bucket", "_sum", "_count")}
    assert asked <= names() | parts
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "grok:expert_load_total"):
        assert name in asked
    for expression in expressions:
        assert expression.count("(") == expression.count(")"), expression
        assert 'model_name="$model_name"' in expression


def test_an_app_counts_its_errors_and_takes_them_with_it(llm: AsyncLLM) -> None:
    registry = CollectorRegistry()
    app = create_app(llm, api_key="k", metrics_registry=registry)
    known = {"authorization": "Bearer k"}
    assert ask(app, "GET", "/metrics").status_code == 200, "needs no key"
    assert not any(name == "grok:request_errors_total" for name, _ in scrape(registry))
    refusal(app, "/v1/completions", {"prompt": "x"}, 401)
    refusal(app, "/v1/completions", {"prompt": "x", "top_p": 7}, 400, headers=known)
    refusal(app, "/v1/completions", b"{", 400, headers=known)
    refusal(app, "/v1/completions", {"prompt": "x", "model": "other"}, 404, headers=known)
    ask(app, "GET", "/nothing", headers=known)
    leaving = Exchange(app, "/v1/completions", {"prompt": "x", "max_tokens": 400, "ignore_eos": True}, known)
    leaving.leave()
    run(leaving.run())
    counts = {
        (dict(labels)["status"], dict(labels)["kind"]): count
        for (name, labels), count in scrape(registry).items()
        if name == "grok:request_errors_total"
    }
    assert counts == {
        ("401", "invalid_api_key"): 1, ("400", "invalid_request_error"): 2, ("404", "model_not_found"): 1,
        ("404", "invalid_request_error"): 1, ("499", "client_left"): 1,
    }  # fmt: skip

    async def serve() -> None:
        async with app.router.lifespan_context(app):
            assert scrape(registry)

    asyncio.run(serve())
    assert scrape(registry) == {}
