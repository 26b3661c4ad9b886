"""Valid and hostile calls of the native functions, below the ops' checks. No call may touch memory that is not its own.

python -m tests.kernels.native_fuzz [--calls 20000] [--seed 0] [--first 0]

A call is made from the seed and its number alone; where the process dies, the number is the last one in the file that
is named at the start. Half of the tensors end at a page that cannot be accessed. A valid call must succeed, some faults
must be refused, and nothing may change that is only read, or after a refusal. `make sanitize` runs this under the
address and undefined-behaviour sanitizers, which see every access.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grok_kernels import _C, cpu, layouts
from grok_kernels.formats import FORMATS, Spec

REFUSALS = (ValueError, TypeError, RuntimeError, MemoryError)
DTYPES = (
    torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.int32, torch.int64, torch.float64,
    torch.float16, torch.bool, torch.complex64, torch.uint8, torch.quint8,
)  # fmt: skip
NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 64, 127, 2**31, 2**62, 2**63 - 1)
FRACTIONS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-45, 1e38)
TEXTS = ("", "silu", "none", "int8", "fp8", "panels", "rows", "bf16", "q4_k", *FORMATS, "x" * 1000, "a\0b")
WRITTEN = {
    "rope_store_kv": ("k_cache", "v_cache", "k_scale", "v_scale"), "pack_into": ("packed",), "pack_codes": ("packed",)
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


class Weight(NamedTuple):
    """What the native functions take for a weight, with nothing checked."""

    format: Any
    layout: Any
    shape: Any
    planes: Any


class Violation(AssertionError):
    """A call did what none may."""


def guarded(nbytes: int) -> Tensor:
    """Bytes that end where a page begins that cannot be accessed."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    page = mmap.PAGESIZE
    size = -(-nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    end = torch.frombuffer(memory, dtype=torch.uint8).data_ptr() + size
    if _libc.mprotect(ctypes.c_void_p(end), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=size - nbytes)


def tight(t: Tensor) -> Tensor:
    """A contiguous copy that ends where no memory follows. A view would not do: beyond its end its base goes on."""
    copy = guarded(t.numel() * t.element_size())
    copy.copy_(t.contiguous().flatten().view(torch.uint8))
    return copy.view(t.dtype).view(t.shape)


class Maker:
    """Makes the arguments of one call."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(40))

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised, of any strides whose last is 1; some with gaps between rows, some with swapped dimensions."""
        wide = list(shape)
        if len(shape) > 1 and self.random.random() < 0.3:
            wide[-1] += self.one(1, 8)
        swapped = len(shape) > 2 and self.random.random() < 0.3
        if swapped:
            wide[0], wide[1] = wide[1], wide[0]
        count = torch.Size(wide).numel()
        if self.random.random() < 0.5:
            flat = guarded(count * dtype.itemsize).view(dtype)
        else:
            flat = torch.zeros(count * dtype.itemsize, dtype=torch.uint8).view(dtype)
        view = flat.view(wide)
        view = view.transpose(0, 1) if swapped else view
        return view[..., : shape[-1]] if shape else view

    def values(self, *shape: int, dtype: torch.dtype = torch.float32, plain: bool = False) -> Tensor:
        """Random numbers or bytes; sometimes NaN, infinite or huge ones among them. plain: contiguous."""
        room = torch.zeros(shape, dtype=dtype) if plain else self.room(shape, dtype)
        if dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
            raw = torch.randint(0, 256, shape, generator=self.generator).to(torch.uint8)
            room.view(torch.uint8).copy_(raw)
            return room
        room.copy_(torch.randn(shape, generator=self.generator))
        if room.numel() and self.random.random() < 0.2:
            place = tuple(self.random.randrange(n) for n in shape)
            room[place] = self.one(*FRACTIONS)
        return room

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        tensor = torch.as_tensor(values, dtype=dtype)
        if tensor.dim() != 1 or self.random.random() < 0.5:
            return tensor
        flat = guarded(tensor.numel() * 4)
        return flat.view(dtype).copy_(tensor)

    def below(self, high: int, *shape: int) -> Tensor:
        return self.ints(torch.randint(0, max(1, high), shape, generator=self.generator))

    def floats(self) -> torch.dtype:
        return self.one(torch.float32, torch.bfloat16)

    def weight(self, e: int, n: int, k: int) -> Weight:
        """Of any format. In rows, codes of fewer than 8 bits are any bytes: their products mean nothing then."""
        format = self.one(*FORMATS)
        spec, in_bit_planes = self.spec(format, k), FORMATS[format].in_bit_planes
        layout = "panels" if spec.can_pack(n, k) and self.random.random() < 0.5 else "rows"
        planes = []
        for name, (shape, dtype) in spec.planes(layout, (e, n, k)).items():
            planes.append(self.values(*shape, dtype=dtype, plain=layout == "panels" and name == "values"))
            if layout == "panels" and (name == "values" or in_bit_planes):
                planes[-1] = tight(planes[-1])
        return Weight(format, layout, (e, n, k), tuple(planes))

    def spec(self, format: str, k: int) -> Spec:
        """Any numbers of groups that K columns can have."""
        names = FORMATS[format].planes
        if len(names) == 1:
            return Spec(format)
        counts = [g for g in (1, 2, 3, 4, 5, 8, 16, k or 1) if (k % g == 0 if k else g == 1)]
        groups = self.one(*counts)
        subgroups = self.one(*(g for g in counts if g % groups == 0)) if "subscales" in names else 0
        return Spec(format, groups, subgroups, self.one(*FORMATS[format].scales))

    def grouping(self, rows: int, e: int) -> tuple[Tensor, Tensor]:
        """order and offsets of so many slots."""
        order = torch.randperm(rows, generator=self.generator)
        cuts = sorted(self.random.randint(0, rows) for _ in range(e - 1))
        return self.ints(order), self.ints([0, *cuts, rows])


def rms_norm(m: Maker) -> dict[str, Any]:
    t, d = m.one(0, 1, 3), m.one(0, 1, 7, 64, 100)
    return {"x": m.values(t, d, dtype=m.floats()), "weight": m.values(d, dtype=m.floats()), "eps": 1e-5}


def sandwich_norm(m: Maker) -> dict[str, Any]:
    t, d, dtype = m.one(0, 1, 3), m.one(1, 7, 64, 100), m.floats()
    h, delta = m.values(t, d, dtype=dtype), m.values(t, d, dtype=dtype)
    post = m.one(None, m.values(d, dtype=m.floats()))
    return {"h": h, "delta": delta, "post_weight": post, "pre_weight": m.values(d), "eps": 1e-5}


def scaled_sum(m: Maker) -> dict[str, Any]:
    t, d, dtype = m.one(0, 1, 3), m.one(0, 1, 7, 64, 100), m.floats()
    return {"a": m.values(t, d, dtype=dtype), "b": m.values(t, d, dtype=dtype), "divisor": 1.5}


def quantize_fp8(m: Maker) -> dict[str, Any]:
    return {"x": m.values(m.one(0, 1, 3), m.one(0, 1, 127, 200), dtype=m.floats()), "group_size": m.one(0, 1, 128)}


def route_topk(m: Maker) -> dict[str, Any]:
    d, e = m.one(0, 1, 16, 33), m.one(1, 2, 8, 9)
    x, router = m.values(m.one(0, 1, 3), d, dtype=m.floats()), m.values(e, d)
    return {"x": x, "router": router, "k": m.one(1, e), "softcap": m.one(0.0, 30.0), "renormalize": m.one(True, False)}


def group_tokens(m: Maker) -> dict[str, Any]:
    e = m.one(1, 8, 64)
    return {"experts": m.below(e, m.one(0, 1, 5), m.one(0, 1, 2)), "num_experts": e}


def sample_top_p(m: Maker) -> dict[str, Any]:
    b, v = m.one(0, 1, 3), m.one(1, 2, 100, 1000)
    rows = {name: m.values(b).abs() for name in ("temperature", "top_p", "uniform")}
    return {"logits": m.values(b, v, dtype=m.floats()), **rows}


def grouped_gemm(m: Maker) -> dict[str, Any]:
    rows, e = m.one(0, 1, 5, 50), m.one(1, 1, 3)
    k, n = m.one(0, 1, 4, 30, 64, 130, 256), m.one(0, 1, 64, 70, 128)
    dtype = m.one(torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
    scale = None
    if dtype in (torch.int8, torch.float8_e4m3fn):
        scale = m.values(rows, m.one(1, -(-k // 128)))
    offsets = None if e == 1 and m.random.random() < 0.5 else m.grouping(rows, e)[1]
    out = m.one(None, torch.float32, torch.bfloat16)
    x = m.values(rows, k, dtype=dtype)
    return {"x": x, "weight": m.weight(e, n, k), "offsets": offsets, "x_scale": scale, "out_dtype": out}


def moe(m: Maker) -> dict[str, Any]:
    t, e, a, d, f = m.one(0, 1, 3, 9), m.one(1, 3), m.one(1, 2), m.one(1, 64, 70, 128), m.one(1, 60, 64, 128, 192)
    w13, w2 = m.weight(e, 2 * f, d), m.weight(e, d, f)
    while w13.layout == "panels" and f % 64:
        w13 = m.weight(e, 2 * f, d)
    order, offsets = m.one((None, None), m.grouping(t * a, e))
    return {
        "x": m.values(t, d, dtype=m.floats()), "topk_weights": m.values(t, a), "experts": m.below(e, t, a), "w13": w13,
        "w2": w2, "activation": m.one("gelu_tanh", "gelu", "silu"), "act_format": m.one("none", "fp8", "int8"),
        "order": order, "offsets": offsets,
    }  # fmt: skip


def moe_up(m: Maker) -> dict[str, Any]:
    whole = moe(m)
    t, a = whole["topk_weights"].shape
    order, offsets = m.grouping(t * a, whole["w13"].shape[0])
    return {
        "x": whole["x"], "order": order, "offsets": offsets, "active": a, "w13": whole["w13"],
        "activation": whole["activation"], "act_format": whole["act_format"],
    }  # fmt: skip


def moe_down(m: Maker) -> dict[str, Any]:
    t, e, a, d, f = m.one(0, 1, 3), m.one(1, 3), m.one(1, 2), m.one(1, 64, 70), m.one(1, 64, 130)
    order, offsets = m.grouping(t * a, e)
    dtype = m.one(torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
    scaled = dtype in (torch.int8, torch.float8_e4m3fn)
    return {
        "rows": m.values(t * a, f, dtype=dtype),
        "row_scale": m.values(t * a, -(-f // 128), plain=True) if scaled else None,
        "topk_weights": m.values(t, a, plain=True), "order": order, "offsets": offsets, "w2": m.weight(e, d, f),
        "out_dtype": m.floats(),
    }  # fmt: skip


def caches(m: Maker, g: int, c: int) -> dict[str, Any]:
    shape, dtype = (m.one(1, 4), g, m.one(1, 4)), m.one(torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    scaled = dtype == torch.float8_e4m3fn
    found = {name: m.values(*shape, c, dtype=dtype) for name in ("k_cache", "v_cache")}
    if m.random.random() < 0.2:  # interleaved in one tensor
        both = m.values(shape[0], 2, *shape[1:], c, dtype=dtype)
        found = {"k_cache": both[:, 0], "v_cache": both[:, 1]}
    return {**found, "k_scale": m.values(*shape) if scaled else None, "v_scale": m.values(*shape) if scaled else None}


def rope_store_kv(m: Maker) -> dict[str, Any]:
    t, g, c, dtype, length = m.one(0, 1, 3), m.one(1, 2), m.one(0, 2, 64), m.floats(), m.one(1, 9)
    kept = caches(m, g, c)
    places = kept["k_cache"].shape[0] * kept["k_cache"].shape[2]
    slots = torch.randperm(places, generator=m.generator)[:t] if places >= t else torch.full((t,), -1)
    return {
        "q": m.values(t, g * 2, c, dtype=dtype), "k": m.values(t, g, c, dtype=dtype),
        "v": m.values(t, g, c, dtype=dtype), "k_cache": kept["k_cache"], "v_cache": kept["v_cache"],
        "positions": m.below(length, t), "slots": m.ints(slots), "cos_sin": m.values(length, c),
        "k_scale": kept["k_scale"], "v_scale": kept["v_scale"],
    }  # fmt: skip


def paged_attention(m: Maker) -> dict[str, Any]:
    g, c, columns, b = m.one(1, 2), m.one(0, 1, 16, 64), m.one(1, 3), m.one(0, 1, 3)
    kept = caches(m, g, c)
    pages, _, size, _ = kept["k_cache"].shape
    lengths = [m.random.randint(1, columns * size) for _ in range(b)]
    counts = [m.random.randint(0, n) for n in lengths]
    starts = [sum(counts[:i]) for i in range(b + 1)]
    return {
        "q": m.values(starts[-1], g * m.one(1, 3), c, dtype=m.floats()), "k_cache": kept["k_cache"],
        "v_cache": kept["v_cache"], "block_table": m.below(pages, b, columns), "query_start": m.ints(starts),
        "seq_lens": m.ints(lengths), "max_query_len": 5, "scale": 0.3, "softcap": m.one(0.0, 30.0),
        "window": m.one(0, 1, 5), "temperature_len": m.one(0, 2), "k_scale": kept["k_scale"],
        "v_scale": kept["v_scale"],
    }  # fmt: skip


def pack_into(m: Maker) -> dict[str, Any]:
    e, n, k, dtype = m.one(1, 2), m.one(0, 64, 128), m.one(4, 68), m.one(torch.int8, torch.bfloat16)
    packed = torch.zeros(layouts.packed_shape(e, 192, k, dtype), dtype=dtype)
    weight = m.one(m.values(e, n, k, dtype=dtype), m.values(e, k, n, dtype=dtype).mT)
    return {"weight": weight, "packed": packed, "row": m.one(0, 64)}


def pack_codes(m: Maker) -> dict[str, Any]:
    e, n, k, bits = m.one(1, 2), m.one(0, 64, 128), m.one(32, 96), m.one(4, 5, 6)
    packed = torch.zeros(e, 3, k // 32, bits, 64, 4, dtype=torch.uint8)
    zero_point = m.one(0, 1 << bits - 1)
    values = torch.randint(-zero_point, (1 << bits) - zero_point, (e, n, k), dtype=torch.int8, generator=m.generator)
    return {
        "values": m.one(values, values.mT.contiguous().mT), "packed": packed, "row": m.one(0, 64),
        "zero_point": zero_point,
    }  # fmt: skip


def weight_rows(m: Maker) -> dict[str, Any]:
    n, k = m.one(1, 64, 70, 128), m.one(0, 1, 4, 30, 64, 130, 256)
    dtype = m.one(torch.float32, torch.bfloat16)
    return {"weight": m.weight(1, n, k), "rows": m.below(n, m.one(0, 3)), "multiplier": 2.5, "out_dtype": dtype}


FUNCTIONS: dict[str, Callable[[Maker], dict[str, Any]]] = {
    f.__name__: f
    for f in (
        rms_norm, sandwich_norm, quantize_fp8, route_topk, group_tokens, sample_top_p, grouped_gemm, moe, moe_up,
        moe_down, rope_store_kv, paged_attention, pack_into, pack_codes, weight_rows, scaled_sum,
    )
}  # fmt: skip
FUNCTIONS["quantize_int8"] = quantize_fp8


def spoil_tensor(m: Maker, t: Tensor, others: list[Tensor]) -> tuple[Any, bool]:
    """Something else in the place of t, and whether every call that reads it must be refused."""
    kind = m.random.randrange(18)
    if kind == 0:
        return tight(t.to(m.one(*DTYPES[:-1]))), False
    if kind in (1, 15) and t.dim():
        dim = m.random.randrange(t.dim())
        return tight(t.narrow(dim, 0, max(0, m.one(t.shape[dim] - 1, t.shape[dim] // 2)))), False
    if kind == 2:
        return m.one(t[None], t.flatten(), t[..., None]), False
    if kind == 3 and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2), False
    if kind == 4 and t.dim():
        return t[:1].expand(t.shape[0] + m.one(0, 1), *t.shape[1:]) if t.shape[0] else t, False
    if kind == 5:  # its sizes stay, its memory does not
        copy = t.clone()
        copy.untyped_storage().resize_(copy.untyped_storage().nbytes() // 2)
        return copy, copy.numel() > 0
    if kind == 6:
        return torch.empty(t.shape, dtype=t.dtype, device="meta"), True
    if kind == 7 and t.dtype.is_floating_point and t.dtype.itemsize > 1:
        return t.contiguous().to_sparse(), True
    if kind == 8 and t.element_size() > 1 and t.numel():  # not at a multiple of its elements' size
        raw = torch.zeros(t.numel() * t.element_size() + 1, dtype=torch.uint8)
        return torch.frombuffer(raw.numpy(), dtype=t.dtype, offset=1).view(t.shape), True
    if kind == 9 and t.dtype == torch.float32:
        return torch._neg_view(t), True
    if kind == 10 and others:
        return m.one(*others), False
    if kind == 11 and t.numel() > 1:
        return t.contiguous().as_strided(t.shape, [1] * t.dim()), False
    if kind == 12:
        return m.one(None, 3, "text", [t], 1.5), False
    if kind == 13 and t.dtype == torch.float32:
        return torch._efficientzerotensor(t.shape), True
    if kind == 14 and t.numel():
        copy = t.clone()
        copy.data = tight(copy.flatten()[: m.random.randint(0, copy.numel() - 1)])
        return copy, False
    if t.dtype in (torch.int32, torch.int64) and t.numel():
        copy = t.clone()
        copy.view(-1)[m.random.randrange(t.numel())] = m.one(-(2**31), -2, -1, 0, 1, 7, 64, 2**31 - 1)
        return copy, False
    return t * float("nan") if t.dtype.is_floating_point and t.dtype.itemsize > 1 else t, False


def spoil(m: Maker, value: Any, others: list[Tensor]) -> tuple[Any, bool]:
    """As `spoil_tensor`, for an argument of any type."""
    if isinstance(value, Tensor):
        return spoil_tensor(m, value, others)
    if isinstance(value, Weight):
        field = m.random.choice(Weight._fields)
        if field == "shape":
            shape = list(value.shape)
            shape[m.random.randrange(3)] = m.one(*NUMBERS)
            return value._replace(shape=m.one(tuple(shape), shape, shape[:2], None)), False
        if field != "planes":
            return value._replace(**{field: m.one(*TEXTS, None, 3)}), False
        planes = list(value.planes)
        at = m.random.randrange(len(planes))
        planes[at], must = spoil_tensor(m, planes[at], [*planes, *others])
        if m.random.random() < 0.2:
            return value._replace(planes=m.one((), planes, tuple(planes * 2), tuple(planes[::-1]))), False
        return value._replace(planes=tuple(planes)), must
    if isinstance(value, torch.dtype):
        return m.one(*DTYPES), False
    if isinstance(value, bool) or value is None:
        return m.one(True, None, 3, *others), False
    choices: tuple[Any, ...] = {int: NUMBERS, float: FRACTIONS, str: TEXTS}.get(type(value), (None,))
    return m.one(*choices, None), False


def tensors_of(args: dict[str, Any]) -> dict[str, Tensor]:
    """The plain tensors, by name; those of a weight with the plane's number."""
    found: dict[str, Any] = {}
    for name, value in args.items():
        if isinstance(value, Weight) and isinstance(value.planes, tuple):
            found |= {f"{name} {i}": plane for i, plane in enumerate(value.planes)}
        found[name] = value
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def bytes_of(t: Tensor) -> bytes | None:
    """All of its storage; None where it has none that could be read."""
    if t.device.type != "cpu" or t.layout != torch.strided or t.is_neg() or t._is_zerotensor():
        return None
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy().tobytes()


def try_call(seed: int, number: int) -> bool:
    """Makes one call. Whether it succeeded; Violation where it did what it must not."""
    m = Maker(seed, number)
    name = m.random.choice(list(FUNCTIONS))
    args = FUNCTIONS[name](m)
    hostile, must = m.random.random() < 0.7, []
    for at in m.random.sample(list(args), m.one(1, 1, 2) if hostile else 0):
        args[at], refused = spoil(m, args[at], list(tensors_of(args).values()))
        must.append(refused)
    written = WRITTEN.get(name, ())
    before = {key: bytes_of(t) for key, t in tensors_of(args).items()}
    call = f"call {number} of seed {seed}, {name}"
    torch.set_num_threads(m.one(1, 1, 1, 2))
    try:
        with cpu.use_isa(m.random.choice(cpu.isas())):
            getattr(_C, name)(*args.values())
        error = None
    except REFUSALS as refusal:
        error = refusal
    if error is not None and not hostile:
        raise Violation(f"{call}: a valid call is refused: {error}")
    if error is None and len(must) == 1 and must[0] and not name.startswith("pack"):
        raise Violation(f"{call}: must be refused")
    for key, t in tensors_of(args).items():
        if before[key] != bytes_of(t) and (error is not None or key not in written):
            raise Violation(f"{call}: {key} has changed")
    return error is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    a = parser.parse_args()
    if folder := os.environ.get("GROK_TEST_NATIVE"):  # the module of `make sanitize`, and no other of the same name
        assert Path(_C.__file__).is_relative_to(Path(folder).resolve()), f"{_C.__file__} is not in {folder}"
    with tempfile.NamedTemporaryFile(prefix="native_fuzz", delete=False) as file:
        print(f"seed {a.seed}: {a.calls} calls; the number of the last one is in {file.name}", flush=True)
        succeeded = 0
        for number in range(a.first, a.first + a.calls):
            os.pwrite(file.fileno(), f"{number:9}\n".encode(), 0)
            succeeded += try_call(a.seed, number)
    os.unlink(file.name)
    print(f"{succeeded} succeeded, {a.calls - succeeded} were refused")


if __name__ == "__main__":
    main()
