"""The sandbox of chat templates: nothing that one can say takes for ever, fills the memory or reaches outside."""

import time
from typing import Any

import pytest

from stages.chat_template import Template, load
from stages.errors import UserError
from stages.formats import Conversation, Turn
from stages.rendering import render
from stages.tokenizer_files import Tokenizer

SAYS = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
NS = "{% set ns = namespace(x='ab', l=[1], n=3) %}{% for i in range(60) %}"


def template(source: str) -> Template:
    return load(Tokenizer(source, {"bos_token": "<s>"}, ("</s>",), ("</s>",), "<s>"), "tokenizer")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too many steps"),
        (
            "{% macro f(n) %}{{ f(n + 1) + f(n + 1) if n < 40 }}{% endmacro %}{{ f(0) }}",
            "too many",
        ),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{{ 10 ** 10 ** 10 }}", "asks an operation for"),
        (NS + "{% set ns.n = ns.n * ns.n %}{% endfor %}", "asks an operation for"),
        ("{{ 'a' * 10 ** 10 }}", "asks an operation for|builds something"),
        ("{{ ('a' * 60000) * 60000 }}", "builds something of 3600000000"),
        (NS + "{% set ns.x = ns.x + ns.x %}{% endfor %}", "builds something"),
        (NS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "builds something"),
        (NS + "{% set ns.l = ns.l + ns.l %}{% endfor %}", "builds something"),
        (NS + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}", "builds something"),
        (NS + "{% set ns.x = ''.join([ns.x, ns.x]) %}{% endfor %}", "builds something"),
        (NS + "{% set ns.x = ns.x.replace('b', 'bbbb') %}{% endfor %}", "builds something"),
        (NS + "{% set ns.x = ns.x | replace('b', 'bbbb') %}{% endfor %}", "builds something"),
        (NS + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}", "builds something"),
        ("{{ range(99999) | map('string') | join('x' * 50000) }}", "builds something"),
        ("{{ '%9999999999d' % 1 }}", "too large a width"),
        ("{{ '%9999999999d' | format(1) }}", "too large a width"),
        ("{{ '{:>9999999999}'.format(1) }}", "too large a width"),
        ("{{ 'a' | center(10000000000) }}", "asks an operation for"),
        ("{{ 'a'.ljust(10000000000) }}", "asks an operation for"),
        ("{{ 'a' | indent(10000000000) }}", "asks an operation for"),
        ("{{ [1] | tojson(indent=10000000000) }}", "asks an operation for"),
        ("{{ [1] | batch(10000000000, 'x') | list }}", "asks an operation for"),
        ("{{ range(10 ** 9) }}", "asks an operation for|Range too big"),
    ],
)
def test_what_has_no_end_is_refused_soon(source: str, says: str) -> None:
    started = time.process_time()
    with pytest.raises(UserError, match=says):
        template(source + SAYS)
    assert time.process_time() - started < 20, "counted in processor time; two seconds at most on an idle core"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_reaches_outside_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="the chat template"):
        template(source + SAYS)


@pytest.mark.parametrize(
    "source",
    ["{{ '' | attr('__class__') }}", "{{ '{0.__class__}'.format(1) }}", "{{ self._TemplateReference__context }}"],
)
def test_what_asks_for_inner_things_gets_nothing(source: str) -> None:
    conversation = Conversation([Turn("user", "q"), Turn("assistant", "a")])
    assert render(template(source + SAYS), conversation).text == "q</s>a</s>"


def test_a_long_conversation_takes_as_many_steps_as_it_needs() -> None:
    quadratic = "{% for m in messages %}{% for n in messages %}{% endfor %}{{ m.content }}</s>{% endfor %}"
    turns: list[Any] = [Turn("user", "q"), Turn("assistant", "a")] * 700
    assert render(template(quadratic), Conversation(turns)).text == "q</s>a</s>" * 700
