"""The commands of the job queue: submit, work, status, collect, retry, dead."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli import options, ray_options
from burnish.cli.output import counted, note, print_json, stdout, watching
from burnish.errors import ConfigError, DataError

Store = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="URL",
        envvar="BURNISH_QUEUE_STORE",
        help="Database of items and results: sqlite:///FILE, mysql://... or postgresql://...",
    ),
]
Broker = Annotated[
    str | None,
    typer.Option(
        "--broker",
        metavar="URL",
        envvar="BURNISH_QUEUE_BROKER",
        help="RabbitMQ, as amqp://USER:PASSWORD@HOST/; the database is the queue when not given.",
    ),
]
Queue = Annotated[str, typer.Option("--queue", metavar="NAME", help="Queues of other names have other workers.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="As submit printed it.", show_default=False)]
_STORE = "sqlite:///burnish-queue.db"


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Many prompts, worked off by any number of workers.")
    group.command(short_help="Store prompts as a job; no model is loaded.")(submit)
    group.command(short_help="Answer the queue's prompts with a model.")(work)
    group.command(short_help="Jobs, workers, and what is still to be done.")(status)
    group.command(short_help="Write a job's results in the order of its prompts.")(collect)
    group.command(short_help="Do failed items of a job again.")(retry)
    group.command(short_help="List items that failed, or that their workers died of.")(dead)
    app.add_typer(group, name="queue")


def submit(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help='JSONL with "prompt" or "messages", or text lines; - for stdin.')
    ],
    job: Annotated[str | None, typer.Option("--job", metavar="NAME", help="Made up when not given.")] = None,
    store: Store = _STORE,
    broker: Broker = None,
    queue: Queue = "default",
    priority: Annotated[str, typer.Option(help="low, normal or high; a row may say otherwise.")] = "normal",
    chat_template: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
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
    max_attempts: Annotated[int, typer.Option(help="Give an item up when its workers died so often.")] = 5,
    config: options.Config = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of sampling.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check PROMPTS, store them as a job, and send them to the broker if there is one; prints the job's name."""
    from burnish.engine.sampling import SamplingParams
    from burnish.scale.items import rank_of
    from burnish.scale.opening import QueueAddress, open_publisher, open_store
    from burnish.scale.submit import submit_file

    if not 1 <= max_attempts <= 100:
        raise ConfigError("max-attempts is out of range", got=max_attempts, expected="1 to 100")
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": list(stop or ()),
        "ignore_eos": ignore_eos,
        "seed": seed,
    }
    plain = SamplingParams()
    params = {name: value for name, value in given.items() if value not in (getattr(plain, name), [])}
    rank = rank_of(priority, where="--priority")
    address = QueueAddress(store=store, broker=broker, queue=queue)
    with (
        _as_file(prompts) as path,
        open_store(address) as opened,
        open_publisher(address) as publisher,
        watching(quiet=quiet) as progress,
    ):
        done = submit_file(
            opened,
            publisher,
            path,
            source="stdin" if prompts == "-" else prompts,
            queue=queue,
            params=params,
            job_id=job,
            rank=rank,
            as_chat=chat_template,
            max_attempts=max_attempts,
            progress=progress,
        )
    if json:
        print_json(done)
        return
    typer.echo(done.job_id)
    items = counted(done.num_items, "item")
    if not done.published:
        told = f"job {done.job_id} is there already, {items} in queue {queue}; nothing was added"
    elif done.published < done.num_items:
        told = f"{items} in queue {queue}, {done.published} of them added now"
    else:
        told = f"{items} in queue {queue}"
    note(f"{told}; see: burnish queue status {done.job_id}", quiet=quiet)


