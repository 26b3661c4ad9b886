"""Grammars that would crash, stall or starve a process, and what a schema must not lose."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grok_engine import LLM, RequestOutput, SamplingParams, StructuredOutput
from grok_engine.sampling import structured as structured_module
from grok_engine.sampling.grammar_limits import check_grammar
from grok_engine.sampling.structured import StructuredCompiler, StructuredMatcher
from grok_engine.tokenizer.base import Tokenizer
from grok_engine.tokenizer.hf import HFTokenizer
from tests.engine.test_structured import LIMITS, byte_level

pytest.importorskip("llguidance", reason="the extra `structured` is not installed")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return HFTokenizer(byte_level(tmp_path_factory.mktemp("tokenizer")))


def compiler_of(tokenizer: Tokenizer, **limits: Any) -> StructuredCompiler:
    return StructuredCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, replace(LIMITS, **limits))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> StructuredCompiler:
    return compiler_of(tokenizer)


def references(number: int, **definition: Any) -> str:
    chain = {f"d{i}": {**definition, "$ref": f"#/$defs/d{i + 1}"} for i in range(number)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**chain, f"d{number}": {"type": "boolean"}}})


def rules(number: int, arrow: str, start: str) -> str:
    chain = "".join(f"r{i} {arrow} r{i + 1}\n" for i in range(number))
    return f'{start} {arrow} r0\n{chain}r{number} {arrow} "a"\n'


def nested(number: int, **around: Any) -> Any:
    schema: Any = {"type": "boolean"}
    for _ in range(number):
        schema = {**around, "items": schema}
    return schema


def terminals(number: int) -> str:
    return "start: T0\n" + "".join(f"T{i}: T{i + 1}\n" for i in range(number)) + f'T{number}: "a"\n'


# What crashed the process, or kept it busy for minutes, and larger than that
BEYOND: dict[str, tuple[StructuredOutput, str]] = {
    "3,000 references": (
        StructuredOutput(json_schema=references(3000)),
        "has 105846 bytes, more than max_grammar_byte",
    ),
    "1,500 references": (StructuredOutput(json_schema=references(1500)), "has 1501 rules or references, more than max"),
    "an escaped $ref": (
        StructuredOutput(json_schema=references(1500).replace("$ref", "\\u0024ref")),
        "has 1501 rules or references",
    ),
    "as an object": (StructuredOutput(json_schema=json.loads(references(1500))), "has 1501 rules or references"),
    "in Lark": (StructuredOutput(grammar=f"start: %json {references(1500)}"), "has 1502 rules or references"),
    "3,000 rules of Lark": (StructuredOutput(grammar=rules(3000, ":", "start")), "has 3002 rules or references"),
    "3,000 rules of GBNF": (StructuredOutput(grammar=rules(3000, "::=", "root")), "has 3002 rules or references"),
    "3,000 terminals": (StructuredOutput(grammar=terminals(3000)), "has 3002 rules or references"),
    "deep schema": (StructuredOutput(json_schema=nested(150)), "is nested 151 deep, more than max_grammar_depth=100"),
    "very deep schema": (StructuredOutput(json_schema="[" * 30_000 + "]" * 30_000), "recursion"),
    "very deep object": (StructuredOutput(json_schema=nested(5000)), "recursion"),
    "very deep JSON in Lark": (StructuredOutput(grammar="start: %json " + '{"a":' * 10_000), "%json .*recursion"),
    "deep regex": (StructuredOutput(regex="(" * 30_000 + ")" * 30_000), "is nested 30000 deep"),
    "deep Lark": (StructuredOutput(grammar="start: " + "(" * 5000 + '"a"' + ")" * 5000), "is nested 5000 deep"),
    "deep GBNF": (StructuredOutput(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "is nested 5000 deep"),
    "repetitions": (StructuredOutput(json_schema={"type": "string", "maxLength": 2**40}), "regex parse error"),
    "10 MB of alternatives": (StructuredOutput(regex="|".join("word" for _ in range(2_000_000))), "has 9999999 bytes"),
    "half a surrogate pair": (StructuredOutput(regex="\ud800"), "is not valid Unicode"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_grammar_beyond_a_limit_is_refused(compiler: StructuredCompiler, case: str) -> None:
    structured, message = BEYOND[case]
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        compiler.matcher(structured)
    assert len(str(caught.value)) < 600
    assert time.monotonic() - started < 20


QUADRATIC = {
    "classes that do not end": StructuredOutput(regex="[" * 65000),
    "strings that do not end": StructuredOutput(grammar='root ::= "' + '\\"' * 32000),
    "classes of GBNF": StructuredOutput(grammar="root ::= " + "[" * 65000),
    "regexes of Lark": StructuredOutput(grammar="start: " + "/\\" * 32000),
    "strings of Lark": StructuredOutput(grammar="start: " + '"\\' * 32000),
    "empty lines": StructuredOutput(grammar="\n" * 65000),
    "spaces": StructuredOutput(grammar="start" + " " * 65000),
    "keys": StructuredOutput(json_schema="{" + ", ".join(f'"{i}": 1' for i in range(5000)) + ', "4999": 2}'),
    "digits": StructuredOutput(json_schema=f'{{"const": {"9" * 65000}}}'),
    "numbers": StructuredOutput(json_schema=f'{{"enum": [{", ".join(map(str, range(9000)))}]}}'),
}


@pytest.mark.parametrize("case", QUADRATIC)
def test_checking_takes_linear_time(case: str) -> None:
    """It holds the GIL. These took 10 seconds and more with a pattern that tries again at every character."""
    started = time.thread_time()
    with contextlib.suppress(ValueError):
        check_grammar(QUADRATIC[case], LIMITS)
    assert time.thread_time() - started < 2


WITHIN = {
    "references": StructuredOutput(json_schema=references(990)),
    "references beside a type": StructuredOutput(json_schema=references(900, type="boolean")),
    "Lark": StructuredOutput(grammar=rules(990, ":", "start")),
    "GBNF": StructuredOutput(grammar=rules(990, "::=", "root")),
    "terminals": StructuredOutput(grammar=terminals(900)),
    "schema": StructuredOutput(json_schema=nested(95, type="array")),
    "regex": StructuredOutput(regex="(" * 99 + "a" + ")" * 99),
    "brackets that are not nested": StructuredOutput(regex=r"[(\[]{3}" + r"\(" * 200),
    "brackets in strings": StructuredOutput(grammar='root ::= "' + "(" * 200 + '" [(]'),
    "colons in a schema": StructuredOutput(
        grammar="start: %json " + json.dumps({"enum": [{"a": 1, "b": i} for i in range(600)]})
    ),
    "alternatives": StructuredOutput(regex="|".join(f"w{i}" for i in range(9000))),
}


@pytest.mark.parametrize("case", WITHIN)
def test_a_grammar_within_the_limits_runs_on_a_small_stack(compiler: StructuredCompiler, case: str) -> None:
    """Compiling has a stack of its own; what a step does must not need one."""
    matcher = compiler.matcher(WITHIN[case])
    found: list[int] = []

    def run(matcher: StructuredMatcher) -> None:
        rng = random.Random(0)
        for _ in range(20):
            matcher = matcher.copy()
            fits = np.flatnonzero(np.unpackbits(matcher.allowed(), bitorder="little")).tolist()
            found.append(rng.choice(fits))
            if found[-1] in compiler._vocabulary.eos:
                return
            matcher.accept(found[-1])

    before = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=run, args=(matcher,))
        thread.start()
    finally:
        threading.stack_size(before)
    del matcher
    thread.join()
    assert len(found) >= 2


def test_what_kills_the_library_kills_a_child(tokenizer: Tokenizer) -> None:
    compiler = compiler_of(tokenizer, max_bytes=1 << 24, max_rules=1 << 20)
    with pytest.raises(ValueError, match=r"the grammar library died of it \(exit status -11\)"):
        compiler.matcher(StructuredOutput(json_schema=references(60_000)))
    compiler.matcher(StructuredOutput(regex="a+"))


def test_a_grammar_that_takes_too_long_is_refused_while_others_run(tokenizer: Tokenizer) -> None:
    """42 bytes took 18 seconds. The time passes in another process, so threads of this one run on."""
    compiler = compiler_of(tokenizer, seconds=1.0)
    compiler.matcher(StructuredOutput(regex="a"))  # the tables are built
    done, ticks = threading.Event(), 0

    def compile_slowly() -> None:
        slow = StructuredOutput(json_schema={"type": "integer", "multipleOf": 1000003})
        with pytest.raises(ValueError, match="takes longer than grammar_seconds=1"):
            compiler.matcher(slow)
        done.set()

    thread = threading.Thread(target=compile_slowly)
    thread.start()
    while not done.wait(0.01) and thread.is_alive():
        ticks += 1
    thread.join()
    assert done.is_set()
    assert ticks > 20
    compiler.matcher(StructuredOutput(regex="b"))


def test_threads_share_one_compilation_of_a_grammar(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = compiler_of(tokenizer)
    check, checked = compiler._checker, []

    def counted(kind: str, text: str) -> tuple[str, list[str]]:
        checked.append(text)
        time.sleep(0.05)
        return check(kind, text)

    monkeypatch.setattr(compiler, "_checker", counted)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for regex in ("a{3}", "b+", f"c{{{number}}}"):
                matcher = compiler.matcher(StructuredOutput(regex=regex))
                assert not matcher.complete
            with pytest.raises(ValueError, match="unclosed"):
                compiler.matcher(StructuredOutput(regex="("))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert checked.count("a{3}") == checked.count("b+") == 1


def fill(matcher: StructuredMatcher, steps: int) -> None:
    for _ in range(steps):
        fits = np.flatnonzero(np.unpackbits(matcher.allowed(), bitorder="little"))
        matcher.accept(int(fits[fits > 2][0]))


def test_a_grammar_that_exhausts_the_library_ends_its_own_request(compiler: StructuredCompiler) -> None:
    """Matchers that share the library's tables fail together; so those of two requests must not."""
    structured = StructuredOutput(regex=r"\p{L}?" * 100)
    first, second = compiler.matcher(structured), compiler.matcher(structured)
    with pytest.raises(ValueError, match="too many expressions"):
        fill(first, 60)
    second.allowed()
    with pytest.raises(ValueError, match="structured output"):
        first.allowed()


