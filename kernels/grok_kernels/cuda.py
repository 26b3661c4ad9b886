"""Registers the CUDA kernels for Hopper (compute capability 9.0), or says why there are none.

They are in the extension `grok_kernels._CUDA` where the installation built it. Otherwise the first call on such a chip
compiles them with torch's just-in-time compiler, which needs nvcc and a C++ compiler, into its cache
(`TORCH_EXTENSIONS_DIR`). Triton serves the calls that no kernel here takes.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import registry
from .checks import GROUP
from .chips import chip_of
from .counters import counter
from .cuda_home import cuda_home
from .dtypes import dtype_name
from .experts import ExpertLayer
from .extension import misfit
from .tuning import swapped_tile
from .weights import Weight, unsupported

NAME = "grok_kernels._CUDA"
FORMATS = ("int8", "fp8_e4m3")
registry.set_takes("cuda", registry.Takes(FORMATS))
CHIP = (9, 0)
ARCH = "-gencode=arch=compute_90a,code=sm_90a"
EXPERTS, CHOSEN = 64, 8  # kMostExperts and kMostChosen of grok/route.h
ROWS = 2**31 - 4097
PRODUCT_ROWS = 2**30 - 1
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2}  # Activation of grok/gemm.h
log = logging.getLogger("grok_kernels")


def _csrc() -> Path:
    """The C++ sources: beside the modules in an installed package, else in the checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "csrc"
    return packaged if packaged.is_dir() else here.parents[1] / "csrc"


def _build_arguments() -> dict[str, Any]:
    """The arguments of `torch.utils.cpp_extension.load`."""
    csrc = _csrc()
    patterns = ("bindings/cuda/*.cpp", "cuda/*/instantiations/*.cu")
    return {
        "name": "grok_kernels_cuda",
        "sources": [str(path) for pattern in patterns for path in sorted(csrc.glob(pattern))],
        "extra_include_paths": [str(csrc)],
        "extra_cflags": ["-O3"],
        "extra_cuda_cflags": ["-O3", ARCH],
        "with_cuda": True,
    }


def _nvcc() -> str:
    from torch.utils import cpp_extension  # slow to import

    home = cuda_home(cpp_extension.CUDA_HOME)
    return str(Path(home) / "bin/nvcc") if home else ""


def _missing() -> str:
    """Why no kernel can run here, if so. Does not start CUDA, after which no process may fork."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.device_count() == 0:
        return "there is no GPU"
    if find_spec(NAME) is None and not _nvcc():
        return f"the extension {NAME} was not built, and there is no nvcc to compile it now (CUDA_HOME names its place)"
    return ""


def _wrong_chip(device: torch.device | int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability == CHIP:
        return None
    where = f"cuda:{device}" if isinstance(device, int) else str(device)
    return f"{where} has compute capability {'.'.join(map(str, capability))}, the cuda backend needs 9.0"


def _no_chip() -> str:
    """Why none of the machine's GPUs can serve, "" if one can. Starts CUDA."""
    reasons = [_wrong_chip(device) for device in range(torch.cuda.device_count())]
    return "" if None in reasons else "; ".join(map(str, reasons))


@cache
def unusable() -> str:
    """Load the kernels, compiling them if need be. Returns, and logs once, what failed; "" if nothing did."""
    try:
        if compiled := find_spec(NAME) is None:
            from torch.utils import cpp_extension

            log.warning("compiling the CUDA kernels, once: this takes minutes")
            cpp_extension.CUDA_HOME = cuda_home(cpp_extension.CUDA_HOME)
            module = cpp_extension.load(**_build_arguments())
        else:
            import grok_kernels._CUDA as module
        reason = misfit(module, NAME, "install it again", compiled_here=compiled)
    except Exception as error:  # compilers, linkers and loaders each raise their own
        reason = f"the extension {NAME} does not compile or load ({type(error).__name__}: {error})"
    if reason:
        log.warning("no CUDA kernels, Triton serves: %s", reason)
    return reason


