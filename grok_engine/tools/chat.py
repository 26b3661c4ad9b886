"""A conversation in a terminal: streaming, with its history."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

import click

from grok_engine.llm import LLM, StreamChunk
from grok_engine.sampling.params import SamplingParams
from grok_engine.tokenizer.chat_files import has_template, load_chat
from grok_engine.tokenizer.load import load_tokenizer

_PROMPT = "> "
_HELP = "/reset forgets the conversation, /system TEXT also sets a system prompt, /exit or Ctrl-D ends, Ctrl-C stops"


def require_template(path: Path) -> None:
    """ValueError for a model that has no chat template. Reads no tokenizer where the files have one."""
    if not has_template(path):
        load_chat(path, load_tokenizer(path)).template()


class Conversation:
    """The turns so far, and a model that answers them. ValueError if the model has no chat template, or one that does
    not take the system prompt."""

    def __init__(
        self, llm: LLM, params: SamplingParams, *, system: str | None = None, chat_template: str | None = None
    ) -> None:
        self._llm, self._params, self._template = llm, params, chat_template
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget all turns, and set the system prompt."""
        messages = [{"role": "system", "content": system}] if system else []
        self._encode([*messages, {"role": "user", "content": "?"}])  # whether the template takes it
        self.system, self.turns = messages, list[list[dict[str, str]]]()

    def ask(self, text: str) -> tuple[int, Generator[StreamChunk]]:
        """The answer to `text`, and how many turns, the oldest, had to be forgotten to make room for it.

        The answer belongs to the history as far as it was read. ValueError if `text` alone does not fit, which leaves
        the conversation as it was.
        """
        question = {"role": "user", "content": text}
        self.turns = [turn for turn in self.turns if len(turn) == 2]  # not one without an answer
        room = self._llm.config.max_len
        answer = min(self._params.max_tokens or room, room // 4)  # tokens that are left for it
        for forgotten in range(len(self.turns) + 1):
            kept = self.turns[forgotten:]
            ids = self._encode([*self.system, *(message for turn in kept for message in turn), question])
            if len(ids) + answer <= room or (not kept and len(ids) < room):
                break
        else:
            raise ValueError(f"this text is too long: with the template it has {len(ids)} of {room} tokens")
        stream = self._llm.stream(ids, self._params)
        self.turns = [*kept, [question]]
        return forgotten, self._remember(stream)

    def _remember(self, stream: Iterator[StreamChunk]) -> Generator[StreamChunk]:
        turn, pieces = self.turns[-1], list[str]()
        try:
            for chunk in stream:
                pieces.append(chunk.text)
                yield chunk
        finally:
            if answer := "".join(pieces):
                turn.append({"role": "assistant", "content": answer})

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        return self._llm.apply_chat_template(messages, chat_template=self._template)


def run(conversation: Conversation) -> None:
    """Answer lines of standard input until it ends or says /exit. On a terminal Ctrl-C stops an answer; elsewhere it
    ends the program, and lines are read without a prompt."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # editing and history of `input`
        _say(f"{_HELP}.")
    lines = _typed() if interactive else (line.rstrip("\n") for line in sys.stdin)
    for line in lines:
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        try:
            if text.startswith("/"):
                _command(conversation, text)
            elif text:
                _answer(conversation, line)
        except UnicodeEncodeError:  # a terminal's bytes that are no text, as half surrogate pairs
            _say("this line is not text in UTF-8")
        except ValueError as error:
            _say(str(error))
        except KeyboardInterrupt:
            if not interactive:
                raise
            _say("\n(stopped)")


def _typed() -> Iterator[str]:
    with suppress(EOFError):
        while True:
            yield _typed_line()
    print()


def _typed_line() -> str:
    """What somebody types; Ctrl-C clears it."""
    try:
        return input(_PROMPT)
    except KeyboardInterrupt:
        _say(f"\n{_HELP}.")
        return ""


def _answer(conversation: Conversation, text: str) -> None:
    forgotten, chunks = conversation.ask(text)
    if forgotten:
        _say(f"(the context is full: forgot the first {forgotten} turn{'s' * (forgotten > 1)} of the conversation)")
    reason = None
    with closing(chunks):
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            reason = chunk.finish_reason
    print(flush=True)
    if reason == "length":
        _say("(the answer was cut off: it has as many tokens as it may)")


def _command(conversation: Conversation, text: str) -> None:
    name, _, rest = text.partition(" ")
    if name == "/reset":
        conversation.reset()
    elif name == "/system":
        conversation.reset(rest.strip())
    else:
        _say(f"{_HELP}." if name == "/help" else f"{name} is not a command: {_HELP}.")


def _say(text: str) -> None:
    """What the program says itself, apart from the answers."""
    click.secho(text, dim=True, err=True)
