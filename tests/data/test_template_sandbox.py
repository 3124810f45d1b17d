"""A chat template comes with a model, from anyone: what it does stays inside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.data.chat import ChatRenderer
from tests.data.test_chat_masks import CHATML, MARKED, chatml_tokens, exchange

SECRET = "the-secret-of-this-machine"
# What each tries to reach: the classes of Python, the modules of Jinja and of Transformers, files, and the rows themselves.
HOSTILE = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subclasses by attr": "{{ (''|attr('__class__')|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "subclasses by item": "{{ ''['__class__']['__mro__'] }}",
    "subclasses by map": "{{ [messages]|map(attribute='__class__')|map(attribute='__mro__')|list }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].environ }}",
    "globals of a method": "{{ cycler.__init__.__globals__.os.popen('touch TOUCHED').read() }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__ }}",
    "globals of a filter": "{{ strftime_now.__globals__['__builtins__']['open']('SECRET_FILE').read() }}",
    "code": "{{ raise_exception.__code__.co_consts }}",
    "generator frames": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "the template itself": "{{ self.__init__.__globals__ }}",
    "the environment": "{{ self._TemplateReference__context.environment.loader.__class__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format by filter": "{{ '%s'|format(messages.__class__.__mro__) }}",
    "format_map": "{{ '{m.__class__.__mro__}'.format_map({'m': messages}) }}",
    "include": "{% include 'SECRET_FILE' %}",
    "import": "{% import 'SECRET_FILE' as x %}{{ x }}",
    "from import": "{% from 'SECRET_FILE' import x %}{{ x }}",
    "extends": "{% extends 'SECRET_FILE' %}",
    "a Python import": "{{ __import__('os').system('touch TOUCHED') }}",
    "open": "{{ open('SECRET_FILE').read() }}",
    "do": "{% do messages.append(1) %}",
    "appends to the row": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "changes the row": "{{ messages[0].update({'content': 'x'}) }}",
    "sets in the row": "{% set messages[0].content = 'x' %}",
    "a range without end": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "debug": "{% debug %}",
    "syntax": "{{ messages",
}
REACHED = ("<class", "<function", "<module", "co_consts", "environ(", "/etc/", "object at 0x")


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_template_cannot_reach_the_machine(
    attack: str, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET_OF_THE_MACHINE", SECRET)
    (tmp_path / "secret").write_text(SECRET)
    hostile = (
        HOSTILE[attack].replace("SECRET_FILE", str(tmp_path / "secret")).replace("TOUCHED", str(tmp_path / "touched"))
    )
    messages = exchange("What is it?", "an answer")
    renderer = ChatRenderer(chatml_tokens(), hostile + template)
    with pytest.raises(ValueError, match=r"^the chat template refuses the conversation: ") as caught:
        [renderer.render({"messages": messages}), renderer.prompt(messages)]
    assert not any(trace in str(caught.value) for trace in (SECRET, *REACHED))
    assert messages == exchange("What is it?", "an answer")
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize(
    "harmless", ["{{ ''.__class__ }}", "{{ messages.__class__ }}", "{{ open }}", "{{ self.__dict__ }}"]
)
def test_what_is_forbidden_is_nothing_when_it_is_only_printed(harmless: str) -> None:
    row = {"messages": exchange("What is it?", "an answer")}
    plain, with_it = (ChatRenderer(chatml_tokens(), each + CHATML).render(row) for each in ("", harmless))
    assert with_it == plain
