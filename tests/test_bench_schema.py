"""The result file: what is written comes back, samples only on request, and a bad file is named with the place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_bench import environment, schema
from tests import report_samples as samples


def engine_file() -> schema.ResultFile:
    file = samples.engine()
    run = replace(file.runs[0], slo={"ttft_ms": 500.0}, parameters={"seed": 0})
    return replace(file, results=[run], environment=environment.environment())


def kernels_file() -> schema.ResultFile:
    file = samples.kernels()
    state = schema.GpuState(
        watts=1.0, most_watts=2.0, limit_watts=3.0, clock_mhz=4.0, least_clock_mhz=5.0, celsius=6.0, held_back=0.5,
        readings=7,
    )  # fmt: skip
    first, *rest = file.kernels
    scores = [replace(first.scores[0], samples=[1.0, 2.0]), *first.scores[1:]]
    return replace(file, results=[replace(first, scores=scores, gpu=state), *rest])


@pytest.mark.parametrize("make", [engine_file, kernels_file])
def test_a_file_comes_back_as_it_was(tmp_path: Path, make: Callable[[], schema.ResultFile]) -> None:
    file, path = make(), tmp_path / "result.json"
    file.save(path, samples=True)
    assert schema.load(path) == file
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_samples_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    file, path = kernels_file(), tmp_path / "result.json"
    file.save(path)
    first, *rest = file.kernels
    scores = [replace(first.scores[0], samples=[]), *first.scores[1:]]
    assert schema.load(path) == replace(file, results=[replace(first, scores=scores), *rest]) != file


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    file = kernels_file()
    file.save(tmp_path / "result.json", samples=True)
    broken = replace(file, ceilings={"read": schema.Ceiling(unit="B/s", rate=math.nan)})
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path / "result.json")
    assert schema.load(tmp_path / "result.json") == file


def _change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *way, last = (int(step) if step.isdigit() else step for step in path.split("."))
        place: Any = values
        for step in way:
            place = place[step]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_change("schema", "grok-bench/1"), "has schema 'grok-bench/1', expected 'grok-bench/2'"),
        (_change("schema", KeyError), "has schema None"),
        (_change("kind", "kernel"), "kind is 'kernel', expected Literal['kernels', 'engine']"),
        (_change("kind", "kernels"), "results[0] lacks problem"),
        (_change("results", {}), "results is {}, expected list["),
        (_change("results.0.completed", KeyError), "results[0] lacks completed"),
        (_change("results.0.complete", 1), "results[0] has unknown complete"),
        (_change("results.0.completed", 1.5), "results[0].completed is 1.5, expected int"),
        (_change("results.0.completed", True), "results[0].completed is True, expected int"),
        (_change("results.0.protocol", "server"), "results[0].protocol is 'server', expected Literal['latency', "),
        (_change("results.0.metrics.ttft.p50", "x"), "results[0].metrics.ttft.p50 is 'x', expected float"),
        (_change("results.0.parameters.seed", []), "results[0].parameters.seed is [], expected str | int"),
        (_change("results.0.metrics.ttft", 3), "results[0].metrics.ttft is 3, expected an object"),
        (_change("environment.cores", None), "environment.cores is None, expected int"),
    ],
)
def test_a_bad_file_is_named_with_the_place(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    path = tmp_path / "result.json"
    engine_file().save(path, samples=True)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(schema.SchemaError, match=r"result\.json") as caught:
        schema.load(path)
    assert named in str(caught.value)


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(schema.SchemaError, match="cannot be read: No such file"):
        schema.load(tmp_path / "missing.json")
    for text in (b"{", b"\xff", b'{"schema": NaN}'):
        (tmp_path / "bad.json").write_bytes(text)
        with pytest.raises(schema.SchemaError, match=r"bad\.json is not valid JSON"):
            schema.load(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(schema.SchemaError, match="has schema None"):
        schema.load(tmp_path / "list.json")


def test_the_environment_names_the_machine() -> None:
    found = environment.environment()
    assert found.device == "cpu"
    assert found.chip.endswith(f"({found.cores} cores)")
    assert found.threads == torch.get_num_threads()
    assert found.torch == torch.__version__
    assert environment.peak_bytes() > 50 << 20
