"""Verbs beyond the main path: calibrate, prune, policy, report, serve, simulate. `edgesd.cli` registers them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgesd.console import Json, pair, progress, show

policy_app = typer.Typer(help="Tables that decide by the device's state how much a picture gets.", no_args_is_help=True)


@policy_app.command("list")
def policy_list(as_json: Json = False) -> None:
    """List the policies that ship."""
    from edgesd import governing

    show(*pair(governing.policies(), as_json))


@policy_app.command("show")
def policyshow(
    name: Annotated[str, typer.Argument(help="A name that `edgesd policy list` shows, or a .json file.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG chart to write.")] = None,
    as_json: Json = False,
) -> None:
    """Check a policy and show it row by row."""
    from edgesd import governing

    show(*pair(governing.show(name, output), as_json))


def simulate(
    bundle: Path,
    trace: Annotated[str, typer.Option("--trace", help="cool, hot, sun, empty, charging or a .json file.")] = "hot",
    pictures: Annotated[int, typer.Option("--pictures", help="That fixed 20 steps draw; all get their time.")] = 20,
    policy: Annotated[list[str] | None, typer.Option("--policy", help="Policies to play; all if left out.")] = None,
    width: Annotated[
        list[float] | None, typer.Option("--width", help="Pretend that the bundle has this width too; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG plot to write.")] = None,
    as_json: Json = False,
) -> None:
    """Play policies against fixed settings on simulated phones: pictures, latency, heat, battery, alignment."""
    from edgesd import simulate as room

    sheet = room.run(
        bundle,
        trace,
        pictures=pictures,
        policies=tuple(policy if policy is not None else ()),
        widths=tuple(width if width is not None else ()),
        plot=output,
    )
    show(*pair(sheet, as_json))


def report(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles; the first one is the measure of the others.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML page to write.")] = Path("report.html"),
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What each draws; repeatable.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, max=1000)] = None,
    as_json: Json = False,
) -> None:
    """One page about bundles, whole in itself: pictures side by side, sizes, dB, coverage, policies, provenance."""
    from edgesd import report as room

    with progress() as tick:
        sheet = room.report(
            bundles, output, prompts=tuple(prompt) if prompt else (), seed=seed, steps=steps, progress=tick
        )
    show(*pair(sheet, as_json))


def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the set; an unfinished one is taken up.")],
    model: Annotated[
        str | None, typer.Argument(help="Diffusers folder or hub id; the embedded model if left out.")
    ] = None,
    calls: Annotated[
        int | None, typer.Option("--calls", min=2, help="UNet rows to record; 480, of a big model 64.")
    ] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="Sets joined by +, or a text file.")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler")] = None,
    steps: Annotated[
        list[int] | None, typer.Option("--steps", help="Repeatable: the counts a policy may choose.")
    ] = None,
    guidance: Annotated[float | None, typer.Option("--guidance")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Record real calls of every component along real sampling runs."""
    from edgesd import shrinking

    made = shrinking.calibrate_model(
        model, output, calls=calls, prompts=prompts, sampler=sampler, steps=tuple(steps) if steps else None,
        guidance=guidance, seed=seed,
    )  # fmt: skip
    show(*pair(made, as_json))


def prune(
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder to write.")],
    model: Annotated[
        str | None, typer.Argument(help="Diffusers folder or hub id; the embedded model if left out.")
    ] = None,
    ratio: Annotated[float, typer.Option("--ratio", help="Share of the component's MACs to take off.")] = 0.25,
    calibration: Annotated[Path | None, typer.Option("--calibration", help="A set; recorded anew if left out.")] = None,
    calls: Annotated[
        int | None,
        typer.Option("--calls", min=2, help="UNet rows, two a guided call; 480, of a big model 64, above 256 px 16."),
    ] = None,
    component: Annotated[
        str, typer.Option("--component", help="unet, text_encoder, vae_decoder, vae_encoder.")
    ] = "unet",
    importance: Annotated[str, typer.Option("--importance", help="obs, l1, l2, wanda, taylor, … or random.")] = "obs",
    restore: Annotated[str, typer.Option("--restore", help="ls, bias or none.")] = "ls",
    allocation: Annotated[str, typer.Option("--allocation", help="global or uniform.")] = "global",
    budget: Annotated[
        str, typer.Option("--budget", help="What the ratio counts: macs, params, bytes or latency.")
    ] = "macs",
    target: Annotated[
        str | None, typer.Option("--target", help="Of --budget latency: openvino, onnx-web or tflite, timed here.")
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="Groups to leave whole; repeatable glob.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take channels and heads off a checkpoint and win back what least squares can."""
    from edgesd import shrinking

    made = shrinking.prune_model(
        model, output, ratio=ratio, calibration=calibration, calls=calls, component=component, importance=importance,
        restoration=restore, allocation=allocation, budget=budget, target=target,
        protect=tuple(protect) if protect else (),
    )  # fmt: skip
    show(*pair(made, as_json))


def serve(
    bundle: Path,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")] = 8080,
    host: Annotated[str, typer.Option("--host", help="Other machines see the page only over https.")] = "127.0.0.1",
    page: Annotated[Path | None, typer.Option("--page", help="Folder of the built page; found if left out.")] = None,
) -> None:
    """Open an onnx-web bundle in a browser: page and bundle on localhost, until Ctrl-C."""
    from edgesd import serve as room

    room.serve(bundle, host, port, page)


def register(app: typer.Typer) -> None:
    """Adds these verbs to the command line."""
    for verb in (calibrate, prune, report, simulate, serve):
        app.command()(verb)
    app.add_typer(policy_app, name="policy")
