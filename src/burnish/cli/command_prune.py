"""The command that prunes a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from burnish.cli import options
from burnish.cli.output import print_json, stdout, watching


def register(app: typer.Typer) -> None:
    app.command(short_help="Prune a model and hold the child against its parent.")(prune)


def prune(
    model: options.ModelArgument,
    out: Annotated[str, typer.Option("--out", help="Folder for the pruned model.")],
    method: Annotated[str, typer.Option(help="sparsegpt, wanda, magnitude or structured.")] = "sparsegpt",
    sparsity: Annotated[
        str | None, typer.Option(help="Share of zeros, or 2:4: two of every four kept; 0.5 when not given.")
    ] = None,
    heads: Annotated[float, typer.Option(help="Share of key-value heads to remove (structured).")] = 0.0,
    channels: Annotated[float, typer.Option(help="Share of MLP channels to remove (structured).")] = 0.0,
    layers: Annotated[int, typer.Option(help="Blocks to remove (structured).")] = 0,
    recover: Annotated[
        int, typer.Option(metavar="STEPS", help="Then train adapters so many steps, and merge them.")
    ] = 0,
    rank: Annotated[int | None, typer.Option(help="Of those adapters; 32 when not given.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of the recovery; 0.001 when not given.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step of the recovery; 16 when not given.")] = None,
    damping: Annotated[
        float | None, typer.Option(help="Share of the mean added to the Hessian's diagonal; 0.01 when not given.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Rows to calibrate on and recover with; the model's training rows if not given.")
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
    """Set weights of MODEL to zero, or remove whole parts of it; exit 4 if the child is worse than allowed."""
    from burnish.cli.show_stages import show_prune
    from burnish.compress.prune_config import PruneConfig, parse_sparsity
    from burnish.errors import ConfigError
    from burnish.pipeline.gates import GateOptions
    from burnish.pipeline.opening import Source
    from burnish.pipeline.prune import prune as run
    from burnish.pipeline.recovery import RecoverConfig
    from burnish.pipeline.tracked import tracked_to

    amount: dict[str, Any] = {} if sparsity is None else parse_sparsity(sparsity)
    if damping is not None:
        if method in ("magnitude", "wanda"):
            raise ConfigError(f"{method} has no damping", remedy="Leave it out, or use sparsegpt.")
        amount["damping"] = damping
    settings = PruneConfig(method=method, heads=heads, channels=channels, layers=layers, **amount)
    if settings.is_structured and not (heads or channels or layers):
        raise ConfigError("there is nothing to remove", remedy="Give --heads, --channels or --layers.")
    learning: dict[str, Any] = {"rank": rank, "learning_rate": learning_rate, "batch_size": batch_size}
    learning = {name: value for name, value in learning.items() if value is not None}
    if learning and not recover:
        given = ", ".join("--" + name.replace("_", "-") for name in learning)
        raise ConfigError(f"{given} without --recover", remedy="Say how many steps: --recover 200.")
    recovery = RecoverConfig(steps=recover, seed=seed, **learning) if recover else None
    if samples is not None and not (settings.needs_calibration or recovery):
        raise ConfigError(f"{method} takes no calibration rows", got=f"--samples {samples}", remedy="Use sparsegpt.")
    source = Source(
        device=device,
        dtype=dtype,
        threads=threads,
        revision=revision,
        offline=offline,
        allow_pickle=allow_pickle,
    )
    told = {"model": model, "config": settings, "recover": recovery, "samples": samples}
    with (
        watching(quiet=quiet) as progress,
        tracked_to(track, "prune", told, folder=out, on=out, say=progress.say, warn=progress.warn) as stage,
    ):
        record = run(
            model,
            out=out,
            config=settings,
            recover=recovery,
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
            source=source,
            overwrite=overwrite,
            progress=progress,
        )
        stage.made(out)
    print_json(record) if json else show_prune(stdout(), record)
