"""What `data inspect` prints. Torch-free."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from burnish.cli.output import print_table
from burnish.data.inspect import Inspection, RowView

_MARKS = {"ok": ("ok", "green"), "remark": ("note", "yellow"), "problem": ("bad", "red")}


def show_inspection(console: Console, inspection: Inspection) -> None:
    """Rows with their learned part underlined, then figures and facts."""
    console.print(f"{inspection.source}: layout {inspection.layout}, template {inspection.template}", style="bold")
    console.print("the model learns the underlined part and reads the rest", style="dim")
    for view in inspection.rows:
        console.print(_row_panel(view))
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, value in inspection.stats.items():
        shown = (
            "–"
            if value is None
            else f"{value:,.1f}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )
        table.add_row(name.replace("_", " "), shown)
    print_table(console, table)
    for statement, state in inspection.facts:
        mark, style = _MARKS.get(state, (state, ""))
        console.print(Text.assemble((f"{mark:>4}", style), "  ", statement))
    for bad in inspection.bad_rows:
        console.print(Text.assemble((" bad", "red"), "  ", bad))


def _row_panel(view: RowView) -> Panel:
    text = Text()
    for token in view.tokens:
        colour = "magenta" if token.special else "green"
        text.append(token.text, style=f"bold underline {colour}" if token.learned else "dim" if token.special else "")
    cut = ", cut to fit" if view.truncated else ""
    title = (
        f"{view.file.rpartition('/')[2]} row {view.number}: {view.num_tokens} tokens, {view.num_learned} learned{cut}"
    )
    return Panel(text, title=Text(title), title_align="left", border_style="dim", expand=True)
