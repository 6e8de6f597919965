"""What a form gives is what the render gives; a template that looks at contents is not taken for one that copies."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import chat_template, converting, rendering, templates
from stages.copying import Copying
from stages.errors import UserError
from stages.formats import BadRow, Conversation, Turn
from stages.forms import Form, Formed, Forms, plain
from stages.sandbox import environment
from stages.tokenizer_files import Tokenizer, read_tokenizer
from tests.stages.chats import conversations, digest, messages, run_convert, smollm2, source

PLAIN = Tokenizer(None, {"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", "</s>"), ("<s>", "</s>"), "")

LOOP = "{% for m in messages %}<{{ m.role }}>BODY<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

COPYING = {
    "put out": "{{ m['content'] }}",
    "joined": "{{ m.role + ': ' + m.content + '\\n' }}",
    "trimmed": "{{ m.content | trim }}{{ '' }}",
    "stripped": "{{ m['content'].strip() ~ '!' }}",
    "by a name": "{% set said = m.content | trim %}{{ said }}",
    "asked whether it is there": "{% if m.content is string and m.content %}{{ m.content }}{% endif %}",
    "of the last": "{{ m.content }}{% if loop.last and messages[-1]['role'] == 'user' %}?{% endif %}",
    "by its place": "{{ messages[loop.index0].content }}",
    "or nothing": "{{ m.content or '' }}",
    "kept for the next": "{% set ns = namespace(x='') %}{{ ns.x + m.content }}{% set ns.x = m.content + ' ' %}",
    "after another role": "{{ '!' if loop.previtem and loop.previtem.role == 'user' }}{{ m.content }}",
    "with tools otherwise": "{{ m.content }}{% if tools %}{{ m.content | tojson }}{% endif %}",
    "of other roles otherwise": "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}",
    "with calls otherwise": "{% if m.tool_calls and x %}{{ m.content[1:] }}{% else %}{{ m.content }}{% endif %}",
    "in chosen ones": "{% if messages | selectattr('role', 'equalto', 'tool') | list %}?{% endif %}{{ m.content }}",
}

LOOKING = {
    "in": "{% if 'a' in m.content %}{{ m.content }}{% endif %}",
    "equal": "{{ '' if m.content == 'b' else m.content }}",
    "length": "{{ m.content }}{{ '!' if m.content | length > 3 }}",
    "a part": "{{ m.content[:3] }}",
    "split": "{{ m.content.split('a')[-1] }}",
    "upper case": "{{ m.content | upper }}",
    "as JSON": "{{ m.content | tojson }}",
    "letters": "{% for letter in m.content %}{{ letter }}{% endfor %}",
    "the one before": "{{ m.content }}{% if loop.previtem and loop.previtem.content == m.content %}again{% endif %}",
    "whether it changed": "{{ m.content }}{{ '!' if loop.changed(m.content) }}",
    "all of a message": "{% for key, value in m.items() %}{{ value }}{% endfor %}",
    "get": "{{ m.get('content') }}{{ '!' if m.get('content') == 'a' }}",
    "by a name of its field": "{% set key = 'content' %}{{ m.content }}{{ '!' if m[key] == 'a' }}",
    "kept for later": "{% set ns = namespace(x='') %}{% set ns.x = m.content %}{{ m.content }}{{ '!' if ns.x == 'a' }}",
    "by a name": "{% set said = m.content %}{{ said }}{{ '!' if said == 'a' }}",
    "by a name set later": "{% if not loop.first and said == 'a' %}!{% endif %}{% set said = m.content %}{{ said }}",
    "in a list": "{{ m.content }}{{ '!' if [m.content] == ['a'] }}",
    "in a macro": "{% macro f(x) %}{{ x }}{{ '!' if x == 'a' }}{% endmacro %}{{ f(m.content) }}",
    "in a block": "{% set said %}{{ m.content }}{% endset %}{{ said }}{{ '!' if said == 'a' }}",
    "joined first": "{% set said = 'x' + m.content %}{{ said | trim }}",
    "by filter": "{{ messages | map(attribute='content') | join('') }}",
    "a role of its own": "{% set x = namespace(role='a') %}{% if x.role == 'a' %}{{ m.content | upper }}{% endif %}",
    "tools of its own": "{% set tools = ['t'] %}{% if tools %}{{ m.content | upper }}{% endif %}",
    "tools set later": "{% if tools %}{{ m.content | upper }}{% endif %}{% set tools = ['t'] %}",
    "other roles": "{% if m.role != 'tool' %}{{ m.content | upper }}{% endif %}",
    "chosen by content": "{% if messages | selectattr('content', 'equalto', 'a') | list %}?{% endif %}{{ m.content }}",
    "a macro's text": "{% macro f() %}{{ messages[0].content }}{% endmacro %}{{ m.content if f() == 'a' else '' }}",
    "from one side": "{{ m.content.lstrip() }}",
}


@pytest.mark.parametrize("kind", COPYING)
def test_a_template_that_copies(kind: str) -> None:
    assert Copying(environment().parse(LOOP.replace("BODY", COPYING[kind]))).copies


@pytest.mark.parametrize("kind", LOOKING)
def test_a_template_that_looks(kind: str) -> None:
    assert not Copying(environment().parse(LOOP.replace("BODY", LOOKING[kind]))).copies


def rendered(forms: Forms, conversation: Conversation) -> object:
    try:
        found = forms.render(conversation, plain(conversation))
    except BadRow as error:
        return str(error)
    return found.text, found.spans, found.unwritten


def directly(forms: Forms, conversation: Conversation) -> object:
    try:
        found = rendering.render(forms.template, conversation)
    except BadRow as error:
        return str(error)
    return found.text, found.spans, found.unwritten


def all_forms() -> dict[str, Forms]:
    found = {"smollm2": Forms(chat_template.load(read_tokenizer(smollm2()), "tokenizer"))}
    sources = [*templates.names(), *(LOOP.replace("BODY", body) for body in COPYING.values())]
    for name in sources:
        try:
            found[name] = Forms(chat_template.load(PLAIN, name))
        except UserError:  # it needs tokens that this tokenizer does not have
            continue
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, Forms]:
    return all_forms()


@given(st.lists(conversations(), min_size=2, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_form_gives_what_the_render_gives(known: dict[str, Forms], chats: list[Conversation]) -> None:
    """The first chats may teach a form, and the others of their shape use it: with each other's contents."""
    texts = [turn.content for chat in chats for turn in chat.turns]
    others = [
        Conversation([Turn(turn.role, texts[-1 - n], turn.train) for n, turn in enumerate(chat.turns)])
        for chat in chats
    ]
    for forms in known.values():
        for chat in [*chats, *others]:
            assert rendered(forms, chat) == directly(forms, chat)


