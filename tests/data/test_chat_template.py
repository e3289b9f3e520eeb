from __future__ import annotations

from typing import Any

import pytest
from made_tokenizers import CHATML, LLAMA3_LIKE, ZEPHYR_LIKE, MakeFolder

from burnish.data.tokenizer import Tokenizer
from burnish.errors import CheckpointError, DataError

CONVERSATION = [
    {"role": "user", "content": "  How many <rows> & 'quotes'? é 😀 "},
    {"role": "assistant", "content": "Three.\n"},
    {"role": "user", "content": "And now?"},
]
TOOL_LIKE = (
    "{%- set ns = namespace(count=0) -%}{%- for m in messages -%}{%- if m.content == 'skip' -%}{%- continue -%}"
    "{%- endif -%}{%- set ns.count = ns.count + 1 -%}{{ m | tojson }}{{ m.get('role') }}{{ m.content.split(' ')[-1] }}"
    "{%- endfor -%}{{ ns.count }}{{ {'b': 1, 'a': '<é>'} | tojson(indent=2) }}{% if tools is none %}!{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA3_LIKE, ZEPHYR_LIKE, TOOL_LIKE])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("system", [None, "You answer in SQL."])
def test_rendering_equals_transformers(
    make_folder: MakeFolder, template: str, generate: bool, system: str | None
) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference comes with the hf extra")
    folder = make_folder(settings={"chat_template": template})
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    expected = theirs.apply_chat_template(messages + CONVERSATION, tokenize=False, add_generation_prompt=generate)
    got = Tokenizer.load(folder).render_chat(CONVERSATION, add_generation_prompt=generate, system=system)
    assert got == expected
    assert got


def test_template_file_goes_before_the_config(make_folder: MakeFolder) -> None:
    folder = make_folder(settings={"chat_template": "config"}, files={"chat_template.jinja": "file"})
    assert Tokenizer.load(folder).render_chat(CONVERSATION) == "file"


def test_named_templates_give_the_default_one(make_folder: MakeFolder) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Tokenizer.load(make_folder(settings={"chat_template": named})).render_chat(CONVERSATION) == "plain"
    without = [{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "plain"}]
    with pytest.raises(DataError, match=r"no default chat template; got templates named rag, tool_use"):
        Tokenizer.load(make_folder(settings={"chat_template": without})).render_chat(CONVERSATION)
    with pytest.raises(CheckpointError, match="chat_template"):
        Tokenizer.load(make_folder(settings={"chat_template": [{"name": 3}]}))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only user messages') }}", "only user messages"),
        ("{% for m in messages %}", "does not compile"),
        ("{{ messages[7].content }}", "refused the messages"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages | nosuchfilter }}", "nosuchfilter"),
    ],
)
def test_failing_template_is_one_line_naming_the_folder(make_folder: MakeFolder, template: str, message: str) -> None:
    folder = make_folder(settings={"chat_template": template})
    with pytest.raises(DataError) as caught:
        Tokenizer.load(folder).render_chat(CONVERSATION)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no chat messages"),
        ("hello", "not a list"),
        (["hello"], "message 1 is not an object"),
        ([{"content": "x"}], "message 1 has no role"),
        ([{"role": "user"}], "message 1 has no text content"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], "message 2 has no text content"),
    ],
)
def test_malformed_messages_are_named(make_folder: MakeFolder, messages: Any, message: str) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": CHATML}))
    with pytest.raises(DataError, match=message):
        tokenizer.render_chat(messages)


def test_no_template_and_two_system_messages_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match="no chat template"):
        Tokenizer.load(make_folder()).render_chat(CONVERSATION)
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": CHATML}))
    with pytest.raises(DataError, match="two system messages"):
        tokenizer.render_chat([{"role": "system", "content": "a"}], system="b")
