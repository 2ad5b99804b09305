"""The command line: each verb checks its words, calls one function of one room, and prints what came of it.

Results go to stdout (one JSON object with --json), progress and errors to stderr. Exit codes: 0 ok, 2 bad request,
3 a quality gate not met, 4 broken or hostile data, 5 the environment lacks something, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgesd import verbs, verbs_training
from edgesd.console import Device, Json, Model, Rng, Threads, pair, progress, show
from edgesd.errors import INTERRUPTED, EdgesdError, RequestError

app = typer.Typer(
    name="edgesd",
    help="Stable-Diffusion-family models onto phones, browsers and laptops.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    model: Model = None,
    negative: Annotated[str, typer.Option("--negative", help="What to keep out.")] = "",
    seed: Annotated[int | None, typer.Option("--seed", help="0 to 2^53-1; picked and printed if left out.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="1 to 1000, as far as the bundle has tables.")] = None,
    sampler: Annotated[str | None, typer.Option("--sampler", help="A name that `edgesd samplers` lists.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="1 turns guidance off.")] = None,
    guidance_until: Annotated[float, typer.Option("--guidance-until", help="Share of the run with guidance.")] = 1.0,
    guidance_schedule: Annotated[
        str, typer.Option("--guidance-schedule", help="constant, linear, cosine, interval, three_stage.")
    ] = "constant",
    guidance_rescale: Annotated[float, typer.Option("--guidance-rescale", help="0 to 1.")] = 0.0,
    early_stop: Annotated[
        float | None, typer.Option("--early-stop", help="Stop when x0 changes less than this (0.01 is cautious).")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="White is redrawn, black is kept.")] = None,
    strength: Annotated[float, typer.Option("--strength", help="0 keeps the picture, 1 starts from noise.")] = 0.8,
    count: Annotated[int, typer.Option("--count", help="Pictures to draw; the prompt is encoded once.")] = 1,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="PNG to write; -1, -2 … are added for several.")
    ] = Path("out.png"),
    rng: Rng = "philox",
    refiner: Annotated[str | None, typer.Option("--refiner", help="SDXL's second model: bundle or folder.")] = None,
    refiner_start: Annotated[
        float | None, typer.Option("--refiner-start", help="Share of the run after which it draws on; 0.8.")
    ] = None,
    original_size: Annotated[
        str | None, typer.Option("--original-size", help="SDXL: size its picture is said to come from, 1024x768.")
    ] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Rewrite OUTPUT with a preview at each step.")] = False,
    repeat: Annotated[Path | None, typer.Option("--from", help="Repeat a picture that edgesd made.")] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Keep the run here; the same command goes on where it stopped.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Let the device's state decide: balanced, battery, … or a .json file."),
    ] = None,
    battery: Annotated[
        float | None, typer.Option("--battery", help="Charge 0 to 1, running down, in place of sensors.")
    ] = None,
    thermal: Annotated[
        str | None, typer.Option("--thermal", help="nominal, fair, serious or critical, in place of sensors.")
    ] = None,
    sensors: Annotated[Path | None, typer.Option("--sensors", help="JSON file with the device's state.")] = None,
    deadline: Annotated[float | None, typer.Option("--deadline", help="Seconds a picture may take.")] = None,
    width: Annotated[
        float, typer.Option("--width", help="Width of the UNet, of those the bundle has; a policy's ceiling.")
    ] = 1.0,
    min_steps: Annotated[int, typer.Option("--min-steps", help="The policy's floor; --steps is its ceiling.")] = 1,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take the stored picture of the same request; store what is drawn.")
    ] = False,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw a picture. Its settings go into the PNG; `--from picture.png` repeats it to the pixel."""
    from edgesd import drawing
    from edgesd.governing import Governing
    from edgesd.recipe import parse_size

    request = drawing.Request(
        prompt=prompt, negative_prompt=negative, seed=seed, num_inference_steps=steps, sampler=sampler,
        guidance_scale=guidance, guidance_until=guidance_until, guidance_schedule=guidance_schedule,
        guidance_rescale=guidance_rescale, early_stop=early_stop, image=image, mask=mask, strength=strength,
        num_images=count, rng=rng, refiner_start=refiner_start, width=width,
        original_size=None if original_size is None else parse_size(original_size, 1),
    )  # fmt: skip
    given = (battery, thermal, sensors, deadline)
    if policy is None and (min_steps != 1 or any(x is not None for x in given)):
        raise RequestError("the device's state without a policy", "--policy beside it", "Add --policy balanced")
    result = drawing.draw(
        request,
        model,
        output,
        repeat=repeat,
        preview=preview,
        state=state,
        threads=threads,
        device=device,
        refiner=refiner,
        policy=None if policy is None else Governing(policy, *given, min_steps),
        reuse=reuse,
    )
    show(result, as_json, drawing.describe(result))


