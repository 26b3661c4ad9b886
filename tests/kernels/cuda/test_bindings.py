"""The cuda backend where there is no GPU: which calls it takes, what it says, and how it would be compiled."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import grok_kernels
from grok_kernels import Weight, chips, cuda, registry, tuning
from grok_kernels.cuda_home import cuda_home
from grok_kernels.formats import FORMATS

ROOT = Path(__file__).resolve().parents[3]


FP8 = torch.float8_e4m3fn


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> Any:
    """What `supports` may look at, of a tensor that no machine here could hold."""
    numel = 1
    for size in shape:
        numel *= size
    return SimpleNamespace(
        device=torch.device("cuda", 0), shape=shape, dtype=dtype, numel=lambda: numel, dim=lambda: len(shape),
        is_contiguous=lambda: contiguous, stride=lambda: (7,) * len(shape),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda.unusable.cache_clear()
    yield
    cuda.unusable.cache_clear()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A compiler that takes note of its arguments, and succeeds."""
    calls: list[dict[str, Any]] = []

    def load(**arguments: Any) -> Any:
        calls.append(arguments)
        return SimpleNamespace(torch_version=torch.__version__)

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    return calls


def route(d: int = 6144, e: int = 8, k: int = 2) -> str | None:
    return cuda._supports_route(on_gpu(5, d), on_gpu(e, d), k, 30.0, False)


def weight(
    e: int, n: int, k: int, format: str = "fp8_e4m3", groups: int = 1, layout: Any = "rows", contiguous: bool = True
) -> Weight:
    dtype = FORMATS[format].dtype
    planes = (on_gpu(e, n, k, dtype=dtype, contiguous=contiguous), on_gpu(e, groups, n))
    return Weight(format, layout, (e, n, k), planes)


def gemm(*size: int, x: torch.dtype = FP8, m: int = 5, **more: Any) -> str | None:
    size = size or (8, 6144, 6144)
    return cuda._supports_gemm(on_gpu(m, size[2], dtype=x), weight(*size, **more), None, on_gpu(1), None)


def moe(
    x: torch.dtype = torch.bfloat16, d: int = 6144, f: int = 32768, w: str = "fp8_e4m3", form: str = "fp8", t: int = 5
) -> str | None:
    rows = on_gpu(t, 2)
    return cuda._supports_moe(
        on_gpu(t, d, dtype=x), rows, rows, weight(8, 2 * f, d, w), weight(8, d, f, w), "gelu_tanh", form
    )