def test_an_ambiguous_grammar_ends_its_own_request(
    compiler: StructuredCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured_module, "_BURST_SECONDS", 0.1)
    monkeypatch.setattr(structured_module, "_TOKEN_SECONDS", 0.002)
    structured = StructuredOutput(grammar='start: s\ns: s s | "a"\n')
    first, second = compiler.matcher(structured), compiler.matcher(structured)
    with pytest.raises(ValueError, match="the grammar costs more than 2 ms a token"):
        fill(first, 2000)
    fill(second, 5)
    fill(compiler.matcher(StructuredOutput(regex="a*")), 200)


# Numbers and keys


def accepts(compiler: StructuredCompiler, tokenizer: Tokenizer, structured: StructuredOutput) -> Callable[[str], bool]:
    """Whether a text is one that the schema allows."""
    matcher = compiler.matcher(structured)

    def allowed(text: str) -> bool:
        copy = matcher.copy()
        try:
            for token in tokenizer.encode(text):
                copy.accept(token)
        except ValueError:
            return False
        return copy.complete

    return allowed


REFUSED = [
    "9007199254740993", "-9007199254740993", "18446744073709551615", "-9223372036854775808", "1e400", "-1e400", "1e22",
    "1e99999999999999999999", "0.1234567890123456789", "0.00023308445025757262", "1e-40", "9" * 5000, "NaN", "Infinity",
    "-Infinity",
]  # fmt: skip


