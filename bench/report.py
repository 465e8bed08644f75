"""The tables on the screen, and where results go."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"

MIN_WIDTH = 120  # where the output is no terminal, rich would take 80

console = Console(highlight=False, markup=False)
console.width = max(console.width, MIN_WIDTH)


def make_table(*columns: str) -> Table:
    """An empty table, the first column of which holds names."""
    table = Table()
    for index, column in enumerate(columns):
        first = index == 0
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    return table


def print_table(title: str, table: Table, note: str = "") -> None:
    """A table between its title and its note."""
    console.print()
    console.print(title, style="bold")
    console.print(table)
    if note:
        console.print(note, style="dim")


def number(value: float | None, digits: int) -> str:
    """With so many digits, or n/a."""
    return "n/a" if value is None else f"{value:.{digits}f}"
