"""The command that quantizes a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from burnish.cli import options
from burnish.cli.output import print_json, stdout, watching
from burnish.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command(short_help="Quantize a model and hold the child against its parent.")(quantize)


def quantize(
    model: options.ModelArgument,
    out: Annotated[str, typer.Option("--out", help="Folder for the quantized model.")],
    method: Annotated[
        str, typer.Option(help="gptq, rtn, awq, awq-gptq, smoothquant, w8a8, nf4, fp4 or llm.int8.")
    ] = "gptq",
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; the method's own, or 4, if not given.")] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Or bits per layer by what they cost, this many stored per weight on average.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Or so that the weight files stay within it: 600MiB.")
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Spread outliers over all channels before (models with RMSNorm).")
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Input features that share a scale; -1 for one per output; 128 if not given (nf4 and fp4: 64)."
        ),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="Of the folder: gptq or compressed-tensors (gptq, rtn, awq, awq-gptq).")
    ] = "auto",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Embedding and output layer in 8 bits too (compressed-tensors).")
    ] = False,
    alpha: Annotated[
        float | None, typer.Option(help="How much smoothquant moves, 0 to 1; chosen layer by layer if not given.")
    ] = None,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales of nf4 and fp4 as well.")] = True,
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
    damping: Annotated[
        float | None,
        typer.Option(help="Share of the mean added to the Hessian's diagonal (gptq); 0.01 when not given."),
    ] = None,
    qat: Annotated[
        int, typer.Option(metavar="STEPS", help="Then train integers and scales so many steps (rtn, gptq).")
    ] = 0,
    rank: Annotated[
        int | None, typer.Option(help="Of that training's change of the weights; 32 when not given.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of that training; 0.003, after gptq of 3 bits and more 0.0003."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step of it; 16 when not given.")] = None,
    learn_labels: Annotated[
        bool, typer.Option("--learn-labels", help="Train it on the rows' answers, not on what the parent says to them.")
    ] = False,
    calibration: Annotated[
        str | None, typer.Option(help="Rows to calibrate on and train with; the model's training rows if not given.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration rows; 128 when not given.")] = None,
    template: options.Template = "auto",
    gate_data: options.GateData = None,
    gate_rows: options.GateRows = 100,
    max_kl: options.MaxKl = None,
    max_kl_p99: options.MaxKlP99 = None,
    min_agreement: options.MinAgreement = None,
    max_perplexity_ratio: options.MaxPerplexityRatio = None,
    max_score_drop: options.MaxScoreDrop = None,
    kv_dtype: Annotated[
        str, typer.Option("--kv-dtype", help="auto, or int8: judge the child with a KV cache of 8 bits.")
    ] = "auto",
    resume: Annotated[
        str, typer.Option(metavar="auto|never", help="Go on with the unfinished quantization that --out holds.")
    ] = "auto",
    track: options.Track = None,
    config: options.Config = None,
    seed: options.Seed = 0,
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
    """Quantize MODEL's linears; exit 4 if the child is worse than allowed."""
    from burnish.cli.show_stages import show_quantize
    from burnish.compress.config import MixedPrecision, QuantizeConfig, default_bits, default_group_size
    from burnish.engine.memory_budget import parse_bytes
    from burnish.pipeline.gates import GateOptions
    from burnish.pipeline.opening import Source
    from burnish.pipeline.qat import QatConfig
    from burnish.pipeline.quantize import quantize as run
    from burnish.pipeline.tracked import tracked_to

    mixed = None
    if target_bits is not None or max_size is not None:
        if bits is not None:
            raise ConfigError("--bits and a budget are both given", remedy="Leave one of them out.")
        max_bytes = None if max_size is None else parse_bytes(max_size, name="--max-size")
        mixed = MixedPrecision(target_bits=target_bits, max_bytes=max_bytes)
    settings = QuantizeConfig(
        method=method,
        bits=default_bits(method) if bits is None else bits,
        group_size=default_group_size(method) if group_size is None else group_size,
        symmetric=symmetric,
        activation_order=act_order,
        match_parent=match_parent,
        refine=refine,
        true_sequential=true_sequential,
        damping=0.01 if damping is None else damping,
        rotate=rotate,
        format=format,
        embeddings=embeddings,
        alpha=alpha,
        double_quant=double_quant,
    )
    if damping is not None and not settings.corrects:
        raise ConfigError(f"{method} has no damping", remedy="Leave it out, or use gptq.")
    learning: dict[str, Any] = {"rank": rank, "learning_rate": learning_rate, "batch_size": batch_size}
    learning = {name: value for name, value in learning.items() if value is not None}
    if (learning or learn_labels) and not qat:
        given = [*learning, *(["learn_labels"] if learn_labels else [])]
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{names} without --qat", remedy="Say how many steps: --qat 200.")
    training = QatConfig(steps=qat, distill=not learn_labels, seed=seed, **learning) if qat else None
    if samples is not None and not (settings.needs_calibration or mixed or training):
        raise ConfigError(
            f"{method} takes no calibration rows", got=f"--samples {samples}", remedy="Use --method gptq."
        )
    source = Source(
        device=device, dtype=dtype, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle
    )
    told = {"model": model, "config": settings, "mixed": mixed, "qat": training, "samples": samples}
    with (
        watching(quiet=quiet) as progress,
        tracked_to(track, "quantize", told, folder=out, on=out, say=progress.say, warn=progress.warn) as stage,
    ):
        record = run(
            model,
            out=out,
            config=settings,
            mixed=mixed,
            qat=training,
            calibration=calibration,
            num_samples=128 if samples is None else samples,
            template=template,
            data=gate_data,
            gate_options=GateOptions(
                rows=gate_rows,
                max_kl=max_kl,
                max_kl_p99=max_kl_p99,
                min_agreement=min_agreement,
                max_perplexity_ratio=max_perplexity_ratio,
                max_score_drop=max_score_drop,
            ),
            kv_dtype=kv_dtype,
            source=source,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            notify=progress.say,
        )
        stage.made(out)
    print_json(record) if json else show_quantize(stdout(), record)
