"""The context and the KV cache that memory holds, and what is refused before anything is allocated."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_engine import ConfigError, EngineConfig, LLMEngine, ModelConfig, SamplingParams
from grok_engine.loading.random import weight_bytes
from grok_engine.runtime import memory
from grok_engine.runtime.memory import CPU_SHARE, cpu_available, fit, working_bytes

LONG = ModelConfig(
    name="long", vocab_size=512, d_model=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, dense_d_ff=256,
    max_position=131072, eos_token_ids=(),
)  # fmt: skip
TOKEN = 2 * 2 * 4 * 32 * 2  # bytes of keys and values in bf16: layers · keys and values · heads · head size
BESIDE = weight_bytes(LONG, "bfloat16") + working_bytes(EngineConfig(model=LONG))
SLACK = 32 << 20  # that loading takes for a moment, more than the smallest caches here


def bound(monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: available)


def test_a_context_that_memory_does_not_hold_is_cut(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = SLACK
    bound(monkeypatch, BESIDE + left)
    engine = LLMEngine(LONG)
    tokens = int(left * CPU_SHARE) // (16 * TOKEN) * 16
    assert tokens < LONG.max_position
    assert (engine.config.max_model_len, engine.config.num_pages) == (tokens, tokens // 16)
    assert engine.stats().kv_bytes == tokens * TOKEN <= left * CPU_SHARE
    assert engine.model.cos_sin.shape[0] == tokens
    (said,) = [r for r in caplog.records if "max_model_len" in r.getMessage() and r.levelno == logging.WARNING]
    assert said.getMessage().startswith(f"max_model_len={tokens}, not the model's 131072: ")
    with pytest.raises(ValueError, match=f"expected at most max_model_len={tokens}"):
        engine.encode([5] * (tokens + 1))
    before = engine.config
    engine.sleep()
    bound(monkeypatch, BESIDE)
    with pytest.raises(ConfigError, match="does not fit into memory"):
        engine.wake_up()
    assert engine.asleep
    bound(monkeypatch, BESIDE + 2 * left)
    engine.wake_up()
    assert engine.config == before


def test_the_command_says_so() -> None:
    program = (
        "import sys; from grok_engine import cli; from grok_engine.runtime import memory\n"
        f"memory.available_bytes = lambda device: {150 << 20}; memory.CPU_SHARE, memory.LEAST = 1e-4, 32\n"
        "sys.argv[1:] = ['generate', '--prompt', 'The', '--max-tokens', '2']; sys.exit(cli.main())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"grok-engine: max_model_len=\d+, not the model's 512: .*\n", run.stderr)
    assert run.stdout.strip()


@pytest.mark.parametrize("available", [None, BESIDE + (4 << 30)])
def test_nothing_changes_where_memory_holds_it_all(monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    """On a CPU: 2 GiB, or one request of the whole context, and no more than all sequences together could fill."""
    bound(monkeypatch, available)
    for seqs, pages in ((1, 131072 // 16 + 1), (64, (2 << 30) // (16 * TOKEN))):
        engine = LLMEngine(LONG, max_num_seqs=seqs)
        assert (engine.config.max_model_len, engine.runner.num_pages) == (131072, pages)


def test_a_chosen_length_may_take_more_than_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    left = SLACK + (1 << 20)
    config = EngineConfig(model=LONG, max_model_len=left // TOKEN // 16 * 16)
    bound(monkeypatch, BESIDE + left)
    engine = LLMEngine(LONG, max_model_len=config.max_len)
    assert engine.config.max_model_len == config.max_len
    assert left - engine.stats().kv_bytes < 16 * TOKEN + 4 * 131072 * 32  # with what the shorter table leaves


def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was allocated")

    monkeypatch.setattr("grok_engine.loading.build.fill", fail)
    monkeypatch.setattr("grok_engine.runtime.runner.allocate_pages", fail)


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 131072},
        {"num_pages": 1 << 20},
        {"kv_memory": 1 << 40},
        {"weights": "fp32", "max_model_len": 100000},
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    bound(monkeypatch, BESIDE + SLACK)
    with monkeypatch.context() as patch:
        untouched(patch)
        with pytest.raises(
            ConfigError, match=r"model 'long' with .* does not fit into memory: .* are available; "
        ) as e:
            LLMEngine(LONG, **options)
    name, size = re.findall(r"expected (\w+)=(\d+) at most", str(e.value))[0]
    assert name == next(key for key in options if key != "weights")
    LLMEngine(LONG, **{**options, name: int(size)})
    more = {"max_model_len": 16, "num_pages": 1, "kv_memory": 16 * TOKEN}[name]
    if name != "max_model_len":  # of which the table of positions takes a part too
        with pytest.raises(ConfigError, match="does not fit"):
            LLMEngine(LONG, **{**options, name: int(size) + more})


def test_weights_that_do_not_fit_name_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(LONG, dense_d_ff=1 << 15, max_position=4096)
    sizes = {weights: weight_bytes(large, "bfloat16", weights) for weights in ("fp32", "bf16", "int8", "fp8")}
    beside = working_bytes(EngineConfig(model=large)) + 4096 * TOKEN
    bound(monkeypatch, sizes["bf16"] + beside)
    with monkeypatch.context() as patch:
        untouched(patch)
        with pytest.raises(ConfigError) as error:
            LLMEngine(large, weights="fp32")
    said = str(error.value)
    assert said.startswith("model 'long' with weights='fp32' does not fit into memory: ")
    assert said.endswith("expected weights='bf16' with max_model_len=4096 at most, or weights='int8' with "
                         "max_model_len=4096 at most")  # fmt: skip
    assert LLMEngine(large, weights="bf16", max_model_len=4096).config.max_model_len == 4096
    bound(monkeypatch, 1 << 20)
    with pytest.raises(ConfigError, match="no weights= makes it fit"):
        LLMEngine(large)


def test_a_context_is_not_cut_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather it takes more than the share, and where that does not do, nothing is loaded."""
    monkeypatch.setattr("grok_engine.loading.build.SLACK", 0)
    bound(monkeypatch, BESIDE + 1500 * TOKEN)
    assert LLMEngine(LONG).config.max_model_len == 1024
    bound(monkeypatch, BESIDE + 1000 * TOKEN)
    with pytest.raises(ConfigError, match="expected max_model_len=992 at most"):
        LLMEngine(LONG)
    assert LLMEngine(LONG, max_model_len=992).config.max_model_len == 992


