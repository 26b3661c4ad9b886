"""The child process that compiles a grammar first: one that crashes the library, or never ends, costs a child.

Run as a script, so that it starts without this project's packages. Arguments: the folder of the library, and the token
table's size, first byte token and end tokens as JSON. It reads one JSON object a line, {"kind", "text", "seconds"}, and
answers with one, {"grammar", "warnings"} or {"error"}. It ends with its standard input.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from types import ModuleType
from typing import Any

STACK_BYTES = 128 << 20  # of a thread that compiles, here; the engine's threads take twice as much
MEMORY_BYTES = 256 << 20  # what one grammar may take, beyond what the process has at its start
OPTIONS = "%llguidance"


class Tokenizer:
    """A tokenizer as the library expects it. The last 256 tokens are the bytes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], eos: list[int]) -> None:
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, eos[0], eos
        self._first_byte = len(tokens) - 256

    def __call__(self, text: Any) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        return [self._first_byte + byte for byte in data]


def token_table(library: ModuleType, tokens: list[bytes], eos: list[int]) -> Any:
    """The library's table of the model's tokens, by id, followed by the 256 bytes, so that any text can be spelled.

    End tokens get a text that no grammar has; the library marks special tokens with the byte 255, which no text has.
    """
    tokens = [*tokens, *(bytes([b]) for b in range(255)), b""]
    for token_id in eos:
        tokens[token_id] = b"<end %d>" % token_id
    return library.LLTokenizer(Tokenizer(tokens, eos), n_vocab=len(tokens), eos_token=eos)


def limits(library: ModuleType) -> Any:
    """Bounds of one matcher: the library's own, fewer lexer states (1 to 12 KB each), and errors without its state."""
    return library.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def in_lark(library: ModuleType, kind: str, text: str) -> str:
    """The grammar in the library's own format. ValueError if it has none."""
    if kind == "json_schema":
        text = f"start: %json {text}"
    elif kind == "regex":
        text = json.loads(library.LLMatcher.grammar_from_regex(text))["grammars"][0][
            "lark_grammar"
        ]  # the regex, quoted
    elif kind == "gbnf":
        text = library.grammar_from("gbnf", text)
    return unforced(text)


def unforced(lark: str) -> str:
    """The grammar with `no_forcing` set: by default a forced continuation may be spelled by one token sequence only."""
    options: dict[str, Any] = {}
    before, named, after = lark.partition(OPTIONS)
    if named:  # options may occur only once, and a translated grammar has them
        start = len(after) - len(after.lstrip())
        try:
            options, end = json.JSONDecoder().raw_decode(after, start)
        except ValueError as error:
            raise ValueError(f"{OPTIONS}: {error}") from None
        lark = before + after[end:]
    return f"{OPTIONS} {json.dumps({**options, 'no_forcing': True})}\n{lark}"


def failure(matcher: Any) -> str | None:
    """Why the library gave up on this grammar, shortened, or None."""
    if not matcher.is_error():
        return None
    reason = str(matcher.get_error()).split("\n<")[0].strip()  # the rest is the library's own state
    if reason.startswith("NoExtension"):
        return "no token can follow"
    return reason if len(reason) <= 300 else f"{reason[:300]}…"


def compiled(library: ModuleType, tokenizer: Any, kind: str, text: str) -> dict[str, Any]:
    try:
        grammar = in_lark(library, kind, text)
    except (ValueError, TypeError, RecursionError) as error:
        return {"error": str(error)}
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0, limits=limits(library))
    reason = failure(matcher)
    if reason is None:
        matcher.compute_bitmask()
        reason = failure(matcher)
    if reason is not None:
        return {"error": reason}
    return {"grammar": grammar, "warnings": matcher.get_grammar_warnings()}


def _bound_memory() -> None:
    """No core dump, and a limit on what is allocated from here on (Linux; elsewhere time alone bounds it)."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[0])
        size = pages * resource.getpagesize() + STACK_BYTES + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, OSError, ValueError):
        pass


def main() -> None:
    folder, vocabulary = sys.argv[1:]
    sys.path.append(folder)
    import llguidance

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that the library prints is an answer
    size, eos = json.loads(vocabulary)
    tokenizer = token_table(llguidance, [b""] * size, eos)
    os.nice(5)  # a model in the same machine comes first

    def serve() -> None:
        print("{}", file=answers, flush=True)  # ready
        for line in sys.stdin:
            job = json.loads(line)
            signal.alarm(math.ceil(job["seconds"]) + 1)  # ends this process even if nobody is left to kill it
            answer = compiled(llguidance, tokenizer, job["kind"], job["text"])
            signal.alarm(0)
            print(json.dumps(answer), file=answers, flush=True)

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=serve)
    _bound_memory()
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