def work(
    context: typer.Context,
    model: options.ModelArgument,
    store: Store = _STORE,
    broker: Broker = None,
    queue: Queue = "default",
    workers: Annotated[int, typer.Option(help="Processes, which share the cores; one that dies starts again.")] = 1,
    ray: ray_options.Ray = None,
    resources: ray_options.Resources = None,
    min_workers: ray_options.MinWorkers = None,
    max_workers: ray_options.MaxWorkers = None,
    shrink_after: ray_options.ShrinkAfter = None,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="End when every item has a result.")] = False,
    lease: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Items of a worker that is silent so long go to others (no broker)."),
    ] = 60.0,
    adapter: options.Adapter = None,
    concurrency: Annotated[int, typer.Option(help="Items at once, in each process.")] = 32,
    quantize: options.Quantize = "none",
    weights_cache: options.WeightsCache = True,
    memory: options.Memory = None,
    kv_memory: options.KvMemory = None,
    kv_dtype: options.KvDtype = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    speculation: options.Speculation = "auto",
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    config: options.Config = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int | None:
    """Answer items of the queue as they come. SIGTERM or Ctrl-C finishes what is begun; once more ends at once."""
    from burnish.scale.opening import QueueAddress

    if concurrency < 1 or workers < 1:
        name, got = ("concurrency", concurrency) if concurrency < 1 else ("workers", workers)
        raise ConfigError(f"{name} is out of range", got=got, expected="1 or more")
    origin = context.get_parameter_source("lease")
    if broker is not None and origin is not None and origin.name != "DEFAULT":
        raise ConfigError("--lease does not go with --broker, which notices at once when a worker is gone", got=lease)
    address = QueueAddress(store=store, broker=broker, queue=queue)
    described = model if adapter is None else f"{model} with {adapter}"
    given_source: dict[str, Any] = {
        "device": device, "dtype": dtype, "threads": threads, "revision": revision, "offline": offline,
        "allow_pickle": allow_pickle,
    }  # fmt: skip
    given_options: dict[str, Any] = {
        "quantize": quantize, "weights_cache": weights_cache, "memory": memory, "kv_memory": kv_memory,
        "kv_dtype": kv_dtype, "max_batch_tokens": max_batch_tokens, "speculation": speculation,
        "tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel,
    }  # fmt: skip
    if ray is not None:
        from burnish.cli.queue_on_ray import QueueEngine, RayWish, absolute, work_on_ray

        where, on = absolute(model) or model, absolute(adapter)
        made = QueueEngine(model=where, adapter=on, slots=concurrency, source=given_source, options=given_options)
        wish = RayWish(ray, workers, min_workers, max_workers, resources, shrink_after)
        return work_on_ray(
            wish, address, made, model=described, lease_s=lease, until_empty=until_empty, json=json, quiet=quiet,
            stopping=_stopping,
        )  # fmt: skip
    ray_options.refuse_without_ray(
        resources=resources, min_workers=min_workers, max_workers=max_workers, shrink_after=shrink_after
    )
    if workers > 1:
        if json:
            raise ConfigError("--json tells of one worker", got=f"--workers {workers}")
        from burnish.cli.queue_processes import supervise

        cards = tensor_parallel * pipeline_parallel if device == "cuda" else 0
        words = context.find_root().obj
        return supervise(words, workers, threads=threads, cards=cards, quiet=quiet, stopping=_stopping)
    from burnish.cli.show_queue import elsewhere
    from burnish.pipeline.opening import EngineOptions, Source, open_engine
    from burnish.scale.opening import open_store, open_worker

    source, engine_options = Source(**given_source), EngineOptions(**given_options)

    def engine() -> Any:
        return open_engine(model, source, adapter=adapter, max_num_seqs=concurrency, options=engine_options)

    with (
        watching(quiet=quiet) as progress,
        open_worker(
            address,
            engine,
            model=described,
            slots=concurrency,
            until_empty=until_empty,
            lease_s=lease,
            say=progress.say,
        ) as worker,
        _stopping(worker, quiet=quiet),
    ):
        note(f"working on queue {queue}", quiet=quiet)
        with open_store(address, makes=False) as opened:
            if not quiet and (others := elsewhere(opened, queue)):
                note(others)
        report = worker.run()
    if json:
        print_json(report)
        return None
    failed = f", {report.errors} of them errors" if report.errors else ""
    items = counted(report.done + report.errors, "item")
    note(f"{items} in {report.seconds:.1f} s{failed}, {report.output_tokens} tokens", quiet=quiet)
    return None


