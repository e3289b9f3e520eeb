"""Commands that use a model: demo, chat, generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from burnish.cli import options
from burnish.cli.output import counted, note, print_json, stdout, watching
from burnish.errors import ConfigError, DataError


def register(app: typer.Typer) -> None:
    app.command(short_help="The whole story on the bundled model, offline, with a report.")(demo)
    app.command(short_help="Talk to a model: answers stream, and their metrics follow.")(chat)
    app.command()(generate)


def demo(
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for the run; runs/<time>-demo when not given.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Shorten tuning to this time; results are then worse.")] = None,
    rows: Annotated[int, typer.Option(help="Test questions.")] = 300,
    track: options.Track = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    config: options.Config = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """The whole story on the bundled model and data, offline: tune, merge, quantize, evaluate, bench, report."""
    from burnish.measure.report import build_report, render
    from burnish.pipeline.demo import require_passed, run_demo

    with watching(quiet=quiet) as progress:
        folder, run = run_demo(
            out=out,
            seed=seed,
            threads=threads,
            max_seconds=seconds,
            num_rows=rows,
            track=track,
            progress=progress,
            say=progress.say,
            warn=progress.warn,
        )
    if json:
        print_json(build_report(run))
        require_passed(folder, run)
        return
    console = stdout()
    typer.echo(
        render(run, width=min(console.width, 140), color=console.is_terminal), nl=False, color=console.is_terminal
    )
    note(f"\nreport: {folder / 'report.html'}\ntalk to it: burnish chat {folder / 'merged'}", quiet=quiet)
    require_passed(folder, run)


def chat(
    model: options.ModelArgument,
    adapter: options.Adapter = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Text put before every question, such as a schema; @FILE reads it.")
    ] = None,
    template: options.Template = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8, int4, none, or auto (if not given): int8 on a CPU where it is measured to be good enough.",
            show_default=False,
        ),
    ] = None,
    weights_cache: options.WeightsCache = True,
    memory: options.Memory = None,
    kv_memory: options.KvMemory = None,
    kv_dtype: options.KvDtype = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    speculation: options.Speculation = "auto",
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 for all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.0,
    kv_cache: Annotated[
        bool, typer.Option(help="Without, every token is computed anew: see what the cache is worth.")
    ] = True,
    engine: options.Engine = "native",
    config: options.Config = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of sampling.")] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON line per answer on stdout.")] = False,
    quiet: options.Quiet = False,
) -> int | None:
    """Load MODEL, wait for a prompt, stream the answer, print the metrics. /help lists what else can be typed."""
    from burnish.cli.chat_session import ChatSession, open_chat
    from burnish.engine.sampling import SamplingParams
    from burnish.pipeline.opening import EngineOptions, Source

    source = Source(
        device=device, dtype=dtype, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
    )
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    text = read_text_option(context)
    opened = open_chat(
        model,
        source,
        adapter=adapter,
        engine=engine,
        options=EngineOptions(
            quantize=quantize or ("auto" if engine == "native" else "none"),
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
        template=template,
        quiet=quiet or json,
    )
    session = ChatSession(opened, params, system=system, context=text, json=json, quiet=quiet)
    return session.run(sys.stdin)


def generate(
    model: options.ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Prompt; may be given several times.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='Text file, one prompt a line; or JSONL with "prompt" or "messages"; - for stdin.',
        ),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    adapter: options.Adapter = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="String that ends the answer; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on past the end token.")] = False,
    concurrency: Annotated[int, typer.Option(help="Prompts at once.")] = 32,
    quantize: options.Quantize = "none",
    weights_cache: options.WeightsCache = True,
    memory: options.Memory = None,
    kv_memory: options.KvMemory = None,
    kv_dtype: options.KvDtype = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    speculation: options.Speculation = "auto",
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    kv_cache: Annotated[bool, typer.Option(help="Keep keys and values.")] = True,
    engine: options.Engine = "native",
    config: options.Config = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of sampling.")] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue prompts; answers come in the prompts' order."""
    from burnish.cli.prompt_files import read_prompts
    from burnish.cli.show_engine import optimised_lines
    from burnish.engine.sampling import SamplingParams
    from burnish.pipeline.opening import EngineOptions, Source, open_engine

    if (prompt is None) == (prompts is None):
        raise ConfigError("generate needs prompts", expected="either --prompt or --prompts FILE")
    if concurrency < 1:
        raise ConfigError("concurrency is out of range", got=concurrency, expected="1 or more")
    given = read_prompts(prompts) if prompts is not None else list(prompt or [])
    if chat_template:
        given = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in given]
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    source = Source(
        device=device, dtype=dtype, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
    )
    running = open_engine(
        model,
        source,
        adapter=adapter,
        engine=engine,
        max_num_seqs=min(concurrency, len(given)),
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
    )
    for line in optimised_lines(running):
        note(line, quiet=quiet)
    results = []
    with watching(quiet=quiet) as progress:
        for output in running.generate(given, params):
            results.append(output)
            progress("Generating", len(results), len(given))
            if not json:
                progress.echo(output.text if len(given) == 1 else f"[{output.index}] {output.text}")
    if json:
        print_json(results)
        return
    tokens = sum(output.metrics.output_tokens for output in results)
    longest = max(output.metrics.e2e_ms for output in results) / 1e3
    note(counted(len(results), "answer") + f", {tokens} tokens, {tokens / longest:.1f} tokens/s", quiet=quiet)


def read_text_option(text: str | None) -> str | None:
    """An option's text, or with @FILE a file's."""
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {text[1:]}") from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{text[1:]} cannot be read as text", got=reason) from error
