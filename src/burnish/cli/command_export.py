"""The command that writes a model for another program."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from burnish.cli import options
from burnish.cli.output import print_json, stdout, watching


def register(app: typer.Typer) -> None:
    app.command(short_help="Write a model for llama.cpp, CTranslate2 or transformers.")(export)


def export(
    model: options.ModelArgument,
    to: Annotated[str, typer.Option("--to", help="gguf, ctranslate2 or safetensors.")],
    out: Annotated[str, typer.Option("--out", help="File (gguf) or folder to write.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="gguf: q8_0, q4_0, f16, bf16; ctranslate2: int8, int8_float16, int8_float32, float32; "
            "safetensors: auto, float32, bfloat16, float16. The first of each when not given."
        ),
    ] = None,
    gate_data: Annotated[str | None, typer.Option(help="Held-out rows to compare on.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Largest mean KL from the source, nats per token.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least share of equal greedy tokens, 0..1.")] = None,
    config: options.Config = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write MODEL for another program and compare what that makes of it; exit 4 if it is worse than allowed."""
    from burnish.cli.show_stages import show_export
    from burnish.errors import ConfigError
    from burnish.pipeline.export import FORMATS, limits_of
    from burnish.pipeline.export import export as run
    from burnish.pipeline.opening import Source

    if to not in FORMATS:
        raise ConfigError("unknown --to", got=to, expected=", ".join(FORMATS))
    limits = limits_of(format or FORMATS[to][0])
    limits = replace(
        limits,
        max_kl_mean=limits.max_kl_mean if max_kl is None else max_kl,
        min_greedy_agreement=limits.min_greedy_agreement if min_agreement is None else min_agreement,
    )
    source = Source(
        device=device, dtype=dtype, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
    )
    with watching(quiet=quiet) as progress:
        record = run(
            model,
            to=to,
            out=out,
            format=format,
            data=gate_data,
            limits=limits,
            source=source,
            overwrite=overwrite,
            progress=progress,
        )
    print_json(record) if json else show_export(stdout(), record)
