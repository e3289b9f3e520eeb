from __future__ import annotations

import pytest
from made_tokenizers import CHATML, LLAMA3_LIKE, ZEPHYR_LIKE, MakeFolder

from burnish.data.rows import Row, RowSet
from burnish.data.templates import TEMPLATES, pick_template, row_prompt_tokens
from burnish.data.tokenizer import Tokenizer
from burnish.errors import BurnishError, ConfigError, DataError

ROW = Row(
    instruction="How many?", context="CREATE TABLE t (a INTEGER)", answer="SELECT COUNT(*) FROM t", file="f", number=3
)
PLAIN = Row(instruction="Say hello.", context="  ", answer="Hello!")
TALK = Row(
    instruction="two",
    context="",
    answer="2",
    file="talk.jsonl",
    number=9,
    extra={
        "messages": [
            {"role": "system", "content": "count"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "two"},
        ]
    },
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def rows_of(layout: str) -> RowSet:
    return RowSet(rows=[ROW], bad_rows=[], source="s", layout=layout, columns=())


def test_alpaca_has_the_published_headings(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder())
    rendered = TEMPLATES["alpaca"].render(ROW, tokenizer)
    assert rendered.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHow many?\n\n### Input:\nCREATE TABLE t (a INTEGER)\n\n### Response:\n"
    )
    assert (rendered.answer, rendered.end) == ("SELECT COUNT(*) FROM t", "")
    plain = TEMPLATES["alpaca"].render_prompt(PLAIN, tokenizer)
    assert "### Input:" not in plain
    assert plain.endswith("\n\n### Instruction:\nSay hello.\n\n### Response:\n")


def test_sql_context_has_its_three_headings(make_folder: MakeFolder) -> None:
    prompt = TEMPLATES["sql-context"].render_prompt(ROW, Tokenizer.load(make_folder()))
    assert prompt == "# Instruction:\nHow many?\n\n# context:\nCREATE TABLE t (a INTEGER)\n\n# result:\n"


def test_chat_cuts_the_end_after_its_end_token(make_folder: MakeFolder) -> None:
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    rendered = TEMPLATES["chat"].render(ROW, Tokenizer.load(make_folder(settings=settings)))
    assert rendered.prompt == (
        "<|im_start|>user\nCREATE TABLE t (a INTEGER)\n\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (rendered.answer, rendered.end, rendered.add_special_tokens) == (ROW.answer, "<|im_end|>", False)


def test_chat_keeps_the_marker_where_the_tokenizer_ends_otherwise(make_folder: MakeFolder) -> None:
    rendered = TEMPLATES["chat"].render(ROW, Tokenizer.load(make_folder(settings={"chat_template": CHATML})))
    assert rendered.end == "<|im_end|>"  # </s> follows it as the end token


@pytest.mark.parametrize("template", [CHATML, LLAMA3_LIKE, ZEPHYR_LIKE])
def test_chat_prompt_and_answer_make_up_the_whole_conversation(make_folder: MakeFolder, template: str) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": template, "bos_token": "<s>"}))
    row = Row(instruction="How many?", context="", answer="Three.")
    rendered = TEMPLATES["chat"].render(row, tokenizer)
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    assert whole.startswith(rendered.prompt + rendered.answer + rendered.end)
    assert rendered.answer.strip() == "Three."
    assert rendered.prompt == tokenizer.render_chat(messages[:1])


def test_chat_learns_what_the_template_puts_before_the_answer(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": THINKING, "eos_token": "<|im_end|>"}))
    rendered = TEMPLATES["chat"].render(PLAIN, tokenizer)
    assert rendered.prompt.endswith("<|im_start|>assistant\n")
    assert (rendered.answer, rendered.end) == ("<think>\n\n</think>\n\nHello!", "<|im_end|>")


def test_chat_answer_is_trimmed_where_the_template_trims(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": LLAMA3_LIKE}))
    row = Row(instruction="q", context="", answer="  Three. \n")
    rendered = TEMPLATES["chat"].render(row, tokenizer)
    assert (rendered.answer, rendered.end) == ("Three.", "</s>")


def test_chat_that_does_not_round_trip_is_an_error(make_folder: MakeFolder) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": template}))
    with pytest.raises(DataError, match="does not round trip"):
        TEMPLATES["chat"].render(ROW, tokenizer)
    silent = Tokenizer.load(make_folder(settings={"chat_template": "{{ messages[0].content }}"}))
    with pytest.raises(DataError, match="does not round trip"):
        TEMPLATES["chat"].render(ROW, silent)


def test_conversations_need_the_chat_template(make_folder: MakeFolder) -> None:
    tokenizer = Tokenizer.load(make_folder(settings={"chat_template": CHATML}))
    prompt = TEMPLATES["chat"].render(TALK, tokenizer).prompt
    assert prompt.index("count") < prompt.index("one") < prompt.index("1") < prompt.index("two")
    for name in ("alpaca", "sql-context"):
        with pytest.raises(DataError, match=rf"{name} cannot render the conversation in talk\.jsonl, row 9"):
            TEMPLATES[name].render(TALK, tokenizer)


def test_auto_follows_its_rule(make_folder: MakeFolder) -> None:
    with_chat = Tokenizer.load(make_folder(settings={"chat_template": CHATML}))
    without = Tokenizer.load(make_folder())
    assert pick_template("auto", with_chat, rows_of("sql")).name == "chat"
    assert pick_template("auto", without, rows_of("sql")).name == "sql-context"
    assert pick_template("auto", without, rows_of("alpaca")).name == "alpaca"
    assert pick_template("auto", without).name == "alpaca"
    assert pick_template("alpaca", with_chat).name == "alpaca"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("alpacca", ConfigError, r"no prompt template 'alpacca'; expected auto, chat.*Did you mean alpaca\?"),
        ("chat", DataError, "has no chat template"),
    ],
)
def test_template_that_cannot_be_had_is_an_error(
    make_folder: MakeFolder, name: str, error: type[BurnishError], message: str
) -> None:
    with pytest.raises(error, match=message):
        pick_template(name, Tokenizer.load(make_folder()))


def test_begin_token_comes_once(make_folder: MakeFolder) -> None:
    folder = make_folder("byte-fallback", {"chat_template": "{{ bos_token }}" + CHATML})
    tokenizer = Tokenizer.load(folder)
    for name, template in TEMPLATES.items():
        ids = row_prompt_tokens(ROW, tokenizer, template)
        assert ids.count(1) == 1, name
        assert ids[0] == 1
