"""The command that serves a model over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli import options, ray_options
from burnish.cli.command_compare import page_url, require_page, with_page
from burnish.cli.output import note, print_json
from burnish.cli.setting_names import given, named_as_given
from burnish.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command(short_help="OpenAI's HTTP API over a model and its adapters.")(serve)


def serve(
    context: typer.Context,
    model: options.ModelArgument,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="LoRA adapter to serve beside the model, as a model of this name; may be given several times.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; its folder's name or hub id when not given.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base, where MODEL is an adapter and names another or none.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys, one a line; else those of BURNISH_API_KEYS, joined by commas. Without, anybody may ask.",
        ),
    ] = None,
    ui: Annotated[
        bool, typer.Option("--ui", help="Also a page at /ui/ where the model and its adapters answer side by side.")
    ] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="With --ui: a further model on the page, in an engine of its own; may be given several times.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Answers computed at once.")] = 32,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait beyond those; further ones get 429.")] = 128,
    max_model_len: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; what the model was made for if not given.")
    ] = None,
    max_body: Annotated[int, typer.Option(metavar="MIB", help="Largest body of a request, in MiB.")] = 4,
    stream_interval: Annotated[
        float, typer.Option(metavar="MS", help="A stream gets what is new at most this often; 0: every token alone.")
    ] = 20.0,
    slow_reader: Annotated[
        float, typer.Option(metavar="SECONDS", help="A client that reads nothing for so long is cut off.")
    ] = 20.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="After SIGTERM, time for running requests to end.")
    ] = 30.0,
    engine_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="An engine that computes and says nothing for so long is started anew."),
    ] = 300.0,
    max_restarts: Annotated[
        int, typer.Option(help="Engine failures within ten minutes after which the server gives up.")
    ] = 5,
    ray: ray_options.Ray = None,
    replicas: ray_options.Replicas = None,
    resources: ray_options.Resources = None,
    track: options.Track = None,
    track_interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Rates, latencies and accuracy go to the tracker so often.")
    ] = 30.0,
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
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout when requests are taken.")
    ] = False,
    quiet: options.Quiet = False,
) -> int | None:
    """Serve MODEL with OpenAI's HTTP API: /v1/chat/completions, /v1/completions, /v1/models, /v1/tokenize, /metrics.

    A first SIGTERM or Ctrl-C lets running requests end, a second one ends at once (exit code 130).
    """
    from burnish._optional import require

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, extra="serve")
    if ui:
        require_page()
    elif compare:
        raise ConfigError("--compare is for the page", remedy="Add --ui.")
    from burnish.pipeline.comparing import threads_each
    from burnish.pipeline.serving import ServedEngine, follow_launched, open_served
    from burnish.pipeline.tracked import tracked
    from burnish.serve.app import make_app
    from burnish.serve.keys import load_keys
    from burnish.serve.reporting import reporting
    from burnish.serve.server import bind, is_loopback, run_server, url_of
    from burnish.serve.service import Service
    from burnish.serve.settings import ServeSettings
    from burnish.track.making import make_tracker
    from burnish.track.null import NullTracker

    if not 1 <= track_interval <= 86400:
        raise ConfigError("--track-interval is out of range", got=track_interval, expected="1 to 86400 seconds")
    with named_as_given(context):
        settings = ServeSettings(
            max_running=concurrency,
            max_queue=max_queue,
            max_body_bytes=max_body * 2**20,
            stream_interval_s=stream_interval / 1e3,
            slow_reader_timeout_s=slow_reader,
            grace_s=grace,
            engine_timeout_s=engine_timeout,
            max_restarts=max_restarts,
        )
    keys = load_keys(api_keys)
    engine = ServedEngine(
        dtype=dtype,
        device=device,
        max_num_seqs=concurrency,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        memory=memory,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
        threads=threads if threads is not None or not compare else threads_each(1 + len(compare)),
        quantize=quantize,
        weights_cache=weights_cache,
        speculation=speculation,
        revision=revision,
        offline=offline,
        allow_pickle=allow_pickle,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    if ray is not None:
        ray_options.refuse_with_ray(
            context, "slow_reader", "ui", "compare", "track", "track_interval", "tensor_parallel", "pipeline_parallel"
        )
        from burnish.cli.serve_on_ray import serve_with_ray

        return serve_with_ray(
            ray, model, engine, settings, name=name, adapters=_adapters(adapter), base=base, host=host, port=port,
            keys=keys, replicas=1 if replicas is None else replicas, resources=resources, json=json, quiet=quiet,
        )  # fmt: skip
    follow_launched(engine)
    ray_options.refuse_without_ray(replicas=replicas, resources=resources)
    tracker = make_tracker(track, warn=note, say=lambda line: note(line, quiet=quiet))
    if isinstance(tracker, NullTracker) and given(context, "track_interval"):
        raise ConfigError("--track-interval goes with --track", got=track_interval)
    listener = bind(host, port)
    try:
        served = open_served(model, engine, name=name, adapters=_adapters(adapter), base=base)
    except BaseException:
        listener.close()
        raise
    service = Service(served, settings, keys=keys, say=lambda line: note(line, quiet=quiet))
    app: Any = make_app(service)
    running: Any = service
    if ui:
        try:
            app, running = with_page(app, service, engine, compare or [], settings, keys)
        except BaseException:
            listener.close()
            raise
    url = url_of(listener)
    names = [each.name for each in served.models]
    if keys is None and not is_loopback(listener.getsockname()[0]):
        note("warning: anybody who reaches this address may use the server; give it --api-keys", quiet=quiet)

    def on_ready() -> None:
        if json:
            print_json({"url": url, "models": names, "api_keys": keys is not None})
            sys.stdout.flush()
        note(f"serving {', '.join(names)} at {url} (Ctrl-C ends it)", quiet=quiet or json)
        if ui:
            note(f"the page is at {page_url(listener)}", quiet=quiet or json)

    told = {"models": {each.name: each.fingerprint for each in served.models}, "engine": engine, "server": settings}
    with (
        tracked(tracker, f"serve-{names[0]}", told),
        reporting(service.metrics.registry, tracker, interval_s=track_interval),
    ):
        return run_server(app, running, listener, on_ready=on_ready)


def _adapters(given: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given or []:
        name, sign, folder = text.partition("=")
        if not sign or not name or not folder:
            raise ConfigError("--adapter is malformed", got=repr(text), expected="NAME=DIR")
        if name in found:
            raise ConfigError(f"two adapters are called {name}", remedy="Give them different names.")
        found[name] = folder
    return found
