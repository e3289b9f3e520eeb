"""The command that opens a page on which models answer side by side."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli import options
from burnish.cli.output import note, print_json
from burnish.cli.setting_names import named_as_given


def register(app: typer.Typer) -> None:
    app.command(short_help="A page on which models answer the same prompt side by side.")(compare)


def compare(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="Folder, hub id, or burnish-sql-base; the others are held against it."),
    ],
    tuned: Annotated[
        list[str], typer.Argument(metavar="TUNED...", help="Models to compare with it; an adapter's folder is one too.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys that open the page, one a line; else those of BURNISH_API_KEYS, joined by commas.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Answers that one model computes at once.")] = 4,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait beyond those, for each model.")] = 32,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; what the model was made for if not given.")
    ] = None,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="After SIGTERM, time for running answers to end.")
    ] = 10.0,
    quantize: options.Quantize = "none",
    weights_cache: options.WeightsCache = True,
    memory: options.Memory = None,
    kv_memory: options.KvMemory = None,
    kv_dtype: options.KvDtype = None,
    max_batch_tokens: options.MaxBatchTokens = None,
    speculation: options.Speculation = "auto",
    config: options.Config = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", help="CPU threads of each model; the cores shared evenly if not given.")
    ] = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout when the page is up.")
    ] = False,
    quiet: options.Quiet = False,
) -> int | None:
    """Compare BASE and TUNED... on a page: one prompt, answers streamed side by side, each with its fingerprint.

    SQL answers are run on a sample database. Every model has an engine of its own; --memory and --kv-memory are each
    engine's.
    """
    from burnish._optional import require

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, extra="serve")
    require_page()
    from burnish.pipeline.comparing import open_compared, threads_each
    from burnish.pipeline.serving import ServedEngine
    from burnish.serve.compare_group import ServiceGroup
    from burnish.serve.keys import load_keys
    from burnish.serve.page_app import PageApp
    from burnish.serve.server import bind, is_loopback, run_server
    from burnish.serve.settings import ServeSettings

    with named_as_given(context):
        settings = ServeSettings(max_running=concurrency, max_queue=max_queue, grace_s=grace)
    keys = load_keys(api_keys)
    names = [base, *tuned]
    engine = ServedEngine(
        dtype=dtype,
        device=device,
        max_num_seqs=concurrency,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        memory=memory,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
        threads=threads if threads is not None or device != "cpu" else threads_each(len(names)),
        quantize=quantize,
        weights_cache=weights_cache,
        speculation=speculation,
        revision=revision,
        offline=offline,
        allow_pickle=allow_pickle,
    )
    listener = bind(host, port)
    try:
        models = open_compared(names, engine, settings, say=lambda line: note(line, quiet=quiet))
        services = [model.service for model in models]
        group = ServiceGroup(services, vital=services)
        app = PageApp(models, group, keys=keys)
    except BaseException:
        listener.close()
        raise
    url = page_url(listener)
    if keys is None and not is_loopback(listener.getsockname()[0]):
        note("warning: anybody who reaches this address may use the page; give it --api-keys", quiet=quiet)

    def on_ready() -> None:
        if json:
            record = [
                {
                    "name": model.name,
                    "model": model.model.root,
                    "fingerprint": model.model.fingerprint,
                    "weights": model.digest,
                }
                for model in models
            ]
            print_json({"url": url, "models": record, "api_keys": keys is not None})
            sys.stdout.flush()
        for model in models:
            note(f"{model.fingerprint}  {model.name}", quiet=quiet or json)
        note(f"comparing at {url} (Ctrl-C ends it)", quiet=quiet or json)

    return run_server(app, group, listener, on_ready=on_ready)


def require_page() -> None:
    """Raise MissingExtraError where what the page is made with is not installed."""
    from burnish._optional import require

    require("gradio", extra="ui")


def with_page(api: Any, service: Any, engine: Any, others: Sequence[str], settings: Any, keys: Any) -> tuple[Any, Any]:
    """A served model's application with the page on it, and what runs together.

    Args:
        api, service, engine: of the model that the API serves; its adapters are on the page, too.
        others: further models for the page alone.
    """
    from burnish.pipeline.comparing import compared_models, distinct_names, open_compared
    from burnish.serve.compare_group import ServiceGroup
    from burnish.serve.page_app import PageApp

    beside = open_compared(others, engine, settings, say=service.say)
    models = distinct_names([*compared_models(service, engine), *beside])
    group = ServiceGroup([service, *[model.service for model in beside]], vital=[service], first_is_open=True)
    return PageApp(models, group, keys=keys, api=api), group


def page_url(listener: socket.socket) -> str:
    """The page's address, as people are given it."""
    from burnish.serve.page_app import PREFIX
    from burnish.serve.server import url_of

    return url_of(listener).removesuffix("/v1") + f"{PREFIX}/"
