"""What every verb shares: flags, a bar while it works, and how a result reaches stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Model = Annotated[
    str | None,
    typer.Option("-m", "--model", help="Bundle, diffusers folder or hub id; the embedded model if left out."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads; all if left out.")]
Device = Annotated[str | None, typer.Option("--device", help="OpenVINO device: CPU, GPU or NPU.")]
Rng = Annotated[str, typer.Option("--rng", help="philox (portable) or torch (diffusers' noise).")]


def pair(result: Any, as_json: bool) -> tuple[dict[str, Any], bool, Any]:
    return result.to_json(), as_json, None if as_json else result.table()


def show(result: dict[str, Any], as_json: bool, rendered: Any) -> None:
    """One JSON object, or a rich table or text, on stdout."""
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        Console(soft_wrap=isinstance(rendered, str), highlight=False).print(rendered)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr: one line a stage."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield tick