def test_no_limit_on_tokens_means_what_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LLMEngine(LONG, num_pages=3, page_size=4)
    endless = SamplingParams(max_tokens=None, temperature=0)
    engine.add_request("a", [5, 6, 7], endless)
    while engine.has_unfinished_requests():
        (output,) = engine.step()
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (10, "length")
    with pytest.raises(ValueError, match="13 prompt tokens \\+ 1 new ones need 4 pages of 4 tokens, there are 3"):
        engine.add_request("b", [5] * 13, endless)
    with pytest.raises(ValueError, match="need 4 pages"):  # what was asked for is never less in silence
        engine.add_request("c", [5] * 3, replace(endless, max_tokens=11))


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages are counted when the weights are there; the length is cut before."""
    total = 100 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 20, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 << 20)
    assert memory.available_bytes("cuda:0") == (90 - 30 + 5) << 20
    config = EngineConfig(model=LONG, device="cuda")
    left = (65 << 20) - working_bytes(config) - 1000
    found = fit(config, lambda weights: (1000, 500), cut=True)
    assert found == replace(config, max_model_len=left // (16 * TOKEN) * 16)
    with pytest.raises(ConfigError, match="does not fit"):
        fit(config, lambda weights: (1000, 500), cut=False)
    kept = replace(config, kv_memory=1 << 20)
    assert fit(kept, lambda weights: (1000, 500), cut=True) == kept


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16000 kB\nMemFree:   10 kB\nMemAvailable:    8000 kB\n"}
V1 = {
    "proc/self/cgroup": "12:cpu,cpuacct:/a\n11:memory:/docker/abc\n1:name=systemd:/a\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000000",
    "sys/fs/cgroup/memory/memory.stat": "cache 5\ntotal_inactive_file 1000\ntotal_active_file 200\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 8192000),
        (MEMINFO | {"proc/self/cgroup": "0::/\n"}, 8192000),
        (
            MEMINFO | {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
                "sys/fs/cgroup/user/job/memory.current": "1\n",
                "sys/fs/cgroup/user/memory.max": "5000000\n",
                "sys/fs/cgroup/user/memory.current": "4000000\n",
                "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 70\nactive_file 8\nfile 1000\n",
            },
            1000078,
        ),
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000"}, 1001200),
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 8192000),
        (MEMINFO | V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000"}, 0),
    ],
)  # fmt: skip
def test_what_the_system_calls_available(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert cpu_available(write(tmp_path, files)) == expected


def test_this_system_has_memory() -> None:
    available = cpu_available()
    assert available is None or 0 < available < 1 << 50