def test_forms_are_used_and_few_renders_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Forms(chat_template.load(read_tokenizer(smollm2()), "tokenizer"))
    chats = [Conversation([Turn("user", f"q{n}"), Turn("assistant", "é" * (n + 1))] * (1 + n % 2)) for n in range(20)]
    found = [forms.render(chat, plain(chat)) for chat in chats]
    assert sum(isinstance(one, Formed) for one in found) == 18
    assert all(isinstance(form, Form) for form in forms.known.values()) and len(forms.known) == 2
    assert [one.text for one in found] == [rendering.render(forms.template, chat).text for chat in chats]


def test_what_is_written_does_not_depend_on_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = [
        Conversation([Turn("user", text), Turn("assistant", f"{n} {text}"), Turn("user", " x ")][: 1 + n % 3])
        for n in range(30)
        for text in ("a", "é <|im_end|>", " edge", "\n", "x" * 500)
    ]
    rows = [{"messages": messages(chat)} for chat in chats]
    once, _ = run_convert(tmp_path / "a", source(tmp_path / "rows", rows), smollm2(), {"format": "messages"})
    monkeypatch.setattr(converting, "Forms", _Off)
    again, _ = run_convert(tmp_path / "b", source(tmp_path / "more", rows), smollm2(), {"format": "messages"})
    assert digest(once) == digest(again)


class _Off(Forms):
    def __post_init__(self) -> None:
        self.copies = False