def test_a_hopper_is_served_after_one_compilation(compiled: list[dict[str, Any]]) -> None:
    assert route() is None
    assert cuda._supports_group(on_gpu(5, 2, dtype=torch.int32), 8) is None
    assert gemm() is None
    assert moe() is None
    assert gemm(x=torch.bfloat16, format="int8", groups=8) is None
    assert moe(w="int8", form="none") is None
    (arguments,) = compiled
    sources = [Path(source).relative_to(ROOT).as_posix() for source in arguments["sources"]]
    assert {"csrc/bindings/cuda/gemm.cpp", "csrc/cuda/gemm/instantiations/fp8.cu"} <= set(sources)
    assert "-gencode=arch=compute_90a,code=sm_90a" in arguments["extra_cuda_cflags"]
    assert (Path(arguments["extra_include_paths"][0]) / "cuda/include/grok/route.h").is_file()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: route(d=6146), "D=6146, the cuda backend takes multiples of 4"),
        (lambda: route(e=65), "E=65, the cuda backend takes 64 at most"),
        (lambda: route(e=16, k=9), "k=9, the cuda backend takes 8 at most"),
        (lambda: cuda._supports_group(on_gpu(5, 2), 65), "num_experts=65, the cuda backend takes 64 at most"),
        (lambda: cuda._supports_group(on_gpu(2**30, 2), 8), "experts has 2147483648 entries"),
        (lambda: gemm(x=torch.bfloat16), "x has dtype bfloat16 for weights of fp8_e4m3, the cuda backend takes"),
        (lambda: gemm(format="int8"), "x has dtype float8_e4m3fn for weights of int8, the cuda backend takes bfloat16"),
        (lambda: gemm(format="bf16"), "a weight has format bf16, the cuda backend takes int8, fp8_e4m3"),
        (lambda: gemm(x=torch.bfloat16, format="int8", groups=32), "weight has 32 groups of K=6144, the cuda backend"),
        (lambda: gemm(groups=48), "weight is fp8_e4m3 with 48 groups of scales, the cuda backend takes one"),
        (lambda: gemm(layout="panels"), "a weight has layout panels, the cuda backend takes rows"),
        (lambda: gemm(contiguous=False), "weight has strides (7, 7, 7), the cuda backend takes contiguous weights"),
        (lambda: gemm(65, 8, 16), "weight has 65 experts, the cuda backend takes 64 at most"),
        (lambda: gemm(8, 8, 24), "K=24 of weight, the cuda backend takes multiples of 16"),
        (lambda: gemm(8, 12, 32), "N=12 of weight, the cuda backend takes multiples of 8"),
        (lambda: gemm(m=2**30), "M=1073741824, the cuda backend takes 1073741823 at most"),
        (lambda: moe(form="int8"), "act_format='int8' for weights of fp8_e4m3, the cuda backend takes 'fp8'"),
        (lambda: moe(w="int8"), "act_format='fp8' for weights of int8, the cuda backend takes 'none'"),
        (lambda: moe(x=torch.float32), "x has dtype float32, the cuda backend takes bfloat16"),
        (lambda: moe(w="bf16"), "a weight has format bf16, the cuda backend takes int8, fp8_e4m3"),
        (lambda: moe(f=40), "K=40 of w2, the cuda backend takes multiples of 16"),
        (lambda: moe(t=2**29), "experts has 1073741824 entries"),
        (lambda: cuda._supports_group(torch.zeros(5, 2), 8), "its tensors are on cpu, the cuda backend takes"),
    ],
)
def test_a_call_that_no_kernel_takes_compiles_nothing(compiled: list[dict[str, Any]], call: Any, reason: str) -> None:
    assert (call() or "").startswith(reason)
    assert compiled == []


def test_another_chip_is_named(compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert route() == "cuda:0 has compute capability 8.0, the cuda backend needs 9.0"
    assert cuda._no_chip() == route()
    assert compiled == []
    monkeypatch.setattr(registry, "_missing", {})
    monkeypatch.setattr(registry, "_late_checks", {"cuda": (cuda._no_chip, cuda.unusable)})
    status = registry.backends()["route_topk"]["cuda"]
    assert (status.available, status.reason) == (False, route())


def test_one_hopper_among_other_chips_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8 + device, 0))
    assert cuda._no_chip() == ""


def test_a_failed_compilation_is_the_reason_and_is_said_once(
    compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**arguments: Any) -> Any:
        compiled.append(arguments)
        raise RuntimeError("planted")

    monkeypatch.setattr(cpp_extension, "load", fail)
    assert route() == route()
    assert "does not compile or load (RuntimeError: planted)" in (route() or "")
    assert len(compiled) == 1
    assert caplog.text.count("planted") == 1


