"""`evaluate`: how good a model is at a task, alone or beside its parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.rows import Row, RowSet
from burnish.data.templates import Template, row_prompt_tokens
from burnish.data.tokenizer import Tokenizer
from burnish.engine.native import NativeEngine
from burnish.engine.protocol import Engine
from burnish.errors import ConfigError
from burnish.measure.compare import Comparison, GateLimits, compare_models
from burnish.measure.evaluate import SqlScore, TextScore, evaluate_sql, evaluate_text
from burnish.measure.paired import TaskComparison, compare_answers
from burnish.measure.perplexity import perplexity
from burnish.models.checkpoint import read_config
from burnish.models.loading import resolve_model
from burnish.pipeline.examples import DataConfig, prepare, read_data
from burnish.pipeline.gates import GateOptions, GateResult, is_made_from, judge, layer_errors, limits_of_child
from burnish.pipeline.manifest import GOLDEN_TEXT, fingerprint_folder, read_manifest
from burnish.pipeline.opening import (
    EngineOptions,
    Opened,
    Source,
    check_not_sharded,
    data_of,
    engine_of,
    open_decoder,
    open_engine,
    quantize_of,
    required_tokenizer,
)
from burnish.pipeline.progress import Progress, silent
from burnish.pipeline.text_rows import read_texts

TASKS = ("text-to-sql", "perplexity", "bleu")


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """What `burnish eval --json` prints; fields that the task does not give are None.

    `score` is in 0..1 (BLEU: 0..100). The KL is KL(parent || child) in nats per token. `gate` is the
    verdict beside the parent: of a child that has limits of its own, or where limits were given.
    """

    task: str
    model: str
    data: str
    template: str | None
    metric: str | None = None
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    num_rows: int | None = None
    exact_match: float | None = None
    perplexity: float | None = None
    num_tokens: int | None = None
    against: str | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    greedy_agreement: float | None = None
    seconds: float | None = None
    by_kind: dict[str, dict[str, Any]] | None = None
    answers: list[dict[str, Any]] | None = None
    gate: GateResult | None = None
    num_bad_rows: int = 0
    quantize: str = "none"


def evaluate(
    model: str,
    *,
    task: str = "text-to-sql",
    data: DataConfig | None = None,
    against: str | None = None,
    adapter: str | None = None,
    max_tokens: int = 128,
    quantize: str = "none",
    weights_cache: bool = True,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    gate_options: GateOptions | None = None,
    source: Source | None = None,
    progress: Progress = silent,
) -> EvalRecord:
    """Score a model.

    Args:
        model: folder, bundled name, hub id, or an adapter's folder.
        task: "text-to-sql" (execution accuracy where rows bring a database, exact match elsewhere), "bleu" (against the
            rows' answers) or "perplexity" (of rows or of a text file).
        data: the rows; the bundled task's test rows when None.
        against: the parent: KL and greedy agreement on the same rows, and its answers beside the model's.
        adapter: an adapter to put on the model.
        max_tokens: of one answer.
        quantize, weights_cache: of the model, as in `EngineOptions`; the parent runs as it is.
        tensor_parallel, pipeline_parallel: as in `EngineOptions`; for tasks that are answers only.
        gate_options: limits to judge the model by; else, beside the model it was made from, those it was made under,
            or those of its bits.

    Raises:
        ConfigError, CheckpointError, DataError: bad input.
    """
    source = source or Source()
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}", expected=", ".join(TASKS))
    if gate_options is not None and gate_options.any_limit and against is None:
        raise ConfigError("limits need a parent", remedy="Name it with --against.")
    if gate_options is not None and gate_options.max_score_drop is not None and task != "text-to-sql":
        raise ConfigError(f"max-score-drop has nothing to judge with task {task}", expected="task text-to-sql")
    if data is None:
        if task == "bleu":
            raise ConfigError("bleu needs rows with reference answers", remedy="Give them with --data.")
        data = DataConfig(source="text-to-sql:test:300")
    options = EngineOptions(
        quantize=quantize,
        weights_cache=weights_cache,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    if task == "perplexity" or against is not None:
        what = "perplexity" if task == "perplexity" else "a comparison with a parent"
        check_not_sharded(options, what, remedy="Leave --tensor-parallel and --pipeline-parallel out.")
    if options.sharded:
        opened, engine = _open_sharded(model, source, adapter, options)
    else:
        opened = open_decoder(model, source, adapter=adapter, quantize=quantize, weights_cache=weights_cache)
        engine = None
    if task == "perplexity":
        return _evaluate_perplexity(opened, data, against, source, gate_options)
    rows = read_data(data)
    template = template_for(opened, data, rows)
    engine = engine or engine_of(opened)
    score = score_rows(
        engine, rows.rows, opened.tokenizer, template, task=task, max_tokens=max_tokens, progress=progress
    )
    record: dict[str, Any] = {"num_bad_rows": len(rows.bad_rows)}
    if isinstance(score, SqlScore):
        summary = score.to_dict()
        record |= {
            "metric": score.metric,
            "score": score.score,
            "score_low": score.score_low,
            "score_high": score.score_high,
        }
        record |= {"by_kind": summary["by_kind"], "answers": summary["answers"]}
    else:
        record |= {"metric": "BLEU", "score": score.bleu, "answers": score.to_dict()["answers"]}
    record |= {"num_rows": score.num_rows, "exact_match": score.exact_match, "seconds": score.seconds}
    if against is not None:
        record |= _beside(
            opened, score, rows, against, data, template, source, gate_options, max_tokens=max_tokens, progress=progress
        )
    return EvalRecord(
        task=task,
        model=model,
        data=data.source,
        template=template.name,
        against=against,
        quantize=quantize_of(opened),
        **record,
    )


def _open_sharded(
    model: str, source: Source, adapter: str | None, options: EngineOptions
) -> tuple[Opened, NativeEngine]:
    """An engine of several processes, and what this one has of the model."""
    engine = open_engine(model, source, adapter=adapter, options=options)
    assert isinstance(engine, NativeEngine)
    folder = resolve_model(model, revision=source.revision, offline=source.offline, allow_pickle=source.allow_pickle)
    opened = Opened(
        decoder=engine.decoder,
        tokenizer=required_tokenizer(folder),
        folder=folder,
        name=model,
        optimised=engine.optimised,
    )
    return opened, engine


def template_for(opened: Opened, data: DataConfig, rows: Any) -> Template:
    """The template asked for; for "auto" the one that the model was tuned with, if its manifest says."""
    from burnish.data.templates import pick_template

    recorded = data_of(opened)
    name = data.template
    if name == "auto" and recorded and recorded.get("template"):
        name = str(recorded["template"])
    return pick_template(name, opened.tokenizer, rows)


def score_rows(
    engine: Engine,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    template: Template,
    *,
    task: str = "text-to-sql",
    max_tokens: int = 128,
    progress: Progress = silent,
) -> SqlScore | TextScore:
    """Let an engine answer rows greedily and score the answers."""

    def render(row: Any) -> list[int]:
        return row_prompt_tokens(row, tokenizer, template)

    def on_progress(done: int, total: int) -> None:
        progress("Answering", done, total)

    run = evaluate_sql if task == "text-to-sql" else evaluate_text
    return run(engine, rows, render=render, max_tokens=max_tokens, on_progress=on_progress)


def _beside(
    opened: Opened,
    score: SqlScore | TextScore,
    rows: RowSet,
    against: str,
    data: DataConfig,
    template: Template,
    source: Source,
    gate_options: GateOptions | None,
    *,
    max_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """KL and agreement with the parent on the rows' answers, the parent's own answers, and the verdict."""
    parent = _open_parent(opened, against, source)
    longest = opened.decoder.config.max_position_embeddings
    examples = prepare(_with_template(data, template.name), opened.tokenizer, longest=longest).examples
    comparison = compare_models(opened.decoder, parent.decoder, examples.examples)
    task = None
    if isinstance(score, SqlScore):
        theirs = score_rows(
            engine_of(parent), rows.rows, parent.tokenizer, template, max_tokens=max_tokens, progress=progress
        )
        assert isinstance(theirs, SqlScore)
        task = compare_answers(theirs, score)
    return _figures(opened, parent, comparison, gate_options, task)


def _figures(
    opened: Opened,
    parent: Opened,
    comparison: Comparison,
    gate_options: GateOptions | None,
    task: TaskComparison | None = None,
) -> dict[str, Any]:
    manifest = None if opened.adapter is not None else read_manifest(opened.folder)
    options = gate_options or GateOptions()
    limits = None
    if opened.adapter is None and (
        manifest is None or is_made_from(manifest, fingerprint_folder(parent.adapter or parent.folder))
    ):
        limits = limits_of_child(manifest, read_config(opened.folder))
    if limits is None and options.any_limit:
        limits = GateLimits()
    gate = None
    if limits is not None:
        gate = judge(comparison, options.applied(limits), layers=layer_errors(manifest), task=task)
    return {
        "kl_mean": comparison.kl_mean,
        "kl_p99": comparison.kl_p99,
        "greedy_agreement": comparison.greedy_agreement,
        "perplexity": comparison.perplexity_child,
        "num_tokens": comparison.num_tokens,
        "gate": gate,
    }


def _open_parent(opened: Opened, against: str, source: Source) -> Opened:
    """The parent, which has to read text as its child does: a KL between two vocabularies means nothing.

    Raises:
        ConfigError: their tokenizers or vocabularies differ.
    """
    parent = open_decoder(against, source)
    sizes = [model.decoder.config.vocab_size for model in (parent, opened)]
    if sizes[0] != sizes[1] or parent.tokenizer.encode(GOLDEN_TEXT) != opened.tokenizer.encode(GOLDEN_TEXT):
        raise ConfigError(
            f"{against} has another vocabulary than {opened.name}",
            got=f"{sizes[0]} tokens beside {sizes[1]}" if sizes[0] != sizes[1] else "tokenizers that differ",
            expected="a parent with the same tokenizer",
        )
    return parent


def _with_template(data: DataConfig, template: str) -> DataConfig:
    from dataclasses import replace

    return replace(data, template=template)


def _evaluate_perplexity(
    opened: Opened, data: DataConfig, against: str | None, source: Source, gate_options: GateOptions | None
) -> EvalRecord:
    texts = read_texts(data.source, opened.tokenizer, limit=data.limit)
    template = None
    positions = "all"
    if texts is None:
        rows = read_data(data)
        template = template_for(opened, data, rows).name
        longest = opened.decoder.config.max_position_embeddings
        sequences: Sequence[Any] = prepare(
            _with_template(data, template), opened.tokenizer, longest=longest
        ).examples.examples
        positions = "labels"
    else:
        sequences = texts
    if against is None:
        result = perplexity(opened.decoder, sequences, positions=positions)
        figures: dict[str, Any] = {"perplexity": result.perplexity, "num_tokens": result.num_tokens}
    else:
        parent = _open_parent(opened, against, source)
        comparison = compare_models(opened.decoder, parent.decoder, sequences, positions=positions)
        figures = _figures(opened, parent, comparison, gate_options)
    return EvalRecord(
        task="perplexity",
        model=opened.name,
        data=data.source,
        template=template,
        metric="perplexity",
        against=against,
        quantize=quantize_of(opened),
        **figures,
    )
