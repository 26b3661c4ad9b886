"""The engine as a model of lm-eval, `grok_engine`, for its tasks as they are (the extra `eval`).

    python -m grok_engine.tools.lm_eval run --model grok_engine --model_args pretrained=DIR,dtype=float32 --tasks NAME

is lm-eval's own command with one model more. In a program, importing this module registers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from grok_engine.llm import LLM
from grok_engine.loading.resolve import resolve_model
from grok_engine.sampling.params import SamplingParams
from grok_engine.tokenizer.chat_files import load_chat
from grok_engine.tokenizer.chat_template import render

from .eval import prefix

BATCH = 256  # requests at once: bounds the log-probabilities in memory; the engine makes its own batches of them
SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
GREEDY_ONLY = {"num_beams": 1, "use_cache": True}  # what tasks say for transformers, and the one value that is served

OPEN = "\ue000\ue001"  # of private use: where a message that is not closed ends

Scored = tuple[tuple[str, str], list[int], list[int]]  # lm-eval's: the texts, the context, the continuation


@register_model("grok_engine")
class GrokEngineLM(TemplateLM):
    """pretrained: a model as `LLM` takes it; options: those of `EngineConfig`. Results are those of lm-eval's `hf`.

    max_length: tokens that go through the model for one request, at most; by default all that it takes. add_bos_token:
    None as the model's files say. batch_size and max_batch_size count for nothing: the engine fills its own batches.
    Control tokens spelled out in a task's texts are themselves, as chat templates need.
    """

    def __init__(
        self,
        pretrained: str | Path = "tiny",
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.llm = LLM(pretrained, **{"max_model_len": max_length, **options})
        if self.llm.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer: lm-eval's tasks are text")
        self._tokenizer = self.llm.tokenizer
        self._chat = load_chat(resolve_model(pretrained), self._tokenizer)
        self.max_length = self.llm.config.max_len
        self.max_gen_toks = int(max_gen_toks)
        self._before = prefix(self._tokenizer)
        if add_bos_token is not None:
            self._before = [self.prefix_token_id] if add_bos_token else []

    @property
    def eot_token_id(self) -> int:
        ids = self._tokenizer.eos_token_ids or self.llm.config.model.eos_token_ids
        if not ids:
            raise ValueError(f"{self.llm.config.model.name} has no EOS token")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """BOS, or EOS where the model has none: what an empty context is."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.llm.config.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self._tokenizer.encode(string, special=True)
        before = self._before if add_special_tokens in (None, True) else []
        return ids if add_special_tokens is None and ids[: len(before)] == before else [*before, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, as `hf` has it: without its system turns if the template takes none, and open in its
        last message if no answer is to begin."""
        messages = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            messages[-1]["content"] += OPEN
        try:
            return self._render(messages, add_generation_prompt)
        except ValueError:
            return self._render([m for m in messages if m["role"] != "system"], add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        values = {**self._chat.special, "messages": messages, "add_generation_prompt": add_generation_prompt}
        return render(self._chat.template(), values, self._chat.name).split(OPEN)[0]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, for the results' records."""
        return self._chat.template() if chat_template else ""

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of max_length that overlap by one token."""
        found: list[float] = []
        for request in requests:
            (string,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            scores = [self.llm.score([*context, *scored], first=len(context)) for context, scored in pairs]
            found.append(float(torch.cat(scores).double().sum()) if scores else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), found[-1])
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Σ log p of each continuation, and whether greedy decoding would give it.

        Continuations of one token that share their context take one forward pass together. Others are scored as
        prompts, many in a batch, but for those that fill the context and leave no room for a token after them.
        """
        whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        shared: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(whole):
            shared.setdefault(tuple(ids[:-1]), []).append(i)
        results: dict[int, tuple[float, bool]] = {}
        batched = [i for group in shared.values() if len(group) == 1 for i in group if len(whole[i]) < self.max_length]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        for at in range(0, len(batched), BATCH):
            part = batched[at : at + BATCH]
            for i, output in zip(part, self.llm.generate([whole[i] for i in part], params), strict=True):
                assert output.prompt_logprobs is not None
                found = [next(iter(each.values())) for each in output.prompt_logprobs[-len(requests[i][2]) :] if each]
                results[i] = sum(each.logprob for each in found), all(each.rank == 1 for each in found)
        for inputs, group in shared.items():
            if group[0] in results:
                continue
            longest = max(len(requests[i][2]) for i in group)
            logprobs_TV = torch.log_softmax(self.llm.logits(inputs, first=len(inputs) - longest), -1)
            greedy_T = logprobs_TV.argmax(-1)
            for i in group:
                targets = torch.tensor(requests[i][2], device=logprobs_TV.device)
                scores = logprobs_TV[-len(targets) :].gather(1, targets[:, None])
                results[i] = float(scores.sum()), bool((greedy_T[-len(targets) :] == targets).all())
        for i, (texts, _, _) in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", texts, results[i])
        return [results[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled where a task says so, up to a stop string, EOS or max_gen_toks."""
        texts: list[str] = []
        for at in range(0, len(requests), BATCH):
            part = [request.args for request in requests[at : at + BATCH]]
            prompts, params, stops = zip(*map(self._generation, part), strict=True)
            outputs = self.llm.generate(list(prompts), list(params), use_tqdm=not disable_tqdm)
            for args, output, stop in zip(part, outputs, stops, strict=True):
                if (error := output.outputs[0].error) is not None:
                    raise RuntimeError(error)
                texts.append(postprocess_generated_text(output.outputs[0].text, stop, None))
                self.cache_hook.add_partial("generate_until", args, texts[-1])
        return texts

    def _generation(self, args: tuple[str, dict[str, Any]]) -> tuple[list[int], SamplingParams, list[str]]:
        """Prompt, parameters and stop strings of one request."""
        context, given = args
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stop = [text for text in handle_stop_sequences(options.pop("until"), eos=None) if text]
        most, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature = options.pop("temperature", 1.0)
        for name, served in GREEDY_ONLY.items():
            if options.pop(name, served) != served:
                raise ValueError(f"{name}={given[name]!r} is not served: expected {served}")
        if unknown := sorted(set(options) - set(SAMPLING)):
            raise ValueError(f"generation_kwargs has {', '.join(unknown)}: expected among {', '.join(SAMPLING)}")
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}")
        params = SamplingParams(max_tokens=most, temperature=temperature if sampled else 0, stop=stop, **options)
        return self.tok_encode(context)[-room:] or [self.prefix_token_id], params, stop


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
