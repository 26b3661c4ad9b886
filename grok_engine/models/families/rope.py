"""Rotary scaling, in the keys of transformers, as divisors of the frequencies.

f_i = theta^(−2i/C) becomes f_i / factors[i], whatever the method; a factor on cosines and sines scales the scores.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from grok_engine.config import is_number

MAX_HEAD_DIM = 1 << 14  # ModelConfig refuses more, later
# What the methods of transformers read; a near miss is a typo, which must not become a default.
KEYS = (
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
    "truncate", "short_factor", "long_factor", "finetuned",
)  # fmt: skip
SERVED = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_fields(
    values: Mapping[str, Any], default_theta: float, head_dim: int, max_position: int, problems: list[str]
) -> tuple[dict[str, Any], float]:
    """`rope_theta` and `rope_factors` of ModelConfig, and the factor on cosines and sines.

    transformers 4.3x has `rope_theta` and `rope_scaling` side by side, 5.x has both in `rope_parameters`. What is wrong
    or not served is added to `problems`.
    """
    head_dim = min(head_dim, MAX_HEAD_DIM)
    merged: dict[str, Any] = {}
    flat = {"rope_theta": values.get("rope_theta")}
    for key, group in (("rope_theta", flat), *((k, values.get(k)) for k in ("rope_parameters", "rope_scaling"))):
        if group is not None and not isinstance(group, dict):
            problems.append(f"{key}={group!r} is not an object or null")
            continue
        for name, value in (group or {}).items():
            if name not in KEYS and (near := difflib.get_close_matches(name, KEYS, 1, 0.85)):
                problems.append(f"unknown key {name!r} in {key}: expected {near[0]!r}")
            name = "rope_type" if name == "type" else name
            if value is not None and merged.setdefault(name, value) != value:
                problems.append(f"{name} is {merged[name]!r} in one place and {value!r} in {key}")
    if (original := values.get("original_max_position_embeddings")) is not None:
        merged["original_max_position_embeddings"] = original
    partial = merged.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        problems.append(f"partial_rotary_factor={partial!r} is not served, expected 1")

    def number(key: str, default: float | None = None) -> float:
        value: Any = merged.get(key, default)
        if is_number(value) and 1e-12 < value < 1e12:
            return float(value)
        problems.append(f"{key}={value!r} of the rotary embedding is not a number in 1e-12..1e12")
        return 1.0

    fields: dict[str, Any] = {"rope_theta": number("rope_theta", default_theta), "rope_factors": ()}
    kind, attention = merged.get("rope_type", "default"), 1.0
    if kind not in SERVED:
        problems.append(f"rope_type={kind!r} is not served, expected one of {', '.join(SERVED)}")
    elif kind == "linear":
        fields["rope_factors"] = (number("factor"),) * (head_dim // 2)
    elif kind == "llama3":
        fields["rope_factors"] = _llama3(head_dim, fields["rope_theta"], max_position, number)
    elif kind == "yarn":
        fields["rope_factors"] = _yarn(
            head_dim, fields["rope_theta"], max_position, merged.get("truncate", True), number
        )
        attention = _attention_factor(merged, number)
    # "dynamic" changes frequencies only beyond max_position, where no request goes
    return fields, attention


def _llama3(head_dim: int, theta: float, max_position: int, number: Callable[..., float]) -> tuple[float, ...]:
    """Wavelengths beyond original / low divided by the factor, those under original / high kept, a ramp between."""
    factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
    original = number("original_max_position_embeddings", max_position)
    factors = []
    for i in range(head_dim // 2):
        turns = original * theta ** (-2 * i / head_dim) / (2 * math.pi)
        kept = 1.0 if turns > high else 0.0 if turns < low or high == low else (turns - low) / (high - low)
        factors.append(1 / ((1 - kept) / factor + kept))
    return tuple(factors)


def _yarn(
    head_dim: int, theta: float, max_position: int, truncate: bool, number: Callable[..., float]
) -> tuple[float, ...]:
    """A ramp over the index of the frequency, between those that turn beta_fast and beta_slow times over the original
    context (Peng et al., arXiv 2309.00071)."""
    factor, original = number("factor"), number("original_max_position_embeddings", max_position)

    def index(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) if theta > 1 else 0.0

    first, last = index(number("beta_fast", 32)), index(number("beta_slow", 1))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 * (first == last)
    divided = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(head_dim // 2)]
    return tuple(1 / (share / factor + 1 - share) for share in divided)


def _attention_factor(merged: Mapping[str, Any], number: Callable[..., float]) -> float:
    """0.1 ln(factor) + 1 unless the file says otherwise."""
    if "attention_factor" in merged:
        return number("attention_factor")
    factor = number("factor")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if merged.get("mscale") and merged.get("mscale_all_dim"):
        return magnitude(number("mscale")) / magnitude(number("mscale_all_dim"))
    return magnitude(1.0)
