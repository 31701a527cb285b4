"""Chat templates of strangers: the same text as plain jinja, within limits of time, size and depth, and one clear error."""

from __future__ import annotations

import json
import threading
import time

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fieldguide.core.errors import DataError
from fieldguide.data.preprocessing import template_sandbox
from fieldguide.data.preprocessing.chat_template import ChatTemplate

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": " a question \n with lines "},
    {"role": "assistant", "content": "an answer</think>in full"},
    {"role": "user", "content": "thanks, Ünïcödé 🙂"},
]
# Constructions of published templates.
USED = [
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m.content | trim }}{{ eos_token }}\n{% endfor %}",
    "{%- set ns = namespace(first=true, n=0) -%}{% for m in messages[1:] %}{% if ns.first %}{% set ns.first = false %}[{% endif %}"
    "{% set ns.n = ns.n + loop.index0 * 2 %}{{ m['content'].split('</think>')[-1].lstrip('\\n') }}{% endfor %}{{ ns.n }}]",
    "{% for m in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}{{ index ~ ':' ~ m.role }} {% endfor %}",
    "{% macro show(m, sep='-') %}{{ sep }}{{ m.role|upper }}{% endmacro %}{% for m in messages %}{{ show(m, sep='*') }}{% endfor %}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ {'a': 1, 'b': [true, none, 1.5]} | tojson }}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% if not loop_messages is defined %}{% set loop_messages = messages %}{% endif %}{{ loop_messages[0]['content']|replace('<', '[') }}",
    "{% set x %}block {{ messages[0].role }}{% endset %}{{ x }} {{ x.startswith('block') and x.endswith('m') }}",
    "{{ [1, 2] + [3] }} {{ (1, 'a') }} {{ {'k': 'v'}.items() | list }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 10 }} {{ 'ab' * 3 }}",
    "{{ '%s has %d' % ('x', 3) }} {{ '{} {:>5}'.format('a', 1.5) }} {{ messages[0].content | indent(2, true) }} {{ 3.14159|round(2) }}",
    "{% for m in messages if m.role != 'system' %}{% if loop.last %}{% continue %}{% endif %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "{{ messages | sum(attribute='missing', start=0) if false else [1, 2] | sum }} {{ undefined_name }} {{ 'a' in messages[0].content }}",
    "{% filter upper %}{{ messages[1].content }}{% endfilter %}{% for k, v in messages[0] | dictsort %}{{ k }}={{ v }}{% endfor %}",
]


def plain(source: str) -> str:
    """Render a template in jinja's own sandbox."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return environment.from_string(source).render(messages=MESSAGES, add_generation_prompt=True, eos_token="</s>")


@pytest.mark.parametrize("source", USED)
def test_limits_do_not_change_the_text(source):
    assert ChatTemplate(source, {"eos_token": "</s>"})(MESSAGES) == plain(source)


GROWS = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
LARGE = {
    "a product": "{{ 'a' * 10**10 }}",
    "a product of lists": "{{ [0] * 10**9 }}",
    "a product of numbers": GROWS.replace("START", "3").replace("STEP", "ns.x * ns.x"),
    "a power": "{{ 9 ** (9 ** 9) }}",
    "doubling by +": GROWS.replace("START", "'ab'").replace("STEP", "ns.x + ns.x"),
    "doubling by ~": GROWS.replace("START", "'ab'").replace("STEP", "ns.x ~ ns.x"),
    "doubling by a filter": GROWS.replace("START", "'ab'").replace("STEP", "[ns.x, ns.x] | join"),
    "doubling by a format": GROWS.replace("START", "'ab'").replace("STEP", "'{}{}'.format(ns.x, ns.x)"),
    "doubling by a block": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "shared lists": GROWS.replace("START", "[]").replace("STEP", "[ns.x, ns.x]"),
    "shared tuples": GROWS.replace("START", "()").replace("STEP", "(ns.x, ns.x)"),
    "shared dictionaries": GROWS.replace("START", "{}").replace("STEP", "dict(a=ns.x, b=ns.x)"),
    "slices": "{% set x = 'a' * 9000000 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(9999) %}{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
    "join": "{{ ('x' * 100000).join(range(100000) | map('string') | list) }}",
    "the filter join": "{{ range(100000) | join('x' * 1000000) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "the filter replace": "{{ ('a' * 1000000) | replace('', 'b' * 1000000) }}",
    "indent": "{{ ('\n' * 10000) | indent('x' * 1000000) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "a wide field": "{{ '{:10000000000}'.format(1) }}",
    "a computed width": "{{ '%*d' % (10000000000, 1) }}",
    "map": "{{ (['a' * 100000] * 1000) | map('upper') | list | length }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "bytes": "{{ (5).to_bytes(10000000000, 'big') }}",
    "digits": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "lorem ipsum": "{{ lipsum(100000000) }}",
}


@pytest.mark.parametrize("source", LARGE.values(), ids=LARGE)
def test_large_values_are_refused(source):
    start = time.process_time()
    with pytest.raises(
        DataError, match=r"^the chat template (was stopped|rejects these messages): .*(large|wide|most|unsafe|undefined)"
    ):
        ChatTemplate(source)(MESSAGES)
    assert time.process_time() - start < 2


ENDLESS = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "conditions of loops": "{% for a in range(100000) if (range(100000) | list | length) < 0 %}{% endfor %}",
    "searches": "{% set x = range(100000) | list %}{% for a in range(100000) %}{{ 'x' if -1 in x }}{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_long_templates_are_stopped(source, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    start = time.process_time()
    with pytest.raises(DataError, match="the chat template was stopped: it takes more than"):
        ChatTemplate(source)(MESSAGES)
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: it is nested too deeply"),
        ("{{ 1 | nosuch }}", "is invalid: line 1: No filter named 'nosuch'"),
        ("{{ 1 is nosuch }}", "is invalid: line 1: No test named 'nosuch'"),
        ("{% for %}", "is invalid: line 1"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is invalid: it is nested too deeply"),
        ("{% if 1 %}" * 120 + "{% endif %}" * 120, "is invalid: too many"),
        ("{{ ''.__class__.__mro__ }}", "rejects these messages: access to attribute '__class__'"),
        ("{{ messages[9].role }}", "rejects these messages: list object has no element 9"),
        ("{{ raise_exception('Roles must alternate.') }}", "rejects these messages: Roles must alternate"),
        ("{{ 1 + 'a' }}", "fails: unsupported operand"),
        ("{% include 'other' %}", "fails: no loader"),
        ("x" * (1 << 21), "must be a text of at most"),
    ],
)
def test_errors_are_one_clear_line(source, message):
    with pytest.raises(DataError) as caught:
        ChatTemplate(source)(MESSAGES)
    assert f"the chat template {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_conversations_are_within_the_limits():
    messages = [{"role": ("user", "assistant")[i % 2], "content": "many words " * 2000} for i in range(500)]
    text = ChatTemplate(USED[1])(messages)
    assert len(text) > 10_000_000


def test_threads_have_limits_of_their_own():
    template, results = ChatTemplate("{% for a in range(20000) %}{{ messages[0].content }}{% endfor %}"), []
    threads = [
        threading.Thread(target=lambda i=i: results.append(template([{"role": "user", "content": str(i)}]))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [str(i) * 20000 for i in range(4)]