def _unusable_on(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"its tensors are on {tensor.device}, the cuda backend takes those on cuda"
    return _wrong_chip(tensors[0].device) or unusable() or None


def _supports_route(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> str | None:
    if x.shape[1] % 4:
        return f"D={x.shape[1]}, the cuda backend takes multiples of 4"
    if router.shape[0] > EXPERTS:
        return f"E={router.shape[0]}, the cuda backend takes {EXPERTS} at most"
    if k > CHOSEN:
        return f"k={k}, the cuda backend takes {CHOSEN} at most"
    return _unusable_on(x, router)


def _supports_route_and_group(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> str | None:
    if x.shape[0] * k > ROWS:
        return f"T={x.shape[0]} with k={k}, the cuda backend groups {ROWS} rows at most"
    return _supports_route(x, router, k, softcap, renormalize)


def _supports_group(experts: Tensor, num_experts: int) -> str | None:
    if num_experts > EXPERTS:
        return f"num_experts={num_experts}, the cuda backend takes {EXPERTS} at most"
    if experts.numel() > ROWS:
        return f"experts has {experts.numel()} entries, the cuda backend takes {ROWS} at most"
    return _unusable_on(experts)


def _supports_product(name: str, weight: Weight) -> str | None:
    """Why this weight has no product here, if so."""
    if reason := unsupported("cuda", [weight], ("rows",)):
        return reason
    e, n, k = weight.shape
    if not weight.values.is_contiguous():
        return f"{name} has strides {weight.values.stride()}, the cuda backend takes contiguous weights"
    if e > EXPERTS:
        return f"{name} has {e} experts, the cuda backend takes {EXPERTS} at most"
    if k < 16 or k % 16:
        return f"K={k} of {name}, the cuda backend takes multiples of 16"
    if n < 8 or n % 8:
        return f"N={n} of {name}, the cuda backend takes multiples of 8"
    groups = weight.planes[1].shape[1]
    if groups > 1 and weight.format == "fp8_e4m3":
        return f"{name} is fp8_e4m3 with {groups} groups of scales, the cuda backend takes one"
    if groups > 1 and k % (groups * GROUP):
        return (
            f"{name} has {groups} groups of K={k}, the cuda backend takes one or those of a multiple of {GROUP} columns"
        )
    return None


def _supports_gemm(x: Tensor, weight: Weight, *rest: Any) -> str | None:
    if reason := _supports_product("weight", weight):
        return reason
    wanted = torch.bfloat16 if weight.format == "int8" else torch.float8_e4m3fn
    if x.dtype != wanted:
        found, wanted_name = dtype_name(x.dtype), dtype_name(wanted)
        return f"x has dtype {found} for weights of {weight.format}, the cuda backend takes {wanted_name}"
    if x.shape[0] > PRODUCT_ROWS:
        return f"M={x.shape[0]}, the cuda backend takes {PRODUCT_ROWS} at most"
    return _unusable_on(x)


def _supports_moe(x: Tensor, *args: Any) -> str | None:
    layer = ExpertLayer(*args)
    for name, weight in (("w13", layer.w13), ("w2", layer.w2)):
        if reason := _supports_product(name, weight):
            return reason
    wanted = "none" if layer.w13.format == "int8" else "fp8"
    if layer.act_format != wanted:
        return f"act_format={layer.act_format!r} for weights of {layer.w13.format}, the cuda backend takes {wanted!r}"
    if x.dtype != torch.bfloat16:
        return f"x has dtype {dtype_name(x.dtype)}, the cuda backend takes bfloat16"
    if layer.experts.numel() > PRODUCT_ROWS:
        return f"experts has {layer.experts.numel()} entries, the cuda backend takes {PRODUCT_ROWS} at most"
    return _unusable_on(x)


def route_topk(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> Any:
    return torch.ops.grok_cuda.route_topk(x, router, k, softcap, renormalize)


def route_and_group(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> Any:
    """One launch for up to 512 tokens, two for more."""
    return torch.ops.grok_cuda.route_and_group(x, router, k, softcap, renormalize, counter(x.device))


def group_tokens(experts: Tensor, num_experts: int) -> Any:
    return torch.ops.grok_cuda.group_tokens(experts, num_experts)


def grouped_gemm(
    x_MK: Tensor,
    weight: Weight,
    offsets: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
    tile: int | None = None,
) -> Any:
    """tile: for tests and tuning, in place of what `tuning.swapped_tile` chooses."""
    if tile is None:
        m = x_MK.shape[0]
        tile = swapped_tile(weight.dtype, m, m // weight.shape[0], chip_of(x_MK.device))
    # `supports` cannot see whether addresses are multiples of 16; the launcher copies an x that is not aligned so, and
    # refuses any other operand
    return torch.ops.grok_cuda.grouped_gemm(x_MK, *weight.planes, offsets, x_scale, out_dtype or torch.bfloat16, tile)


def moe(x_TD: Tensor, *args: Any, tile: int | None = None) -> Any:
    """tile: as in `grouped_gemm`."""
    layer = ExpertLayer(*args)
    if not layer.experts.numel():
        return torch.zeros_like(x_TD)
    if tile is None:
        even = layer.experts.numel() // layer.w13.shape[0]
        tile = swapped_tile(layer.w13.dtype, x_TD.shape[0], even, chip_of(x_TD.device))
    return torch.ops.grok_cuda.moe(
        x_TD, layer.topk_weights, layer.experts, *layer.w13.planes, *layer.w2.planes, ACTIVATIONS[layer.activation],
        layer.order, layer.offsets, tile,
    )  # fmt: skip


if _reason := _missing():
    registry.mark_missing("cuda", _reason)
else:
    registry.check_late("cuda", _no_chip, unusable)
registry.register("route_topk", "cuda", supports=_supports_route)(route_topk)
registry.register("route_and_group", "cuda", supports=_supports_route_and_group)(route_and_group)
registry.register("group_tokens", "cuda", supports=_supports_group)(group_tokens)
registry.register("grouped_gemm", "cuda", supports=_supports_gemm)(grouped_gemm)
registry.register("moe", "cuda", supports=_supports_moe)(moe)