@pytest.mark.parametrize("number", REFUSED, ids=lambda n: n[:20])
@pytest.mark.parametrize(
    "schema",
    ['{"enum": [0, %s]}', '{"const": {"a": [%s]}}', '{"type": "integer", "minimum": %s}', '{"default": {"x": %s}}'],
)
def test_a_number_that_fp64_would_change_is_refused(compiler: StructuredCompiler, schema: str, number: str) -> None:
    for structured in (
        StructuredOutput(json_schema=schema % number),
        StructuredOutput(grammar=f"start: %json {schema % number}"),
    ):
        with pytest.raises(ValueError, match="has the number") as caught:
            compiler.matcher(structured)
        assert number[:40] in str(caught.value)


@pytest.mark.parametrize("number", [2**53 + 1, 10**30, 1e300, float("nan"), float("inf"), 0.1 + 0.2])
def test_a_number_of_an_object_is_refused_too(compiler: StructuredCompiler, number: float) -> None:
    with pytest.raises(ValueError, match="has the number"):
        compiler.matcher(StructuredOutput(json_schema={"type": "number", "maximum": number}))


def test_numbers_that_are_taken_are_kept_exactly(compiler: StructuredCompiler, tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    numbers = ["9007199254740992", "-9007199254740992", "-0", "0.1", "0.30000000000000", "123456789.125", "1e-7"]
    numbers += [str(rng.randint(-(2**53), 2**53)) for _ in range(40)]
    numbers += [f"{rng.randint(-(10**15), 10**15)}e-{rng.randint(0, 22)}" for _ in range(160)]
    allowed = accepts(compiler, tokenizer, StructuredOutput(json_schema=f'{{"enum": [{", ".join(numbers)}]}}'))
    for number in numbers:
        exact = format(Decimal(number) + 0, "f")
        exact = exact.rstrip("0").rstrip(".") if "." in exact else exact
        assert allowed(exact), number
        assert not allowed(exact + "1")


def test_bounds_hold_at_their_edges(compiler: StructuredCompiler, tokenizer: Tokenizer) -> None:
    top = 2**53
    allowed = accepts(
        compiler, tokenizer, StructuredOutput(json_schema={"type": "integer", "minimum": -top, "maximum": top})
    )
    for value, fits in ((top, True), (top + 1, False), (-top, True), (-top - 1, False), (0, True)):
        assert allowed(str(value)) is fits


@pytest.mark.parametrize("text", ['{"const": 1, "const": 2}', '{"properties": {"a": {}, "\\u0061": {}}}'])
def test_a_key_given_twice_is_refused(compiler: StructuredCompiler, text: str) -> None:
    with pytest.raises(ValueError, match=r"has the key '(const|a)' twice"):
        compiler.matcher(StructuredOutput(json_schema=text))
    with pytest.raises(ValueError, match="twice"):
        compiler.matcher(StructuredOutput(json_schema={"enum": [{1: "a", "1": "b"}]}))


# Whitespace, and ends


def test_json_is_compact_unless_asked(compiler: StructuredCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]}
    compact = accepts(compiler, tokenizer, StructuredOutput(json_schema=schema))
    flexible = accepts(compiler, tokenizer, StructuredOutput(json_schema=schema, whitespace="flexible"))
    for text, fits in (
        ('{"a":1,"b":[1,2]}', True), ('{"a": 1, "b": [1, 2]}', True), ('{"a":  1}', False), ('{ "a": 1}', False),
        ('{"a": 1\n}', False), ('{"a": 1,\n  "b": 2}', False),
    ):  # fmt: skip
        assert compact(text) is fits, text
        assert flexible(text), text
    for value in (True, {}):
        assert accepts(compiler, tokenizer, StructuredOutput(json_schema=value))("[1, 2]")
        assert not accepts(compiler, tokenizer, StructuredOutput(json_schema=value))("[1,\n2]")
    own = {**schema, "x-guidance": {"key_separator": " => "}}
    assert accepts(compiler, tokenizer, StructuredOutput(json_schema=own))('{"a" => 1}')
    with pytest.raises(ValueError, match=r"structured\.whitespace='some'"):
        StructuredOutput(json_schema=True, whitespace="some")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return LLM("tiny", dtype="float32", num_pages=400)


