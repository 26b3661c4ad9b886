"""How many tokens each expert gets, against the routers' choices in the reference, one request at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import grok_kernels
from grok_engine import ConfigError, LLMEngine, ModelConfig, RequestOutput, RequestOutputKind, SamplingParams
from grok_engine.layers.moe import Router
from tests.engine.test_graphs import with_graphs
from tests.engine.test_invariance import (
    DEEP,
    GROUPED,
    SHAPES,
    SMALL,
    Request,
    facts,
    make_engine,
    make_traffic,
    plain_engine,
    run,
)  # fmt: skip

FINAL = RequestOutputKind.FINAL_ONLY
DTYPES = ("float32", "float32")


def routed_by_the_reference(engine: LLMEngine, ids: list[int]) -> np.ndarray:
    """experts_LTA of a sequence, by hooks on the routers of an eager engine."""
    found: list[np.ndarray] = []

    def hook(module: nn.Module, args: Any, result: tuple[Tensor, ...]) -> None:
        found.append(result[1].numpy().copy())

    routers = [module for module in engine.model.modules() if isinstance(module, Router)]
    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        with grok_kernels.use_backend("reference"):
            engine.logits(ids)
    finally:
        for handle in handles:
            handle.remove()
    return np.stack(found)


def expected_load(engine: LLMEngine, output: RequestOutput) -> list[list[int]]:
    """The prompt's tokens once, and those of each answer but its last."""
    prompt, model = output.prompt_token_ids, engine.config.model
    total = np.zeros((model.num_layers, model.num_experts), np.int64)
    for i, answer in enumerate(output.outputs):
        chosen_LTA = routed_by_the_reference(engine, [*prompt, *answer.token_ids[:-1]])
        for layer, experts_TA in enumerate(chosen_LTA):
            for expert in experts_TA[len(prompt) if i else 0 :].ravel():
                total[layer, expert] += 1
    listed: list[list[int]] = total.tolist()
    return listed


def counted(traffic: list[Request]) -> list[Request]:
    return [replace(r, params=replace(r.params, expert_load=True)) for r in traffic]


@pytest.mark.parametrize(
    ("model", "shape", "graphs"),
    [
        (SMALL, "few pages", "cpu"), (SMALL, "few pages", "stand-in"), (SMALL, "few pages", "off"),
        (GROUPED, "defaults", "stand-in"), (DEEP, "page of 3, chunks of 5 at most", "cpu"),
    ],
)  # fmt: skip
def test_the_load_is_that_of_the_reference(model: str, shape: str, graphs: str) -> None:
    """In chunks, forked, preempted and computed again, replayed with padding; and no other result changes."""
    options = {**SHAPES[shape], "expert_load": True, "enforce_eager": graphs == "off"}
    engine, plain = make_engine(model, *DTYPES, **options), plain_engine(model, *DTYPES)
    capture = with_graphs(engine, graphs) if graphs != "off" else None
    small = model == SMALL
    traffic = make_traffic(
        3, engine.config.model.vocab_size, requests=14 if small else 8, longest=60 if small else 30, last_arrival=4
    )
    finished = run(engine, counted(traffic))
    for i, output in finished.items():
        assert output.expert_load == expected_load(plain, output), traffic[i]
        (alone,) = run(plain, [Request(traffic[i].prompt, traffic[i].params)]).values()
        assert facts(output) == facts(alone)
    if shape == "few pages":
        assert engine.stats().scheduler.preemptions >= 1
    if capture is not None:
        assert capture.replayed > 3


def test_a_request_that_does_not_ask_counts_in_the_total_alone() -> None:
    engine = make_engine(SMALL, *DTYPES, expert_load=True)
    asks = SamplingParams(max_tokens=4, ignore_eos=True, seed=1, expert_load=True, output_kind=FINAL)
    outputs = run(engine, [Request(tuple(range(3, 40)), replace(asks, expert_load=asked)) for asked in (True, False)])
    assert outputs[0].expert_load is not None
    assert outputs[1].expert_load is None
    assert engine.stats().expert_load == (2 * np.array(outputs[0].expert_load)).tolist()
    again = run(engine, [Request(tuple(range(3, 40)), asks)])[0]
    assert again.expert_load == outputs[0].expert_load
    assert again.cached_tokens == 0, "a cached prefix has no choice of experts to count"


def test_it_is_counted_on_request_alone() -> None:
    engine = make_engine(SMALL, *DTYPES)
    assert engine.stats().expert_load is None
    with pytest.raises(ValueError, match=r"expert_load=True needs an engine that counts: LLM\(…, expert_load=True\)"):
        engine.add_request("x", [5], SamplingParams(expert_load=True))
    dense = ModelConfig(
        name="dense", vocab_size=32, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, dense_d_ff=64
    )
    with pytest.raises(ConfigError, match="expert_load=True is for models with experts: 'dense' has none"):
        LLMEngine(dense, expert_load=True)