@pytest.mark.parametrize("why", ["compiler", "chip"])
def test_what_triton_serves_alone_is_fused(
    why: str, compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cuda backend has `moe` and no `moe_fp8`; where it cannot be used, Triton serves both."""

    def fail(**arguments: Any) -> Any:
        compiled.append(arguments)
        raise RuntimeError("planted")

    monkeypatch.delenv(registry.ENV, raising=False)
    monkeypatch.setattr(registry, "_missing", {})
    monkeypatch.setattr(registry, "_late_checks", {"cuda": (cuda._no_chip, cuda.unusable)})
    for name in ("_preferred", "_fused"):
        monkeypatch.setattr(registry, name, {})
    assert registry.preferred("moe", "cuda") == "cuda"
    assert not registry.fuses("moe_fp8", ("moe",), "cuda")
    assert len(compiled) == 1
    cuda.unusable.cache_clear()
    if why == "compiler":
        monkeypatch.setattr(cpp_extension, "load", fail)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    registry._forget()
    assert registry.preferred("moe", "cuda") == "triton"
    assert registry.fuses("moe_fp8", ("moe",), "cuda")
    assert "cuda" not in (grok_kernels.capturable("cuda") or ())
    assert len(compiled) == (2 if why == "compiler" else 1)


def test_an_extension_of_another_torch_is_refused(
    compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp_extension, "load", lambda **arguments: SimpleNamespace(torch_version="1.13.1"))
    assert "was built against torch 1.13, this is torch" in (route() or "")


def test_what_is_missing_is_named(compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    assert cuda._missing() == ""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert "was not built, and there is no nvcc to compile it now" in cuda._missing()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cuda._missing() == "there is no GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda._missing().endswith("is built without CUDA")


def test_one_tile_serves_any_number_of_rows_until_a_chip_has_shown_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of a layer with top-2 of 8 experts: tokens of a tile, and 0 for the kernel of many rows."""
    h100, rows = chips.CHIPS["h100"], (1, 16, 17, 64, 65, 256, 257, 4096)

    def tokens(weight: torch.dtype) -> list[int]:
        return [tuning.swapped_tile(weight, t, t // 4, h100) for t in rows]

    monkeypatch.setattr(tuning, "_tuned", lambda chip: {})
    assert tokens(FP8) == [0] * len(rows)
    assert tokens(torch.int8) == [64] * len(rows)
    shown = {"swapped": {"float8_e4m3fn": {"same_bits": True}, "int8": {"same_bits": True}}}
    monkeypatch.setattr(tuning, "_tuned", lambda chip: shown)
    assert tokens(FP8) == [16, 16, 16, 0, 0, 0, 0, 0]
    assert tokens(torch.int8) == [16, 16, 16, 64, 64, 64, 64, 128]
    dense = [
        tuning.swapped_tile(weight, m, m, h100) for weight in (FP8, torch.int8) for m in (16, 17, 64, 65, 256, 257)
    ]
    assert dense == [16, 64, 64, 0, 0, 0, 16, 64, 64, 64, 64, 128]
    assert all(set(tokens(weight)) - {0} <= set(kept) for weight, kept in tuning.SWAPPED_TILES.items())


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    tops = [line.split("TOP=", 1)[1] for line in dry.splitlines() if "TOP=" in line]
    return Path(tops[0]) / "include" if tops else None


@pytest.mark.skipif(cuda_headers() is None, reason="there is no nvcc, with which CUDA's headers come")
def test_the_bindings_are_valid_against_the_headers_of_torch(tmp_path: Path) -> None:
    made = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"  # torch's build for CUDA writes it, that for the CPU does not
    made.parent.mkdir(parents=True)
    made.touch()
    headers = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(cuda_headers())]
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-DTORCH_EXTENSION_NAME=_CUDA"]
    places = [f"-I{ROOT / 'csrc'}", f"-I{tmp_path}", *(part for path in headers for part in ("-isystem", path))]
    sources = sorted((ROOT / "csrc/bindings/cuda").glob("*.cpp"))
    assert sources
    done = subprocess.run([*command, *places, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cuda_home_is_what_nvcc_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes the folder above the nvcc on the path, be that a wrapper script with no headers above it."""
    toolkit, path = tmp_path / "cuda-13.0", tmp_path / "local/bin"
    (toolkit / "include").mkdir(parents=True)
    path.mkdir(parents=True)
    wrapper = path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\necho "#$ TOP={toolkit}/bin/.." >&2\n')
    wrapper.chmod(0o755)
    (toolkit / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    assert cuda_home(str(tmp_path / "local")) == str(toolkit)
    assert cuda_home(None) == str(toolkit)
    headers = tmp_path / "local/include"
    headers.mkdir()
    (headers / "cuda_runtime.h").touch()
    assert cuda_home(str(tmp_path / "local")) == str(tmp_path / "local")
    wrapper.write_text("#!/bin/sh\nexit 1\n")
    assert cuda_home("/nowhere") == "/nowhere"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_home(None) is None
