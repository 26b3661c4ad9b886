"""A chat template is a program from a stranger: it computes what transformers lets it compute, and no more."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import Any

import pytest

from grok_engine.tokenizer import chat_template
from grok_engine.tokenizer.chat_template import render

GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
# A list of a list twice, and so on: few objects, and a text that never ends.
NEST = "{%% set ns = namespace(x='a') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}%s"

GOOD = {
    "{% for i in range(3) %}\n  {% if i == 1 %}{% continue %}{% endif %}\n{{ i }}\n{% endfor %}": "0\n2\n",
    "{% generation %}{% set x = 'a' %}{{ x }}{% endgeneration %}b": "ab",
    "{{ {'b': '<é>', 'a': [1, none]} | tojson }}": '{"b": "<é>", "a": [1, null]}',
    "{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}": '{\n "a": 2,\n "b": 1\n}',
    "{{ [1] | tojson(separators=(',', ':')) ~ 'é' | tojson(ensure_ascii=true) }}": '[1]"\\u00e9"',
    "{{ dict(a=1).items() | list }}{{ dict({'a': 1}, b=2) }}": "[('a', 1)]{'a': 1, 'b': 2}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 2 %}{{ ns.a }}{{ [ns] }}": "3[<Namespace>]",
    "{% for a, b in [(1, 2), (3, [4])] %}{{ a ~ b }}{% endfor %}{{ (1, 2)[1] }}{{ {'a': [1]}.a }}": "123[4]2[1]",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(2) }}": "<a><2>",
    "{{ ' a,b '.strip().split(',') | map('upper') | join('-') }}": "A-B",
    "{{ 'ab'.replace('a', 'x') | replace('b', 'y') }}{{ 'a%sc' % 'b' }}{{ '{}-{}'.format(1, 2) }}": "xyabc1-2",
    "{{ messages[1:] | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{{ x | indent(2) }}{{ bos_token }}{{ tools is none }}": "a\n  bTrue",
    "{{ strftime_now('%Y') }}": f"{datetime.now():%Y}",
}


@pytest.mark.parametrize("template", GOOD)
def test_what_templates_compute(template: str) -> None:
    values = {"messages": [{"role": "user"}] * 2, "x": "a\nb", "tools": None}
    assert render(template, values, "model") == GOOD[template]


BAD = {
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(1) }}": "access to attribute 'append' of 'list' object is unsafe",
    "{% set ns = namespace(_x=1) %}": "private name '_x'",
    "{% include 'a' %}": "no loader",
    "{{ lipsum(n=9) }}": "'lipsum' is undefined",
    "{{ raise_exception('after user comes assistant') }}": "after user comes assistant",
    "{{ 10**10**8 }}": "too large",
    GROW % ("9", "ns.x * ns.x"): "a product is too large",
    GROW % ("'ab'", "ns.x + ns.x"): "more than",
    GROW % ("'ab'", "ns.x ~ ns.x"): "more than",
    GROW % ("'ab'", "ns.x.replace('a', ns.x)"): "more than",
    GROW % ("'ab'", "ns.x | replace('a', ns.x)"): "more than",
    GROW % ("'ab'", "ns.x.join([ns.x, ns.x])"): "more than",
    GROW % ("[1]", "ns.x + ns.x"): "more than",
    GROW % ("'ab'", "[ns.x, ns.x] | join") + "{{ ns.x }}": "more than",
    (GROW % ("'ab'", "1")).replace(" = 1 %}", " %}{{ ns.x }}{{ ns.x }}{% endset %}"): "more than",
    **{
        NEST % (one, form): "more than"
        for one in ("[ns.x, ns.x]", "(ns.x, ns.x)", "{'a': ns.x, 'b': ns.x}", "[ns.x] * 2", "dict(a=ns.x, b=ns.x)")
        for form in ("{{ ns.x }}", "{{ ns.x ~ '' }}")
    },
    NEST % ("[ns.x, ns.x]", "{{ ns.x | tojson }}"): "more than",
    "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ f(60) }}": "more than",
    NEST % ("[ns.x, ns.x]", "{{ ns.x == [ns.x, ns.x] }}"): "more than",
    NEST % ("(ns.x, ns.x)", "{{ {ns.x: 1} }}"): "more than",
    "{% for x in [1, ['a' * 9999]] %}{{ ([loop] * 9999) | map(attribute='nextitem') | join }}{% endfor %}": "more than",
    "{% set big = range(99999) | list %}{{ ([big] * 99999) | join }}": "more than",
    "{{ 'a' * 10**9 }}": "more than",
    "{{ [1] * 10**9 }}": "more than",
    "{{ range(99999) | join('a' * 100000) }}": "more than",
    "{{ '%1000000000d' % 1 }}": "width",
    "{{ '%*d' % (10**9, 1) }}": "width",
    "{{ '{:>1000000000}'.format(1) }}": "width",
    "{{ '{:>{}}'.format(1, 10**9) }}": "width",
    "{{ '%1000000000d' | format(1) }}": "width",
    "{{ strftime_now('%1000000000d') }}": "width",
    "{{ 'a'.ljust(10**9) }}": "unsafe",
    "{{ 'a' | center(10**9) }}": "No filter named 'center'",
    "{{ 'a\nb' | indent(10**9) }}": "indent",
    "{{ [1] | tojson(indent=10**9) }}": "indent",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "nested too deeply",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{% if 1 %}" * 200 + "{% endif %}" * 200: "too many",
    "x" * 200_000: "has 200000 characters",
}  # fmt: skip


@pytest.mark.parametrize("template", BAD)
def test_what_they_must_not_compute(template: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        render(template, {"messages": []}, "model")
    assert BAD[template] in str(caught.value)
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) if i else '' }}{% endfor %}",
    ],
)
def test_none_runs_for_ever(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"model: chat template: the template (runs longer than 0\.2 s|produces more)"):
        render(template, {}, "model")


def test_what_it_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_OUTPUT", 1000)
    assert len(render("{% for i in range(200) %}{{ 'aaaaa' }}{% endfor %}", {}, "model")) == 1000
    with pytest.raises(ValueError, match="model: chat template: the template writes more than 1000 characters"):
        render("{% for i in range(201) %}{{ 'aaaaa' }}{% endfor %}", {}, "model")


def test_threads_have_budgets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_WORK", 9000)
    found: list[Any] = []

    def run() -> None:
        found.append(render("{% for i in range(500) %}{% endfor %}a", {}, "model"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["a"] * 4
