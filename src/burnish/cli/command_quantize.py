"""The command that quantizes a model."""

from __future__ import annotations

from typing import Annotated

import typer

from burnish.cli import options
from burnish.cli.output import print_json, stdout, watching
from burnish.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command(short_help="Quantize a model and hold the child against its parent.")(quantize)


def quantize(
    model: options.ModelArgument,
    out: Annotated[str, typer.Option("--out", help="Folder for the quantized model.")],
    method: Annotated[str, typer.Option(help="gptq, rtn, awq or awq-gptq.")] = "gptq",
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; 4 when no budget is given either.")] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Or bits per layer by what they cost, this many stored per weight on average.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Or so that the weight files stay within it: 600MiB.")
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Spread outliers over all channels before (models with RMSNorm).")
    ] = False,
    group_size: Annotated[int, typer.Option(help="Input features that share a scale; -1 for one per output.")] = 128,
    symmetric: Annotated[bool, typer.Option(help="Zero point in the middle of the grid.")] = True,
    act_order: Annotated[bool, typer.Option(help="Quantize features in order of importance (gptq).")] = False,
    match_parent: Annotated[
        bool, typer.Option("--match-parent", help="Make up for changed inputs: nearer to the parent, slower (gptq).")
    ] = False,
    refine: Annotated[
        int, typer.Option(metavar="N", help="Passes over each layer's scales and integers afterwards (gptq).")
    ] = 0,
    true_sequential: Annotated[
        bool, typer.Option(help="Calibrate a block's later linears on its quantized earlier ones; off is quicker.")
    ] = True,
    damping: Annotated[float, typer.Option(help="Share of the mean added to the Hessian's diagonal (gptq).")] = 0.01,
    calibration: Annotated[
        str | None, typer.Option(help="Rows to calibrate on; the model's training rows when not given.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration rows.")] = 128,
    template: options.Template = "auto",
    gate_data: Annotated[str | None, typer.Option(help="Held-out rows to compare on.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Largest mean KL from the parent, nats per token.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least share of equal greedy tokens, 0..1.")] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never", help="Go on with the unfinished quantization that --out holds.")
    ] = "auto",
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
    """Quantize MODEL's linears into the common GPTQ layout; exit 4 if the child is worse than allowed."""
    from burnish.cli.show_stages import show_quantize
    from burnish.compress.config import MixedPrecision, QuantizeConfig
    from burnish.engine.memory_budget import parse_bytes
    from burnish.pipeline.opening import Source
    from burnish.pipeline.quantize import quantize as run

    mixed = None
    if target_bits is not None or max_size is not None:
        if bits is not None:
            raise ConfigError("--bits and a budget are both given", remedy="Leave one of them out.")
        max_bytes = None if max_size is None else parse_bytes(max_size, name="--max-size")
        mixed = MixedPrecision(target_bits=target_bits, max_bytes=max_bytes)
    settings = QuantizeConfig(
        method=method,
        bits=4 if bits is None else bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_order=act_order,
        match_parent=match_parent,
        refine=refine,
        true_sequential=true_sequential,
        damping=damping,
        rotate=rotate,
    )
    source = Source(
        device=device, dtype=dtype, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
    )
    with watching(quiet=quiet) as progress:
        record = run(
            model,
            out=out,
            config=settings,
            mixed=mixed,
            calibration=calibration,
            num_samples=samples,
            template=template,
            data=gate_data,
            max_kl=max_kl,
            min_agreement=min_agreement,
            source=source,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            notify=progress.say,
        )
    print_json(record) if json else show_quantize(stdout(), record)