def status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="All jobs when not given.")] = None,
    store: Store = _STORE,
    broker: Broker = None,
    queue: Queue = "default",
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Jobs with their items by state, workers, and with --broker the messages that wait in QUEUE."""
    from burnish.cli.show_queue import show_status, status_record
    from burnish.scale.opening import QueueAddress, open_publisher, open_store

    address = QueueAddress(store=store, broker=broker, queue=queue)
    with open_store(address, makes=False) as opened, open_publisher(address, makes=False) as publisher:
        record = status_record(opened, job, depths=publisher.depths(), queue=queue)
    print_json(record) if json else show_status(stdout(), record)


def collect(
    job: JobArgument,
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="File, s3://BUCKET/KEY, or - for stdout.")] = "-",
    form: Annotated[
        str | None, typer.Option("--format", help="jsonl or parquet; by the ending of PATH when not given.")
    ] = None,
    store: Store = _STORE,
    wait: Annotated[bool, typer.Option("--wait", help="Until the job is finished.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="Leave out what is not finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    config: options.Config = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a job's results in the order of its prompts; items that failed have an error instead of a text."""
    from burnish.scale.collect import check_out, format_of, wait_for
    from burnish.scale.collect import collect as run
    from burnish.scale.opening import QueueAddress, open_store

    if wait and partial:
        raise ConfigError("--wait and --partial exclude each other")
    if json and out == "-":
        raise ConfigError("--json and the results cannot both go to stdout", remedy="Name a file with --out.")
    chosen = format_of(out, form)
    check_out(out, overwrite=overwrite)
    with open_store(QueueAddress(store=store), makes=False) as opened:
        if wait:
            with watching(quiet=quiet) as progress:
                wait_for(opened, job, progress=lambda done, total: progress("Waiting", done, total))
        record = run(opened, job, out=out, form=chosen, partial=partial, overwrite=overwrite)
    if json:
        print_json(record)
        return
    failed = f", {counted(record.errors, 'error')}" if record.errors else ""
    left = f", {record.unfinished} unfinished" if record.unfinished else ""
    note(f"{counted(record.rows, 'result')} to {'stdout' if out == '-' else out}{failed}{left}", quiet=quiet)


def retry(
    job: JobArgument,
    which: Annotated[
        str, typer.Option("--state", help="failed (errors and dead), error, dead; or unfinished: sent once more.")
    ] = "failed",
    store: Store = _STORE,
    broker: Broker = None,
    config: options.Config = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Let items of a job be done again; their old results are forgotten."""
    from burnish.scale.opening import QueueAddress, open_publisher, open_store
    from burnish.scale.submit import RETRIED
    from burnish.scale.submit import retry as run

    if which not in RETRIED:
        raise ConfigError("--state is out of range", got=which, expected=", ".join(RETRIED))
    with open_store(QueueAddress(store=store, broker=broker), makes=False) as opened:
        address = QueueAddress(store=store, broker=broker, queue=opened.job(job).queue)
        with open_publisher(address) as publisher, watching(quiet=quiet) as progress:
            count = run(opened, publisher, job, which=which, progress=progress)
    if json:
        print_json({"job_id": job, "retried": count})
        return
    note(f"{counted(count, 'item')} to be done again", quiet=quiet)


def dead(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="All jobs when not given.")] = None,
    store: Store = _STORE,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """List items that failed: errors, and those given up because their workers died."""
    from burnish.cli.show_queue import failures, show_failures
    from burnish.scale.opening import QueueAddress, open_store

    with open_store(QueueAddress(store=store), makes=False) as opened:
        rows = failures(opened, job)
        print_json(list(rows)) if json else show_failures(stdout(), rows)


@contextmanager
def _as_file(source: str) -> Iterator[Path]:
    """The file of a name; stdin is copied, as a file is read twice. One that cannot be read is told at once."""
    from burnish.scale.items import read_items

    if source != "-":
        next(read_items(Path(source), name=source))
        yield Path(source)
        return
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as copy:
        try:
            for line in sys.stdin:
                copy.write(line)
        except UnicodeError as error:
            raise DataError("stdin cannot be read as text", got=error) from error
        copy.flush()
        yield Path(copy.name)


@contextmanager
def _stopping(worker: Any, *, quiet: bool) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C drains, the second ends this process at once."""
    asked = False

    def stop(number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            if hasattr(worker, "kill"):
                worker.kill()
            os._exit(128 + number)
        asked = True
        worker.drain()
        note("finishing what is begun; once more ends at once", quiet=quiet)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
