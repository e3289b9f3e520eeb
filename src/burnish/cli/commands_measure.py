"""Commands that measure: eval, bench, report, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli import options
from burnish.cli.output import note, print_json, print_table, stdout, watching
from burnish.errors import ConfigError

runs_app = typer.Typer(help="Runs and what they left behind.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    app.command(name="eval", short_help="Score a model: SQL accuracy, perplexity, BLEU, KL from a parent.")(evaluate)
    app.command(short_help="Measure throughput, latency and memory under a workload.")(bench)
    app.command()(report)
    runs_app.command(name="ls")(list_runs)
    runs_app.command(name="show")(show_run)
    app.add_typer(runs_app, name="runs")


def evaluate(
    model: options.ModelArgument,
    task: Annotated[str, typer.Option("--task", help="text-to-sql, perplexity or bleu.")] = "text-to-sql",
    data: Annotated[
        str | None, typer.Option("--data", help="Rows or text; the bundled test rows when not given.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Parent model: KL, greedy agreement and its answers beside; a gate for a child.")
    ] = None,
    adapter: options.Adapter = None,
    quantize: options.Quantize = "none",
    weights_cache: options.WeightsCache = True,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    template: options.Template = "auto",
    columns: options.Columns = None,
    limit: Annotated[int | None, typer.Option(help="Use this many rows at most.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    max_length: Annotated[int, typer.Option(help="Longest example in tokens, for perplexity and KL.")] = 512,
    show_answers: Annotated[int, typer.Option(help="Print this many wrong answers.")] = 0,
    max_kl: options.MaxKl = None,
    max_kl_p99: options.MaxKlP99 = None,
    min_agreement: options.MinAgreement = None,
    max_perplexity_ratio: options.MaxPerplexityRatio = None,
    max_score_drop: options.MaxScoreDrop = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write parent and child side by side to this file (html, md).")
    ] = None,
    track: options.Track = None,
    config: options.Config = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score MODEL at a task: execution accuracy of SQL, perplexity, BLEU; with --against, beside its parent.

    Exit 4 if a child is worse than its limits allow: those it was made under, those of its bits, or those given.
    """
    from burnish.cli.show_measures import show_eval
    from burnish.pipeline.evaluate import evaluate as run
    from burnish.pipeline.examples import DataConfig
    from burnish.pipeline.gates import GateOptions, gate_error
    from burnish.pipeline.opening import Source
    from burnish.pipeline.side_by_side import write_comparison
    from burnish.pipeline.tracked import tracked_to

    rows = None
    if data is not None or limit is not None:
        rows = DataConfig(
            source=data or "text-to-sql:test:300",
            template=template,
            columns=options.parse_columns(columns),
            limit=limit,
            max_length=max_length,
            seed=seed,
            offline=offline,
        )
    source = Source(
        device=device, dtype=dtype, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
    )
    limits = GateOptions(
        max_kl=max_kl,
        max_kl_p99=max_kl_p99,
        min_agreement=min_agreement,
        max_perplexity_ratio=max_perplexity_ratio,
        max_score_drop=max_score_drop,
    )
    if against is None and (report is not None or limits.any_limit):
        raise ConfigError("limits and --report need a parent", remedy="Name it with --against.")
    if report is not None and report.suffix not in (".html", ".md"):
        raise ConfigError("--report has no known ending", got=str(report), expected=".html or .md")
    told = {"model": model, "task": task, "data": rows, "against": against, "adapter": adapter, "quantize": quantize}
    with (
        watching(quiet=quiet) as progress,
        tracked_to(track, "eval", told, on=model, say=progress.say, warn=progress.warn) as stage,
    ):
        record = run(
            model,
            task=task,
            data=rows,
            against=against,
            adapter=adapter,
            quantize=quantize,
            weights_cache=weights_cache,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_tokens=max_tokens,
            gate_options=limits,
            source=source,
            progress=progress,
        )
        stage.inputs({"model": model, "adapter": adapter, "against": against}, source)
        stage.record(record)
        if report is not None:
            write_comparison(report, record, source)
            stage.tracker.artifact(report)
    if report is not None:
        note(f"written: {report}", quiet=quiet)
    if record.num_bad_rows:
        note(f"{record.num_bad_rows} bad rows were left out; see them with: burnish data inspect", quiet=quiet)
    print_json(record) if json else show_eval(stdout(), record, num_wrong=show_answers)
    if record.gate is not None and not record.gate.passed:
        remedy = "Make it again with more bits, a larger calibration, or --act-order; or allow more with --max-kl."
        raise gate_error(record.model, record.gate, remedy=remedy, marked=False)