@app.command()
def evaluate(
    model: Model = None,
    against: Annotated[str | None, typer.Option("--against", help="Compare with this model or bundle.")] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, max=10_000, help="Held-out captions.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which captions and noise.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps")] = 20,
    sampler: Annotated[str | None, typer.Option("--sampler")] = "dpmpp_2m_karras",
    guidance: Annotated[float | None, typer.Option("--guidance")] = 4.0,
    width: Annotated[float, typer.Option("--width", help="Of the UNet; --against draws at its widest.")] = 1.0,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="Contact sheet PNG: prompt, picture, verdict.")] = None,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure how well pictures show what their captions say (the embedded model's world)."""
    from edgesd import drawing

    report = drawing.evaluate_model(
        model, against, prompts=prompts, seed=seed, steps=steps, sampler=sampler, guidance=guidance, width=width,
        sheet=sheet, threads=threads, device=device,
    )  # fmt: skip
    show(report.to_json(), as_json, report.describe())


@app.command()
def package(
    model: Annotated[
        str | None,
        typer.Argument(help="Diffusers folder, .safetensors file or hub id; the embedded model if left out."),
    ] = None,
    target: Annotated[list[str], typer.Option("--target", help="onnx-web, openvino, tflite, coreml or all.")] = ...,  # type: ignore[assignment]
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            help="balanced (int8) if left out; quality (no int8); small (int8, UNet pruned by a quarter). Flags win.",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="int8, hybrid, w8, fp16 or fp32; the profile's if left out.")
    ] = None,
    vae: Annotated[str | None, typer.Option("--vae", help="tiny, full or a VAE folder.")] = None,
    sampler: Annotated[list[str] | None, typer.Option("--sampler", help="Tables to ship; repeatable.")] = None,
    steps: Annotated[str, typer.Option("--steps", help="Step counts the tables hold.")] = "1-50",
    size_px: Annotated[str | None, typer.Option("--size-px", help="512 or 512x768 (width x height).")] = None,
    batch2: Annotated[bool, typer.Option("--batch2", help="Also a UNet that takes both halves of guidance.")] = False,
    form: Annotated[list[str] | None, typer.Option("--form", help="Extra flavours: webgpu, gpu, split_einsum.")] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=1, max=8, help="Core ML: UNet in so many pieces.")] = 1,
    widths: Annotated[str, typer.Option("--widths", help="UNet widths in one bundle, such as 1,0.75,0.5.")] = "1",
    width_mode: Annotated[
        str | None,
        typer.Option("--width-mode", help="shared: weights stored once; separate. The target's if left out."),
    ] = None,
    minimum_target: Annotated[
        str, typer.Option("--minimum-target", help="Core ML: iOS17, iOS18, macOS14, macOS15.")
    ] = "iOS17",
    palette: Annotated[int | None, typer.Option("--palette", help="Core ML, w8: weights as 6 or 8 bits.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Core ML, on a Mac: compile with Xcode too.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision.")] = None,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="FILE or FILE:scale; repeatable.")] = None,
    embedding: Annotated[list[str] | None, typer.Option("--embedding", help="FILE or FILE:word; repeatable.")] = None,
    clip_skip: Annotated[int, typer.Option("--clip-skip", min=0, help="Text layers to leave out at the end.")] = 0,
    unet: Annotated[str | None, typer.Option("--unet", help="Folder of another UNet.")] = None,
    text_encoder: Annotated[str | None, typer.Option("--text-encoder", help="Folder of another text encoder.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="For a .safetensors checkpoint: folder with CLIP's vocabulary.")
    ] = None,
    prediction: Annotated[
        str | None, typer.Option("--prediction", help="For a .safetensors checkpoint: epsilon or v_prediction.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option("--prune", help="Share of the UNet's MACs to take off first, such as 0.25.")
    ] = None,
    long_prompt: Annotated[int, typer.Option("--long-prompt", min=0, help="Tokens a prompt may have.")] = 0,
    prompt_bank: Annotated[
        str | None, typer.Option("--prompt-bank", help="File of prompts: ship their embeddings, no text encoder.")
    ] = None,
    device_class: Annotated[
        list[str] | None, typer.Option("--device-class", help="Predict whether it fits: iphone-6gb, browser-wasm, …")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Set of recorded calls for int8; recorded anew if left out.")
    ] = None,
    gate_db: Annotated[
        float | None, typer.Option("--gate-db", help="What one call of an int8 component must reach against float.")
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option("--max-ram", help="Memory that packaging may hold, such as 8GB.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder that receives the bundles.")] = Path("."),
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing bundle once the new one is whole.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be made, how big, how much memory.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="TOML file with any of these; flags win.")] = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint into one bundle per target, each run and measured before it ships."""
    from edgesd import packager
    from edgesd.recipe import parse_bytes, parse_size, parse_steps, parse_widths, read_recipe

    fields: dict[str, Any] = read_recipe(recipe) if recipe is not None else {}
    given = {
        "source": model, "profile": profile, "precision": precision, "vae": vae,
        "samplers": tuple(sampler) if sampler else None,
        "size_px": parse_size(size_px) if size_px is not None else None, "forms": tuple(form) if form else None,
        "batch2": batch2 if batch2 else None, "compiled": compiled if compiled else None,
        "palette": palette, "revision": revision,
        "chunks": chunks if chunks != 1 else None, "width_mode": width_mode,
        "widths": parse_widths(widths) if widths != "1" else None,
        "minimum_target": minimum_target if minimum_target != "iOS17" else None,
        "steps": parse_steps(steps) if steps != "1-50" else None, "loras": tuple(lora) if lora else None,
        "embeddings": tuple(embedding) if embedding else None, "clip_skip": clip_skip if clip_skip else None,
        "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer, "prediction": prediction,
        "long_prompt": long_prompt if long_prompt else None, "prompt_bank": prompt_bank,
        "prune": prune,
        "device_classes": tuple(device_class) if device_class else None,
        "calibration": calibration, "gate_db": gate_db,
        "max_ram_bytes": parse_bytes(max_ram) if max_ram is not None else None,
    }  # fmt: skip
    fields |= {key: value for key, value in given.items() if value is not None}
    result = packager.package_all(fields, target, output, force=force, dry_run=dry_run)
    show(result.to_json(), as_json, result.table())


@app.command()
def validate(bundle: Path, as_json: Json = False) -> None:
    """Hold a bundle against its float32 truth: hashes, golden vectors, every component, a whole picture."""
    from edgesd import validate as room

    report = room.validate(bundle)
    show(report.to_json(), as_json, report.table())
    report.require()


@app.command()
def selftest(bundle: Path, as_json: Json = False) -> None:
    """Run a bundle's own golden vectors, as an app does at first start."""
    from edgesd import validate as room

    report = room.selftest(bundle)
    show(report.to_json(), as_json, report.table())
    report.require()


