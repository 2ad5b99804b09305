"""Verbs that train: the embedded model from its world, and pruned checkpoints back to strength."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgesd.console import Json, pair, progress, show
from edgesd.sheet import Section, Sheet

shapes_app = typer.Typer(help="The embedded model and its world.", no_args_is_help=True)
StopAfter = Annotated[
    float | None, typer.Option("--stop-after", help="Minutes of this call; the same command goes on where it ended.")
]
Precision = Annotated[str, typer.Option("--mixed-precision", help="bf16 or fp32.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]


def _widths(text: str) -> tuple[float, ...]:
    from edgesd.compress.widths import check_widths
    from edgesd.recipe import parse_widths

    return check_widths(parse_widths(text))


@shapes_app.command("train")
def shapes_train(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run; an unfinished one goes on.")],
    steps: Annotated[
        int, typer.Option("--steps", min=0, help="Of UNet and text encoder; 0 keeps the shipped.")
    ] = 30_000,
    vae_steps: Annotated[int, typer.Option("--vae-steps", min=0, help="Of the tiny VAE; 0 keeps the shipped.")] = 4000,
    text_steps: Annotated[
        int, typer.Option("--text-steps", min=0, help="Of a lesson for the text encoder: what stands where.")
    ] = 900,
    student_steps: Annotated[int, typer.Option("--student-steps", min=0, help="Of shapes-lcm; 0 makes none.")] = 3000,
    pictures: Annotated[int, typer.Option("--pictures", min=2, help="Of the world, encoded once.")] = 60_000,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 64,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of the UNet.")] = 1e-3,
    vae_lr: Annotated[float, typer.Option("--vae-lr", help="Peak learning rate of the VAE.")] = 2e-3,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Of the VAE: the latents stay what the UNet knows.")
    ] = False,
    widths: Annotated[str, typer.Option("--widths", help="Nested widths of the UNet.")] = "1,0.75,0.5",
    pairs: Annotated[float, typer.Option("--pairs", help="How often two objects are drawn for one.")] = 3.0,
    grounding: Annotated[
        float, typer.Option("--grounding", min=0, help="Weight of a lesson for attention: where each object stands.")
    ] = 0.1,
    start: Annotated[
        str | None,
        typer.Option("--start", help="Checkpoint to go on from, shapes for the shipped; from nothing if left out."),
    ] = None,
    precision: Precision = "bf16",
    measures: Annotated[int, typer.Option("--measures", min=0, help="Times that a stage's quality is taken.")] = 8,
    seed: Seed = 0,
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Train the embedded model from nothing: tiny VAE, text encoder and UNet, then a student of few steps."""
    from edgesd.shapes.train import Config, train_shapes

    config = Config(
        vae_steps=vae_steps, text_steps=text_steps, steps=steps, student_steps=student_steps, pictures=pictures,
        batch=batch, lr=lr, vae_lr=vae_lr, decoder_only=decoder_only, widths=_widths(widths), pairs=pairs,
        grounding=grounding, start=start, precision=precision, measures=measures, seed=seed,
        stop_after=stop_after,
    )  # fmt: skip
    with progress() as tick:
        reached = train_shapes(output, config, tick)
    rows = tuple(
        (name, f"{stage['step']}/{stage['of']}", f"{stage['seconds'] / 60:.1f} min", _figures(stage["figures"]))
        for name, stage in reached["stages"].items()
    )
    made = next((output / name for name in ("shapes", "shapes-lcm") if (output / name).is_dir()), output)
    note = (
        f"Next: edgesd evaluate -m {made}; edgesd package {made} --target all"
        if reached["done"]
        else "Not finished: run the same command again to go on"
    )
    sheet = Sheet(
        reached | {"folder": str(output)}, (Section("Training", ("stage", "steps", "time", "reached"), rows, note),)
    )
    show(*pair(sheet, as_json))


def finetune(
    model: Annotated[str, typer.Argument(help="The pruned checkpoint.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The checkpoint it was pruned from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Folder of captioned pictures, or shapes; the teacher's own if left out."),
    ] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Time to train; 10 if neither is given.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Or an exact count of steps.")] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=64, help="Drawn by the teacher, or read at most.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Latents a step, each with its prompt and without.")] = 8,
    lr: Annotated[float, typer.Option("--lr")] = 2e-4,
    widths: Annotated[str, typer.Option("--widths", help="Train nested widths too.")] = "1",
    int8: Annotated[bool, typer.Option("--int8", help="Learn on int8 grids, for package --precision int8.")] = False,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Of the pictures to come.")] = None,
    precision: Precision = "bf16",
    seed: Seed = 0,
    stop_after: StopAfter = None,
    as_json: Json = False,
) -> None:
    """Win back what pruning took: the pruned UNet learns from the one it was cut from."""
    from edgesd.training.finetune import finetune as run
    from edgesd.training.loop import Schedule

    minutes = 10.0 if minutes is None and steps is None else minutes
    schedule = Schedule(
        lr, steps, minutes, warmup=20, precision=precision, seed=seed, measures=8, stop_after=stop_after
    )
    with progress() as tick:
        curve = run(
            model, teacher, output, schedule, data=data, pictures=pictures, batch=batch, widths=_widths(widths),
            int8=int8, guidance=guidance, progress=tick,
        )  # fmt: skip
    told = {"folder": str(output), "done": curve.done, "steps": curve.step, "of": curve.total,
            "seconds": round(curve.seconds, 1), "figures": curve.figures}  # fmt: skip
    note = (
        f"Next: edgesd evaluate -m {output} --against {teacher}; edgesd package {output} --target all"
        if curve.done
        else "Not finished: run the same command again to go on"
    )
    rows = tuple((str(step), _figures([(step, figures)])) for step, figures in curve.figures)
    show(*pair(Sheet(told, (Section("Recovery", ("step", "against the teacher"), rows, note),)), as_json))


def _figures(measured: Any) -> str:
    return ", ".join(f"{name} {value:.3f}" for _, figures in measured for name, value in figures.items())


def register(app: typer.Typer) -> None:
    """Adds these verbs to the command line."""
    app.command()(finetune)
    app.add_typer(shapes_app, name="shapes")
