"""Commands that look before anything runs: plan, doctor, data inspect. They load no torch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from burnish.cli import options
from burnish.cli.output import print_json, stdout
from burnish.errors import ConfigError

data_app = typer.Typer(help="Data sets.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    app.command(short_help="Predict memory and time per stage, before anything is loaded.")(plan)
    app.command(short_help="Hardware, versions, extras and engines: what works here.")(doctor)
    data_app.command(name="inspect")(inspect)
    app.add_typer(data_app, name="data")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder, hub id, burnish-sql-base, or a published shape such as mistral-7b.",
            show_default=False,
        ),
    ],
    device: Annotated[
        str, typer.Option(help="cpu (this machine), cuda (its card), or one of the catalogue: t4, p100, a100-40g, ...")
    ] = "cpu",
    dtype: options.Dtype = "auto",
    weights: Annotated[str | None, typer.Option(help="Format to run in: int8, int4, w8a8, nf4 or a dtype.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    input_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    micro_batch_size: Annotated[int, typer.Option(help="Training rows per forward pass.")] = 8,
    sequence_tokens: Annotated[int, typer.Option(help="Tokens of the longest training row.")] = 512,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute blocks in the backward pass.")] = False,
    precision: Annotated[str, typer.Option(help="Of training: auto, float32 or bfloat16.")] = "auto",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    bits: Annotated[int, typer.Option(help="Bits of the quantization stage.")] = 4,
    cards: Annotated[
        int, typer.Option(help="Devices that share the model: which split fits, and what each takes.")
    ] = 1,
    require: Annotated[
        str | None, typer.Option(help="Stages joined by commas that have to fit; exit 3 if one does not.")
    ] = None,
    config: options.Config = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict MODEL's memory and time per stage on a device, before anything is loaded."""
    from burnish.cli.show_plan import show_plan
    from burnish.plan.options import PlanOptions
    from burnish.plan.planning import plan as run
    from burnish.plan.predict import require_fit
    from burnish.plan.sharding import advised

    work = PlanOptions(
        dtype=dtype,
        weight_format=weights,
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        micro_batch_size=micro_batch_size,
        sequence_tokens=sequence_tokens,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
        rank=rank,
        bits=bits,
    )
    result = run(model, device=device, options=work, revision=revision, offline=offline, cards=cards)
    wanted = [name.strip() for name in (require or "").split(",") if name.strip()]
    for name in wanted:
        if name not in (stage.name for stage in result.stages):
            raise ConfigError(f"there is no stage {name}", expected=", ".join(stage.name for stage in result.stages))
    print_json(result.to_dict()) if json else show_plan(stdout(), result)
    for name in wanted:
        if name == "inference" and advised(result.splits) is not None:
            continue  # the cards hold it together
        require_fit(result.stage(name), result.device)


def doctor(json: options.Json = False) -> int | None:
    """Look at hardware, versions, extras and engines, and say what works here."""
    from burnish.cli.show_plan import show_checks
    from burnish.plan.doctor import facts, healthy

    checks = facts()
    print_json([check.to_dict() for check in checks]) if json else show_checks(stdout(), checks)
    return None if healthy(checks) else 1


def inspect(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="File, hub id, or text-to-sql:SPLIT[:N].", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template.")] = "burnish-sql-base",
    template: options.Template = "auto",
    columns: options.Columns = None,
    max_length: Annotated[int, typer.Option(help="Longest example in tokens.")] = 512,
    too_long: Annotated[str, typer.Option(help="drop or truncate longer rows.")] = "drop",
    learn: Annotated[str, typer.Option(help="Of conversations, all answers or the last one.")] = "all",
    limit: Annotated[int | None, typer.Option(help="Use this many rows at most.")] = None,
    check_sql: Annotated[bool, typer.Option(help="Leave out rows whose SQL does not run on their schema.")] = False,
    rows: Annotated[int, typer.Option(help="Rows to show in full.")] = 3,
    config: options.Config = None,
    seed: options.Seed = 0,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show rows as the model will see them: rendered, with the learned part marked, and what was left out."""
    from burnish.cli.show_data import show_inspection
    from burnish.data.examples import make_examples
    from burnish.data.inspect import inspect_rows
    from burnish.data.rows import read_rows
    from burnish.data.templates import pick_template
    from burnish.data.tokenizer import Tokenizer
    from burnish.models.resolve import resolve_model

    if rows < 0:
        raise ConfigError("--rows is out of range", got=rows, expected="0 or more")
    mode: Any = too_long
    turns: Any = learn
    tokenizer = Tokenizer.load(resolve_model(model, offline=offline))
    row_set = read_rows(
        data,
        columns=options.parse_columns(columns),
        limit=limit,
        check_sql=check_sql,
        seed=seed,
        offline=offline,
        texts=True,
    )
    chosen = pick_template(template, tokenizer, row_set)
    examples = make_examples(
        row_set.rows,
        tokenizer,
        chosen,
        max_length=max_length,
        too_long=mode,
        learn=turns,
    )
    inspection = inspect_rows(row_set, examples, tokenizer, num_rows=rows)
    print_json(inspection.to_dict()) if json else show_inspection(stdout(), inspection)
    examples.preflight.require()