def bench(
    model: options.ModelArgument,
    input_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 1,
    num_requests: Annotated[
        int | None, typer.Option(help="Requests of one pass; as many as --concurrency when not given.")
    ] = None,
    engine: options.Engine = "native",
    vs: Annotated[str | None, typer.Option("--vs", help="Another engine, run in turn with the first.")] = None,
    vs_model: Annotated[
        str | None, typer.Option("--vs-model", metavar="MODEL", help="What the other engine runs; MODEL if not given.")
    ] = None,
    vs_quantize: Annotated[str, typer.Option("--vs-quantize", help="As --quantize, of the other engine.")] = "none",
    quantize: options.Quantize = "none",
    weights_cache: options.WeightsCache = True,
    memory: options.Memory = None,
    kv_memory: options.KvMemory = None,
    kv_dtype: options.KvDtype = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    speculation: options.Speculation = "auto",
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    adapter: options.Adapter = None,
    repeats: Annotated[int, typer.Option(help="Measured passes.")] = 3,
    warmup: Annotated[int, typer.Option(help="Passes before them that are not measured.")] = 1,
    kv_cache: Annotated[bool, typer.Option(help="Keep keys and values; without, every token is computed anew.")] = True,
    track: options.Track = None,
    config: options.Config = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure MODEL's throughput, latency and memory under a workload."""
    from burnish.cli.show_measures import show_bench, show_versus
    from burnish.measure.bench import VersusResult, Workload
    from burnish.pipeline.bench import bench as run
    from burnish.pipeline.opening import EngineOptions, Source
    from burnish.pipeline.tracked import tracked_to

    workload = Workload(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        num_requests=num_requests,
        seed=seed,
    )
    source = Source(
        device=device, dtype=dtype, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
    )
    told = {"model": model, "workload": workload, "engine": engine, "against": vs, "quantize": quantize}
    with (
        watching(quiet=quiet) as progress,
        tracked_to(track, "bench", told, on=model, say=progress.say, warn=progress.warn) as stage,
    ):
        result = run(
            model,
            workload=workload,
            engine=engine,
            versus=vs,
            versus_model=vs_model,
            versus_quantize=vs_quantize,
            adapter=adapter,
            repeats=repeats,
            warmup=warmup,
            options=EngineOptions(
                quantize=quantize,
                weights_cache=weights_cache,
                memory=memory,
                kv_memory=kv_memory,
                kv_dtype=kv_dtype,
                max_batch_tokens=max_batch_tokens,
                speculation=speculation,
                kv_cache=kv_cache,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
            ),
            source=source,
            progress=progress,
        )
        read = {"model": (engine, model), "adapter": (engine, adapter), "against": (vs, vs_model)}
        ours = {name: folder for name, (runs_on, folder) in read.items() if runs_on in ("native", "transformers")}
        stage.inputs(ours, source)
        stage.record(result.to_dict())
    if json:
        print_json(result.to_dict())
    elif isinstance(result, VersusResult):
        show_versus(stdout(), result)
    else:
        show_bench(stdout(), result)


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Runs, or folders of children; the newest run when not given."),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="table, md, html, json or csv; as --out ends, else table.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write instead of stdout.")] = None,
    config: options.Config = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a run's variants and stages, predicted beside measured; or a child beside its parent."""
    from burnish.measure.report import FORMATS, combine_runs, render
    from burnish.models.atomic_files import write_text
    from burnish.pipeline.runs import load_runs

    suffix = out.suffix.lower().removeprefix(".") if out is not None else ""
    chosen = "json" if json else format or (suffix if suffix in FORMATS else "table")
    run = combine_runs(load_runs(list(runs or [])))
    console = stdout()
    text = render(run, format=chosen, width=min(console.width, 140), color=console.is_terminal and out is None)
    if out is None:
        typer.echo(text, nl=False, color=console.is_terminal)
        return
    write_text(out, text)
    note(f"written: {out}", quiet=quiet)


def list_runs(json: options.Json = False) -> None:
    """List runs, oldest first."""
    from rich.table import Table

    from burnish.measure.formatting import format_share
    from burnish.measure.run_record import read_run
    from burnish.pipeline import runs

    found = [(folder, read_run(folder)) for folder in runs.list_runs()]
    if json:
        print_json(
            [
                {"path": str(folder), "name": run.name, "created": run.created, "model": run.model}
                for folder, run in found
            ]
        )
        return
    if not found:
        raise ConfigError(f"there is no run in {runs.runs_folder()}", remedy="Make one with: burnish demo")
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "created", "model", "variants", "best score"):
        table.add_column(heading, overflow="fold")
    for folder, run in found:
        scores = [variant.score for variant in run.variants if variant.score is not None]
        table.add_row(
            folder.name, run.created, run.model, str(len(run.variants)), format_share(max(scores)) if scores else "–"
        )
    print_table(stdout(), table)


def show_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or name.", show_default=False)],
    json: options.Json = False,
) -> None:
    """Print a run's whole record (--json), or its report."""
    from burnish.measure.report import render
    from burnish.pipeline.runs import load_runs

    record = load_runs([run])[0]
    if json:
        whole: dict[str, Any] = record.to_dict()
        print_json(whole)
        return
    console = stdout()
    typer.echo(
        render(record, width=min(console.width, 140), color=console.is_terminal), nl=False, color=console.is_terminal
    )