def generated(llm: LLM, structured: StructuredOutput, seeds: range, **options: Any) -> list[RequestOutput]:
    params = [SamplingParams(structured=structured, seed=seed, temperature=1.0, **options) for seed in seeds]
    return llm.generate(["My dear Watson,"] * len(params), params)


def test_json_of_a_model_ends(tiny: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer"},
            "address": {
                "type": "object",
                "properties": {
                    "street": {"type": "string", "maxLength": 20},
                    "tags": {"type": "array", "items": {"enum": ["Holmes", "Watson", None]}, "maxItems": 4},
                },
                "required": ["street", "tags"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "age", "address"],
        "additionalProperties": False,
    }
    for output in generated(tiny, StructuredOutput(json_schema=schema), range(20), max_tokens=300):
        (found,) = output.outputs
        assert (found.finish_reason, found.error) == ("stop", None), found.text
        value = json.loads(found.text)
        assert set(value) == {"name", "age", "address"}
        assert type(value["age"]) is int
        assert set(value["address"]) == {"street", "tags"}
        assert all(tag in ("Holmes", "Watson", None) for tag in value["address"]["tags"])


def test_min_tokens_does_not_outlast_the_grammar(tiny: LLM) -> None:
    for output in generated(
        tiny, StructuredOutput(json_schema={"type": "boolean"}), range(4), max_tokens=20, min_tokens=15
    ):
        (found,) = output.outputs
        assert (found.finish_reason, found.error) == ("stop", None)
        assert found.text in ("true", "false")


def test_answers_of_one_request_have_states_of_their_own(tiny: LLM) -> None:
    (output,) = generated(tiny, StructuredOutput(regex="[a-z]{3,9}!"), range(1), max_tokens=40, n=6)
    texts = [found.text for found in output.outputs]
    assert all(text.endswith("!") and text[:-1].isalpha() for text in texts), texts
    assert len(set(texts)) > 1


def test_a_child_that_died_while_it_waited_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    compiler = compiler_of(tokenizer)
    compiler.matcher(StructuredOutput(regex="a"))
    (child,) = compiler._checker._idle
    child._process.kill()
    child._process.wait()
    compiler.matcher(StructuredOutput(regex="b"))
    (other,) = compiler._checker._idle
    assert other is not child
    del child
    process = other._process
    del other, compiler
    assert process.poll() is not None  # no process outlives its compiler
