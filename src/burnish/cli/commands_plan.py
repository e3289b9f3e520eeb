"""Commands that look before anything runs: plan, doctor, data inspect. They load no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from burnish.cli import options
from burnish.cli.output import print_json, stdout

data_app = typer.Typer(help="Data sets.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    data_app.command(name="inspect")(inspect)
    app.add_typer(data_app, name="data")


def inspect(
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, hub id, or text-to-sql:SPLIT[:N].", show_default=False)],
    model: Annotated[str, typer.Option(help="Whose tokenizer and chat template.")] = "burnish-sql-base",
    template: options.Template = "auto",
    columns: options.Columns = None,
    max_length: Annotated[int, typer.Option(help="Longest example in tokens.")] = 512,
    too_long: Annotated[str, typer.Option(help="drop or truncate longer rows.")] = "drop",
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
    from burnish.models.loading import resolve_model

    tokenizer = Tokenizer.load(resolve_model(model, offline=offline))
    row_set = read_rows(data, columns=options.parse_columns(columns), limit=limit, check_sql=check_sql, seed=seed, offline=offline)
    chosen = pick_template(template, tokenizer, row_set)
    examples = make_examples(
        row_set.rows, tokenizer, chosen, max_length=max_length, too_long="truncate" if too_long == "truncate" else "drop"
    )
    inspection = inspect_rows(row_set, examples, tokenizer, num_rows=rows)
    print_json(inspection.to_dict()) if json else show_inspection(stdout(), inspection)
