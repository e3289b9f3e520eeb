"""The task's part of a gate: child and parent answer the same held-out questions, as the engine runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from burnish.data.rows import TASK, Row, RowSet
from burnish.data.templates import Template, pick_template, row_prompt_tokens
from burnish.data.tokenizer import Tokenizer
from burnish.engine.native import NativeEngine
from burnish.errors import ConfigError
from burnish.measure.evaluate import SqlScore
from burnish.measure.paired import TaskComparison, compare_answers
from burnish.models.decoder import Decoder
from burnish.pipeline.evaluate import score_rows
from burnish.pipeline.examples import DataConfig, held_out_config, read_data
from burnish.pipeline.gates import GateOptions
from burnish.pipeline.progress import Progress, silent
from burnish.train.lora import AdaptedLinear

MAX_ANSWER = 96
USUAL_PROMPT = 512
"""Tokens; longer ones run fewer at a time, in the same memory."""
MAX_NUM_SEQS = 32


def compare_on_task(
    child: Decoder,
    parent: Decoder,
    tokenizer: Tokenizer,
    *,
    data: str | None,
    recorded: Mapping[str, object] | None,
    num_rows: int,
    kv_dtype: str = "auto",
    progress: Progress = silent,
) -> TaskComparison | None:
    """Let both answer held-out rows that bring SQL; None where they bring none or `num_rows` is 0.

    Both decoders are laid out for this hardware, in place, and are not to be trained or saved afterwards.

    Args:
        data, recorded: as for `examples.held_out`; of the bundled task's own splits `num_rows` are drawn.
        num_rows: questions.
        kv_dtype: of the child's KV cache.

    Raises:
        DataError: there is no usable row.
    """
    if num_rows == 0:
        return None
    config, rows = _asked_rows(data, recorded, num_rows)
    if not rows.rows:
        return None
    template = pick_template(config.template, tokenizer, rows)
    scores = {
        name: _answers(decoder, rows, tokenizer, template, kv_dtype=cache, progress=progress, who=name)
        for name, decoder, cache in (("parent", parent, "auto"), ("child", child, kv_dtype))
    }
    return compare_answers(scores["parent"], scores["child"])


def check_score_drop(options: GateOptions, *, data: str | None, recorded: Mapping[str, object] | None) -> None:
    """Refuse a limit on the score that no answers would be held against.

    Raises:
        ConfigError: a limit is given, and no held-out row brings SQL.
        DataError: there is no usable row.
    """
    if options.max_score_drop is None:
        return
    config, rows = _asked_rows(data, recorded, options.rows)
    if not rows.rows:
        raise ConfigError(
            "max-score-drop has nothing to judge: no held-out row brings SQL",
            got=config.source,
            remedy="Name rows with a schema with --gate-data, or leave it out.",
        )


def _asked_rows(data: str | None, recorded: Mapping[str, object] | None, num_rows: int) -> tuple[DataConfig, RowSet]:
    """Where held-out rows come from, and those of the first `num_rows` that bring SQL."""
    config = held_out_config(data=data, recorded=recorded)
    source = config.source
    if source.startswith(f"{TASK}:") and data is None:
        source = f"{':'.join(source.split(':')[:2])}:{num_rows}"
    rows = read_data(replace(config, source=source, limit=num_rows), texts=True)
    return config, replace(rows, rows=[row for row in rows.rows if brings_sql(row)])


def brings_sql(row: Row) -> bool:
    """Whether an answer to the row can be judged as SQL: it brings a database, or a schema."""
    return bool(row.extra.get("database")) or "create table" in row.context.lower()


def _answers(
    decoder: Decoder,
    rows: RowSet,
    tokenizer: Tokenizer,
    template: Template,
    *,
    kv_dtype: str,
    progress: Progress,
    who: str,
) -> SqlScore:
    def watch(label: str, done: int, total: int, note: str = "") -> None:
        progress(f"Gate: the {who} answers", done, total, note)

    longest = max(len(row_prompt_tokens(row, tokenizer, template)) for row in rows.rows)
    length = min(decoder.config.max_position_embeddings, max(longest, USUAL_PROMPT) + MAX_ANSWER)
    engine = NativeEngine(
        decoder,
        tokenizer=tokenizer,
        device=decoder.device,
        kv_dtype=kv_dtype,
        max_num_seqs=max(1, min(MAX_NUM_SEQS, MAX_NUM_SEQS * (USUAL_PROMPT + MAX_ANSWER) // length)),
        max_model_len=length,
        optimise=not any(isinstance(module, AdaptedLinear) for module in decoder.modules()),
    )
    score = score_rows(engine, rows.rows, tokenizer, template, max_tokens=MAX_ANSWER, progress=watch)
    assert isinstance(score, SqlScore)
    return score