@app.command()
def inspect(bundle: Path, as_json: Json = False) -> None:
    """Components, variants, sizes, operations by type and precision, tables."""
    from edgesd import inspection

    show(*pair(inspection.inspect(bundle), as_json))


@app.command()
def bench(
    bundle: Path,
    runs: Annotated[int, typer.Option("--runs", min=1, max=1000)] = 7,
    sustained: Annotated[
        float | None, typer.Option("--sustained", help="Draw for so many minutes instead: heat, battery, energy.")
    ] = None,
    threads: Threads = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Cold load, warm load, seconds per call by component, peak memory: medians and spread."""
    if sustained is not None:
        from edgesd import sustained as room

        with progress() as tick:
            sheet = room.sustained(bundle, sustained, threads=threads, device=device, progress=tick)
        show(*pair(sheet, as_json))
        return
    from edgesd import inspection

    show(*pair(inspection.bench(bundle, runs=runs, threads=threads, device=device), as_json))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, extras, disk, memory, and what each target can do here."""
    from edgesd import inspection

    show(*pair(inspection.doctor(), as_json))


@app.command()
def samplers(
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="Count UNet calls for so many steps.")] = 20,
    as_json: Json = False,
) -> None:
    """List the samplers and what each costs."""
    from edgesd import inspection

    show(*pair(inspection.samplers(steps), as_json))


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all cached stages and prompt embeddings.")] = False,
    as_json: Json = False,
) -> None:
    """Show or clear what edgesd keeps between runs."""
    from edgesd import inspection

    show(*pair(inspection.cache(clear=clear), as_json))


@app.command(name="manifest-schema")
def manifest_schema() -> None:
    """Print the JSON Schema of manifest.json."""
    from edgesd.manifest import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


verbs.register(app)
verbs_training.register(app)


def main() -> None:
    """Entry point: runs a verb and turns errors into one clear line and an exit code."""
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer catches Ctrl-C itself and returns this
            _fail(INTERRUPTED, 130)
    except EdgesdError as error:
        code = _fail(str(error), error.exit_code)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(INTERRUPTED, 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        code = _fail(_system_error(error), 5)
    except Exception as error:  # click's usage errors carry their own words
        if not hasattr(error, "format_message"):
            raise
        code = _fail(f"{error.format_message()}. Run: edgesd {' '.join(sys.argv[1:2])} --help", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    typer.secho(f"edgesd: {message}", err=True, fg="red" if sys.stderr.isatty() else None)
    return code


def _system_error(error: OSError) -> str:
    from edgesd.files import disk_errors

    where = error.filename if error.filename is not None else "the output"
    try:
        with disk_errors(where, "Free some space, or choose another place with -o"):
            raise error
    except EdgesdError as told:
        return str(told)
    except OSError:
        return f"{error.strerror if error.strerror else error} ({where})"


if __name__ == "__main__":
    main()
