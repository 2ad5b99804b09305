"""What a verb found: one JSON object for programs, and the same in tables for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group


SHORT = 26  # characters: columns of at most this are not broken where a longer one can be


@dataclass(frozen=True)
class Section:
    """One table. rows: text as it is shown, as many cells as columns. note: a line below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Sheet:
    """data: plain JSON (no NaN, no infinity). sections: what people see of it."""

    data: dict[str, Any]
    sections: tuple[Section, ...]

    def to_json(self) -> dict[str, Any]:
        return self.data

    def table(self) -> Group:
        return render(self.sections)


def render(sections: Iterable[Section]) -> Group:
    """Sections as something rich prints. Text is shown as it is, never read as markup: names come from bundles."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    for section in sections:
        table = Table(title=Text(section.title), title_justify="left", box=box.SIMPLE_HEAD)
        table.show_edge = table.pad_edge = False
        table.collapse_padding = True
        columns = [(title, *(row[i] for row in section.rows)) for i, title in enumerate(section.columns)]
        long = [max(map(len, column)) > SHORT for column in columns]
        for (title, *cells), wraps in zip(columns, long, strict=True):
            side: Any = "right" if cells and all(map(_is_figure, cells)) else "left"
            table.add_column(Text(title), justify=side, overflow="fold", no_wrap=any(long) and not wraps)
        for row in section.rows:
            table.add_row(*map(Text, row))
        shown += [table, *([Text(section.note)] if section.note else []), Text("")]
    return Group(*shown[:-1])


def _is_figure(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] == "-" and cell[1:2].isdigit())


def size(count: int) -> str:
    """Bytes for people: 2.4 MB, decimal as file managers show them."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


def duration(seconds: float | None) -> str:
    """Seconds for people: 83.1 ms, 2.45 s; "" for None."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def decibels(figure: float | None) -> str:
    """A ratio for people: 112.4; "" for None."""
    return "" if figure is None else f"{figure:.1f}"
