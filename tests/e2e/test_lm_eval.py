"""The adapter for lm-eval: tasks on local data, as they are, give what lm-eval's own model of transformers gives.

Needs the extra `eval` and lm-eval's own `hf`, 700 MB in all: `make more` has an environment with them.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine.judged import TEXT, write_llama

if not os.environ.get("GROK_TEST_MORE"):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: `make more` runs these")

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "generation": {
        "output_type": "generate_until", "doc_to_text": "Q{{text}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["a", "\n"], "max_gen_toks": 12, "do_sample": False, "num_beams": 1},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
# Contexts: empty, short, and longer than the model's 64 tokens; choices of one token, of several, and one that is long.
DOCS: list[dict[str, Any]] = [
    {"text": text, "choices": choices, "answer": i % 2}
    for i, text in enumerate(["", "It was", "the best of times ", TEXT[:70], TEXT])
    for choices in ([" a", " b", " c"], [" the worst", "es of"], [TEXT[:50], "?"])
]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_tasks(folder: Path) -> None:
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        values = {"task": name, "test_split": "test", **data, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Any]:
    """The results of both, by model and whether the tasks are written as turns."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    import lm_eval
    from lm_eval.tasks import TaskManager

    import grok_engine.tools.lm_eval  # noqa: F401  registers the model

    folder = write_llama(tmp_path_factory.mktemp("llama"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tasks = tmp_path_factory.mktemp("tasks")
    write_tasks(tasks)
    return {
        (model, chat): lm_eval.simple_evaluate(
            model=model, model_args={"pretrained": str(folder), "dtype": "float32"}, tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False), device="cpu", batch_size=1,
            bootstrap_iters=0, log_samples=True, apply_chat_template=chat,
            system_instruction="Be brief." if chat else None,
        )
        for model in ("hf", "grok_engine")
        for chat in (False, True)
    }  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chat", [False, True])
def test_every_answer_is_that_of_transformers(chat: bool, task: str, found: dict[tuple[str, bool], Any]) -> None:
    """With chat, the turns are those of a template that takes no system turn."""
    theirs, ours = (found[model, chat]["samples"][task] for model in ("hf", "grok_engine"))
    assert len(ours) == len(DOCS) or task == "rolling"
    for a, b in zip(ours, theirs, strict=True):
        assert ("<s>assistant" in str(a["arguments"])) == (chat and task != "rolling")
        for mine, yours in zip(a["resps"], b["resps"], strict=True):
            if task == "generation":
                assert mine == yours, a["doc"]
            elif task == "choice":
                assert float(mine[0][0]) == pytest.approx(float(yours[0][0]), abs=1e-4), a["doc"]
                assert mine[0][1] == yours[0][1]
            else:
                assert float(mine[0]) == pytest.approx(float(yours[0]), rel=1e-6), a["doc"]


def test_every_figure_is_that_of_transformers(found: dict[tuple[str, bool], Any]) -> None:
    theirs, ours = (found[model, False]["results"] for model in ("hf", "grok_engine"))
    figures = {
        (task, name): value for task, values in ours.items() for name, value in values.items() if "," in str(name)
    }
    assert {name.split(",")[0] for _, name in figures} >= {"acc", "acc_norm", "bits_per_byte", "exact_match"}
    for (task, name), value in figures.items():
        wanted = theirs[task][name]
        if isinstance(value, float) and not math.isnan(value):
            assert value == pytest.approx(wanted, rel=1e-5), (task, name)
    assert 0 < ours["choice"]["acc,none"] < 1
