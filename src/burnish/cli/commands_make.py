"""Commands that make a model from a model: tune, merge, synth."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli import options
from burnish.cli.output import note, print_json, stderr, stdout, watching
from burnish.cli.setting_names import check_tune_options, made_together, named_as_given
from burnish.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command()(tune)
    app.command(short_help="Merge an adapter into its base and prove that nothing was lost.")(merge)
    app.command(short_help="Write random weights in a published shape, for measuring.")(synth)


def tune(
    context: typer.Context,
    model: options.ModelArgument,
    data: Annotated[str, typer.Option("--data", help="File, hub id, or text-to-sql:train[:N].")],
    out: Annotated[str, typer.Option("--out", help="Folder for the adapter or the tuned model.")],
    method: Annotated[str, typer.Option("--method", help="lora, qlora-4bit, qlora-8bit or full.")] = "lora",
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Rows for the evaluation loss.")] = None,
    eval_split: Annotated[
        float | None, typer.Option(help="Or keep this share (0.05) or number of the rows for it.")
    ] = None,
    template: options.Template = "auto",
    columns: options.Columns = None,
    max_length: Annotated[int, typer.Option(help="Longest example in tokens.")] = 512,
    too_long: Annotated[str, typer.Option(help="drop or truncate longer rows.")] = "drop",
    learn: Annotated[str, typer.Option(help="Of conversations, all answers or the last one.")] = "all",
    streaming: Annotated[bool, typer.Option(help="Keep tokenized rows on disk: for data larger than memory.")] = False,
    limit: Annotated[int | None, typer.Option(help="Use this many rows at most.")] = None,
    check_sql: Annotated[bool, typer.Option(help="Leave out rows whose SQL does not run on their schema.")] = False,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; products are scaled by alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.0,
    dora: Annotated[bool, typer.Option("--dora", help="Train magnitudes beside directions (DoRA).")] = False,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) instead.")] = False,
    target_modules: Annotated[str, typer.Option(help="Roles joined by commas, or all-linear.")] = "all-linear",
    freeze: Annotated[
        str | None, typer.Option(help="Parameters to leave as they are: globs joined by commas (full).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; instead of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows; 1 when neither is given.")] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Rows per forward pass.")] = 8,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per forward pass at most; longer rows go alone.")
    ] = None,
    packing: Annotated[bool, typer.Option(help="Lay rows end to end instead of padding them.")] = True,
    gradient_accumulation: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    pack_to: Annotated[int | None, typer.Option(help="Fill each step to about this many tokens instead.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help="linear, cosine, wsd, inverse-sqrt or constant.")] = "cosine",
    min_rate: Annotated[float, typer.Option(help="Share of the peak rate that the schedule ends at.")] = 0.0,
    warmup: Annotated[float, typer.Option(help="Share of steps (below 1) or steps with a rising rate.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay, on matrices.")] = 0.0,
    optimizer: Annotated[
        str, typer.Option(help="adamw, adafactor, lion; on CUDA also adamw-8bit and paged-adamw-8bit.")
    ] = "adamw",
    offload_activations: Annotated[
        bool, typer.Option("--offload-activations", help="Keep activations in host memory (CUDA).")
    ] = False,
    offload_optimizer: Annotated[
        bool, typer.Option("--offload-optimizer", help="Keep the optimizer's state in host memory (CUDA).")
    ] = False,
    neftune: Annotated[float, typer.Option(metavar="ALPHA", help="Noise on embeddings; 5 to 15 is usual.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are scaled down to this norm.")] = 1.0,
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute blocks in the backward pass.")] = False,
    checkpoint_every: Annotated[int, typer.Option(metavar="N", help="With it, every Nth block only.")] = 1,
    eval_every: Annotated[int, typer.Option(help="Evaluate every so many steps; 0 only at the end.")] = 0,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after this time.")] = None,
    early_stopping: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N evaluations without a lower loss.")
    ] = None,
    min_delta: Annotated[float, typer.Option(help="Fall of the evaluation loss that counts for it.")] = 0.0,
    keep_best: Annotated[bool, typer.Option(help="Write the weights with the lowest evaluation loss.")] = False,
    save_every: Annotated[int, typer.Option(metavar="N", help="Write a checkpoint every N steps.")] = 0,
    keep_last: Annotated[int, typer.Option(metavar="N", help="Checkpoints that are kept while it runs.")] = 2,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Go on with the unfinished run in --out, or at PATH.")
    ] = "auto",
    keep_checkpoints: Annotated[bool, typer.Option(help="Leave checkpoints when the run is done.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write OUT/trace.json, a Chrome trace of a few steps.")
    ] = False,
    track: options.Track = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Choose micro-batches, checkpointing and precision to stay within it: 2GiB."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show memory, settings and a trial step; train and write nothing.")
    ] = False,
    processes: Annotated[int, typer.Option(metavar="N", help="Train in N processes of this machine.")] = 1,
    sharding: Annotated[
        str,
        typer.Option(help="What processes divide: none, zero1 (optimizer), zero2 (gradients too), zero3 (weights)."),
    ] = "none",
    config: options.Config = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="To hold the base in; auto: bfloat16 where a frozen base computes in it, else float32.")
    ] = "auto",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int | None:
    """Tune MODEL on rows: a PEFT-format LoRA adapter, or all weights."""
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log; read when torch is imported
    from torch import get_num_threads

    from burnish.cli.show_tune import show_operators, show_rehearsal, show_tune
    from burnish.measure.busy import busy_warning
    from burnish.pipeline.examples import DataConfig
    from burnish.pipeline.launching import is_rank, launch
    from burnish.pipeline.opening import Source
    from burnish.pipeline.resuming import ResumeConfig
    from burnish.pipeline.tune import tune as run
    from burnish.pipeline.tune_rehearsal import rehearse
    from burnish.track.making import make_tracker
    from burnish.train.config import TrainConfig
    from burnish.train.distributed import joined, local_device, local_threads
    from burnish.train.lora import LoraConfig

    roles: Any = (
        target_modules
        if target_modules == "all-linear"
        else tuple(part.strip() for part in target_modules.split(",") if part.strip())
    )
    settings: dict[str, Any] = {"method": method, "schedule": schedule, "precision": precision}
    settings |= {"optimizer": optimizer, "sharding": sharding}
    train_config, lora, rows, _ = made_together(
        context,
        lambda: TrainConfig(
            steps=steps,
            epochs=epochs,
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            packing=packing,
            gradient_accumulation=gradient_accumulation,
            tokens_per_step=pack_to,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            min_rate=min_rate,
            offload_activations=offload_activations,
            offload_optimizer=offload_optimizer,
            neftune=neftune,
            max_grad_norm=max_grad_norm,
            gradient_checkpointing=gradient_checkpointing,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            max_seconds=max_seconds,
            early_stopping_patience=early_stopping,
            early_stopping_min_delta=min_delta,
            keep_best=keep_best,
            save_every=save_every,
            keep_last=keep_last,
            seed=seed,
            freeze=tuple(part.strip() for part in (freeze or "").split(",") if part.strip()),
            **settings,
        ),
        lambda: LoraConfig(
            rank=rank, alpha=alpha, dropout=dropout, target_modules=roles, use_dora=dora, rank_stabilized=rslora
        ),
        lambda: DataConfig(
            source=data,
            template=template,
            columns=options.parse_columns(columns),
            max_length=max_length,
            too_long=too_long,
            learn=learn,
            limit=limit,
            check_sql=check_sql,
            seed=seed,
            offline=offline,
        ),
        lambda: check_tune_options(context, context.params),
    )
    if dry_run and (processes != 1 or is_rank()):
        raise ConfigError("a dry run is of one process", remedy="Leave --processes out.")
    if processes != 1 and not is_rank():
        command = [sys.executable, "-m", "burnish", *context.find_root().obj]
        return launch(command, processes=processes, threads=threads)
    with (
        named_as_given(context),
        joined(sharding=sharding, device=local_device(device), processes=processes) as ranks,
        watching(quiet=quiet or not ranks.is_main) as progress,
    ):
        source = Source(
            device=local_device(device),
            threads=threads if threads is not None or ranks.alone else local_threads(),
            revision=revision,
            offline=offline,
            allow_pickle=allow_pickle,
            dtype=dtype,
        )
        if ranks.alone and (busy := busy_warning(get_num_threads(), device=device)):
            progress.say(busy)
        if dry_run:
            plan = rehearse(
                model,
                data=rows,
                lora=lora,
                config=train_config,
                eval_data=eval_data,
                eval_split=eval_split,
                streaming=streaming,
                memory=memory,
                source=source,
                progress=progress,
            )
            print_json(plan) if json else show_rehearsal(stdout(), plan)
            return None
        record = run(
            model,
            data=rows,
            out=out,
            lora=lora,
            config=train_config,
            eval_data=eval_data,
            eval_split=eval_split,
            streaming=streaming,
            memory=memory,
            source=source,
            overwrite=overwrite,
            resume=ResumeConfig(resume=resume, keep_checkpoints=keep_checkpoints),
            tracker=make_tracker(track, beside=out, warn=progress.warn, say=progress.say) if ranks.is_main else None,
            profile=profile and ranks.is_main,
            progress=progress,
            notify=progress.say,
            ranks=ranks,
        )
    for line in record.bad_rows:
        note(f"left out: {line}", quiet=quiet)
    if record.num_bad_rows > len(record.bad_rows):
        note(f"left out: {record.num_bad_rows - len(record.bad_rows)} more rows", quiet=quiet)
    if record.operators and not quiet:
        show_operators(stderr(), record)
    print_json(record) if json else show_tune(stdout(), record)
    if record.interrupted:
        onwards = "the same command goes on from there" if record.checkpoint else "there is no checkpoint to go on from"
        note(f"interrupted: {out} holds what {len(record.steps)} steps have taught; {onwards}", quiet=quiet)
    return 130 if record.interrupted else None


def merge(
    adapter: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Folders of LoRA adapters, ours or PEFT's.", show_default=False),
    ],
    out: Annotated[str, typer.Option("--out", help="Folder for the merged model.")],
    weights: Annotated[
        str | None, typer.Option(help="A factor for each adapter, joined by commas; needed for several.")
    ] = None,
    onto: Annotated[
        str, typer.Option(help="The base's weights: original, dequantized, or auto (the better one).")
    ] = "auto",
    base: Annotated[str | None, typer.Option(help="Base model, instead of the one that the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the written weights; auto keeps the base's.")] = "auto",
    gate_data: options.GateData = None,
    gate_rows: options.GateRows = 100,
    max_kl: options.MaxKl = None,
    max_kl_p99: options.MaxKlP99 = None,
    min_agreement: options.MinAgreement = None,
    max_perplexity_ratio: options.MaxPerplexityRatio = None,
    max_score_drop: options.MaxScoreDrop = None,
    track: options.Track = None,
    config: options.Config = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge adapters into their base and prove that the result is the same model; exit 4 if it is not."""
    from burnish.cli.show_stages import show_merge
    from burnish.pipeline.gates import GateOptions
    from burnish.pipeline.merge import merge as run
    from burnish.pipeline.opening import Source
    from burnish.pipeline.tracked import tracked_to

    source = Source(device=device, threads=threads, revision=revision, offline=offline, allow_pickle=allow_pickle)
    told = {"adapter": list(adapter), "dtype": dtype}
    with (
        watching(quiet=quiet) as progress,
        tracked_to(track, "merge", told, folder=out, on=out, say=progress.say, warn=progress.warn) as stage,
    ):
        record = run(
            adapter,
            out=out,
            weights=None if weights is None else options.parse_numbers("weights", weights),
            base=base,
            onto=onto,
            dtype=dtype,
            source=source,
            data=gate_data,
            gate_options=GateOptions(
                rows=gate_rows,
                max_kl=max_kl,
                max_kl_p99=max_kl_p99,
                min_agreement=min_agreement,
                max_perplexity_ratio=max_perplexity_ratio,
                max_score_drop=max_score_drop,
            ),
            overwrite=overwrite,
            progress=progress,
        )
        stage.made(out)
    print_json(record) if json else show_merge(stdout(), record)


def synth(
    shape: Annotated[
        str, typer.Argument(metavar="SHAPE", help="Published shape, such as tinyllama-1.1b.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model.")],
    dtype: Annotated[str, typer.Option(help="Of the written weights.")] = "bfloat16",
    config: options.Config = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write random weights in a published shape, for measuring speed and memory."""
    from burnish.measure.formatting import format_bytes, format_count
    from burnish.models.loading import load_config
    from burnish.models.synth import write_random_checkpoint
    from burnish.pipeline.disk import folder_bytes
    from burnish.pipeline.opening import check_output

    check_output(out, overwrite=overwrite)
    write_random_checkpoint(shape, out, seed=seed, dtype=dtype)
    parameters, size = load_config(out).num_parameters(), folder_bytes(out)
    if json:
        print_json(
            {
                "shape": shape,
                "out": str(out),
                "parameters": parameters,
                "disk_bytes": size,
                "dtype": dtype,
                "seed": seed,
            }
        )
    else:
        stdout().print(f"{out}: {shape}, {format_count(parameters)} parameters, {format_bytes(size)}, random weights")
