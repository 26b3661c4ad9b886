"""How much memory there is, and the context and the KV cache that it holds beside a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from grok_engine.config import ConfigError, EngineConfig, WeightFormat
from grok_engine.log import QuietLogger, size_text
from grok_kernels.dtypes import dtype_of

from .pages import page_bytes

logger = QuietLogger("grok_engine")

CPU_KV_BYTES = 2 << 30  # of keys and values that nobody sized, unless one request takes more
CPU_SHARE = 0.5  # of what the weights leave: the most that keys and values take that nobody sized
GPU_SHARE = 0.9  # of the device's memory; the rest is for the driver, the allocator's slack and other processes
LEAST = 1024  # tokens: a context that nobody sized is not cut further; rather nothing is loaded

# Bytes that loading with these weights takes: to stay, and beside them at its peak. None: the checkpoint cannot become
# them.
Loading = Callable[[WeightFormat | None], tuple[int, int] | None]


def fit(config: EngineConfig, loading: Loading, *, cut: bool) -> EngineConfig:
    """`config` with sizes that memory holds beside the weights: the KV cache's pages on a CPU, and with `cut`, where
    nobody chose `max_model_len`, a shorter one. On a GPU the pages are counted later, when the weights are there.

    ConfigError where it does not fit, before anything is allocated, with what would.
    """
    available, on_gpu = available_bytes(config.device), config.device.startswith("cuda")
    took = loading(config.weights)
    if available is None or took is None:
        return config
    (weights, peak), work, page = took, working_bytes(config), _page_bytes(config)
    left, longest = available - weights - work, _pages_of(config, config.max_len)
    pages = wanted_pages(config, max(left, page) if on_gpu else CPU_KV_BYTES)
    sized = config.num_pages is not None or config.kv_memory is not None
    if not sized:
        least = min(longest, _pages_of(config, LEAST)) if cut else longest
        pages = max(min(pages, (left if on_gpu else int(left * CPU_SHARE)) // page), least)
    if weights + max(peak, work + pages * page) > available:
        raise ConfigError(_refusal(config, loading, pages, available))
    if not sized and pages < longest:
        tokens = pages * config.page_size
        logger.warning(
            "max_model_len=%d, not the model's %d: of %s of available memory the weights take %s, computing about %s, "
            "and %s are for keys and values; max_model_len or kv_memory chooses, and kv_dtype='fp8_e4m3' holds more",
            tokens, config.max_len, size_text(available), size_text(weights), size_text(work), size_text(pages * page),
        )  # fmt: skip
        config = replace(config, max_model_len=tokens)
    return config if on_gpu else replace(config, num_pages=pages, kv_memory=None)


def wanted_pages(config: EngineConfig, budget: int) -> int:
    """Pages of the KV cache: as `config` sizes it, else those of `budget` bytes or of one request, if that is more. A
    size in bytes counts as far as all sequences together could fill it. ConfigError where it holds no page."""
    if config.num_pages is not None:
        return config.num_pages
    page, longest = _page_bytes(config), _pages_of(config, config.max_len)
    if config.kv_memory is not None:
        budget = config.kv_memory
    elif not config.device.startswith("cuda"):
        budget = max(budget, longest * page)
    if budget < page:
        raise ConfigError(f"kv_memory: {budget} bytes hold no page, expected {page} or more for one")
    return min(budget // page, config.max_num_seqs * (longest + 1))


def working_bytes(config: EngineConfig) -> int:
    """About what the largest step takes: the table of rotary angles, activations in fp32, and logits three times."""
    c, tokens = config.model, config.max_num_batched_tokens
    wide = 3 * (c.num_experts_per_tok * c.d_ff + c.dense_d_ff)
    a_token = 4 * (6 * c.d_model + 2 * c.qkv_dim + wide)
    return 4 * config.max_len * c.head_dim + tokens * a_token + 3 * 4 * config.max_num_seqs * c.vocab_size


def _refusal(config: EngineConfig, loading: Loading, pages: int, available: int) -> str:
    """What does not fit, and what would."""
    took = loading(config.weights)
    assert took is not None
    (weights, _), page, work = took, _page_bytes(config), working_bytes(config)
    held = f"weights={config.weights!r}" if config.weights else "its weights as they are stored"
    head = (
        f"model {config.model.name!r} with {held} does not fit into memory: {size_text(weights)} of weights, "
        f"{size_text(pages * page)} of keys and values for {pages * config.page_size} tokens and about "
        f"{size_text(work)} to compute with, {size_text(available)} are available; "
    )
    if fitting := list(_fitting(config, loading, available)):
        return head + f"expected {', or '.join(fitting)}"
    mapped = "" if config.mmap or config.device.startswith("cuda") else ", but a converted folder runs with mmap=True"
    return f"{head}no weights= makes it fit{mapped}"


def _fitting(config: EngineConfig, loading: Loading, available: int) -> Iterator[str]:
    """Options that would fit: first with the weights as they are, then with smaller ones."""
    page, work, smallest = _page_bytes(config), working_bytes(config), None
    formats: tuple[WeightFormat | None, ...] = (config.weights, "bf16", "int8", "fp8")
    for weights in dict.fromkeys(formats):
        took = loading(weights)
        if took is None or (smallest is not None and took[0] > 0.9 * smallest):
            continue
        smallest = took[0]
        pages = (available - took[0] - work) // page
        if pages < 1 or sum(took) > available:
            continue
        tokens = min(pages * config.page_size, config.model.max_position)
        sizes = f"max_model_len={min(tokens, config.max_len)}"
        if config.num_pages is not None:
            sizes = f"num_pages={min(pages, config.num_pages)}"
        elif config.kv_memory is not None:
            sizes = f"kv_memory={min(pages * page, config.kv_memory)}"
        yield f"{sizes} at most" if weights == config.weights else f"weights={weights!r} with {sizes} at most"


def _page_bytes(config: EngineConfig) -> int:
    return page_bytes(config.model, config.page_size, dtype_of(str(config.kv_dtype)))


def _pages_of(config: EngineConfig, tokens: int) -> int:
    return -(-tokens // config.page_size)


def available_bytes(device: str) -> int | None:
    """Bytes that this process can still take on a device; None where the system does not say."""
    if not device.startswith("cuda"):
        return cpu_available()
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(total * GPU_SHARE) - (total - free) + cached


def cpu_available(root: Path = Path("/")) -> int | None:
    """The least of what Linux calls available and of what each control group above this process leaves. root: where
    /proc and /sys are."""
    lines = _read(root / "proc/meminfo").splitlines()
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _group_left(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            found += _group_left(root / "sys/fs/cgroup/memory", path, *names)
    return max(min(found), 0) if found else None


def _group_left(mount: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[int]:
    """What each group from `path` up to `mount` leaves. Pages of files count as free: the system drops them at need."""
    folder = mount / path.strip("/")
    for group in (folder, *folder.parents):
        most, used = _read(group / limit).strip(), _read(group / usage).strip()
        if most.isdecimal() and used.isdecimal():
            files = (line.split() for line in _read(group / "memory.stat").splitlines())
            names = (f"{prefix}inactive_file", f"{prefix}active_file")
            yield int(most) - int(used) + sum(int(size) for name, size in files if name in names)
        if group == mount:
            return


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
