"""From words on a command line to pictures on disk: opens the model, draws with progress, saves with settings."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesd import governing
from edgesd.errors import DataError, RequestError
from edgesd.files import cache_folder
from edgesd.governing import Governing, governed
from edgesd.kept import Kept, Resumed
from edgesd.runtime import image as images
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.canvas import Start
from edgesd.runtime.generate import REFINER_START, Picture, sample, sample_batch
from edgesd.runtime.governed import Governor
from edgesd.runtime.pictures import PictureStore, picture_key
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import MAX_IMAGES, Settings, resolve
from edgesd.runtime.stage import RunLog
from edgesd.sources import open_pipeline

if TYPE_CHECKING:
    from edgesd.evaluate import Report
    from edgesd.runtime.loop import Step

BATCH = 16  # pictures in step where the session takes any number of rows; larger gains nothing on a CPU


@dataclass(frozen=True)
class Request:
    """What `edgesd generate` was asked for; None = not said. image and mask: paths; the rest as in `Settings`."""

    prompt: str | None
    negative_prompt: str = ""
    seed: int | None = None
    num_inference_steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_schedule: str = "constant"
    guidance_until: float = 1.0
    guidance_rescale: float = 0.0
    early_stop: float | None = None
    strength: float = 0.8
    rng: str = "philox"
    image: Path | None = None
    mask: Path | None = None
    num_images: int = 1
    original_size: tuple[int, int] | None = None
    refiner_start: float | None = None
    width: float = 1.0


def draw(
    request: Request,
    model: str | None,
    output: Path,
    *,
    repeat: Path | None = None,
    preview: bool = False,
    state: Path | None = None,
    refiner: str | None = None,
    policy: Governing | None = None,
    reuse: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Draws and saves; returns what was made, ready for JSON. Every file appears whole or not at all.

    state: where the run is kept after every step; if the file is there, the run goes on from it. Deleted at the end.
    reuse: a picture of the same request is taken from the store, and others of the same words are offered in `similar`.
    """
    _check(request, output, repeat, state, refiner, policy, reuse)
    repeated = None if repeat is None else images.read_settings(repeat)
    if repeated is None and (request.prompt is None or not request.prompt.strip()):
        raise RequestError("an empty prompt", "at least one word", "Say what to draw, or repeat a picture with --from")
    began = time.perf_counter()
    pipeline = open_pipeline(model, **options)
    second = None if refiner is None else open_pipeline(refiner, **options)
    settings = _settings(pipeline, request, repeated)
    if second is not None and settings.refiner_start is None:
        settings = replace(settings, refiner_start=REFINER_START)
    start = _start(pipeline, request)
    run = None if policy is None else policy.run(pipeline, settings, request.num_inference_steps)
    cache = PromptCache(folder=cache_folder() / "prompts")
    store = PictureStore(cache_folder() / "pictures") if reuse else None
    drawn = []
    with progress(request.num_images) as tick:
        for index in range(request.num_images):
            path = output if request.num_images == 1 else output.with_stem(f"{output.stem}-{index + 1}")
            one = replace(settings, index=settings.index + index)
            first = time.perf_counter()
            key = picture_key(pipeline.identity, one, start)
            if store is not None and (found := store.take(key, path)) is not None:
                drawn.append(found | {"path": str(path), "changes": one.changes, "reused": True, "seconds": 0.0})
                continue
            kept = None if state is None else Kept(state, pipeline, one, run)
            resumed = None if kept is None else kept.load(one)
            decision = resumed.decision if resumed is not None else None if run is None else run.begin()
            if resumed is not None:
                one = resumed.settings
            elif run is not None and decision is not None:
                one = governed(one, decision, run, pipeline)
            picture = _draw_one(
                pipeline, one, start, cache, path if preview else None, tick, second, kept, run, resumed
            )
            record = _record(pipeline, picture, start, second)
            if run is not None and decision is not None:
                record["decision"] = decision.to_json() | {"policy": run.policy.name}
                record["notes"] = [*governing.describe(run, decision), *record["notes"]]
            images.save_png(path, picture.image, record)
            if kept is not None:
                kept.done()
            record["changes"] = record["settings"]["changes"]
            if store is not None:
                record |= {"reused": False, "similar": [str(p) for p in store.similar(pipeline.identity, one)]}
                store.keep(key, path)
            drawn.append(record | {"path": str(path), "seconds": round(time.perf_counter() - first, 3)})
    for kept_between_runs in (cache, *(() if store is None else (store,))):
        kept_between_runs.close()
    told = {"pictures": drawn, "seconds": round(time.perf_counter() - began, 3), "cache": cache.stats()}
    return told if store is None else told | {"store": store.stats()}


def _check(
    request: Request, output: Path, repeat: Path | None, state: Path | None, refiner: str | None,
    policy: Governing | None, reuse: bool,
) -> None:  # fmt: skip
    """RequestError for what does not go together."""
    if not 1 <= request.num_images <= MAX_IMAGES:
        raise RequestError(f"{request.num_images} pictures", f"1 to {MAX_IMAGES}", "Change --count")
    if output.suffix.lower() != ".png":
        raise RequestError(f"output {output.name!r}", "a name that ends in .png", "Change -o")
    if request.mask is not None and request.image is None:
        raise RequestError("a mask without a picture", "--mask together with --image", "Add --image")
    if state is not None and (request.num_images > 1 or (request.seed is None and repeat is None)):
        raise RequestError("--state with a run that cannot be named", "one picture, with --seed", "Add --seed")
    if policy is not None and (repeat is not None or refiner is not None):
        raise RequestError("--policy beside --from or --refiner", "one or the other", "Leave one out")
    if reuse and (policy is not None or state is not None or refiner is not None):
        raise RequestError("--reuse beside --policy, --state or --refiner", "one or the other", "Leave one out")


def describe(result: dict[str, Any]) -> str:
    """The result of `draw` for people."""
    lines = []
    for picture in result["pictures"]:
        s = picture["settings"]
        lines.append(
            f"{picture['path']}: seed {s['seed']}, {picture['steps_run']} steps of {s['sampler']}, guidance "
            f"{s['guidance_scale']:g}, {picture['calls']} UNet calls, {picture['seconds']:.1f} s"
        )
        lines += [f"  cut off, did not fit: {picture['truncated']}"] if picture["truncated"] else []
        lines += [f"  {note}" for note in picture["notes"]]
        lines += ["  taken from the store: the same request was drawn before"] if picture.get("reused") else []
        lines += [f"  of the same words, in the store: {other}" for other in picture.get("similar", ())]
    return "\n".join(lines)


def _settings(pipeline: Pipeline, request: Request, repeated: dict[str, Any] | None) -> Settings:
    if repeated is not None:
        return _repeat(pipeline, request, repeated)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    given = {k: v for k, v in asdict(request).items() if k not in ("prompt", "image", "mask", "num_images", "seed")}
    if request.image is None:
        given["strength"] = 1.0
    return resolve(pipeline.spec, request.prompt if request.prompt is not None else "", seed=seed, **given)


def _repeat(pipeline: Pipeline, request: Request, repeated: dict[str, Any]) -> Settings:
    """The settings of a picture; a prompt or seed said beside --from replaces the picture's."""
    settings = Settings.from_json(repeated.get("settings"))
    if repeated.get("start") is not None and request.image is None:
        raise RequestError(
            "a picture made from another picture", "the same --image (and --mask) beside --from", "Add it"
        )
    if repeated.get("identity") != pipeline.identity:
        raise RequestError(
            f"the picture was made by {repeated.get('model')} ({str(repeated.get('identity'))[:12]}…)",
            "the same model and target, so that it repeats to the pixel",
            "Pass that bundle or model with -m, or give the settings as flags",
        )
    changed: dict[str, Any] = {"prompt": request.prompt, "seed": request.seed}
    return replace(settings, **{key: value for key, value in changed.items() if value is not None})


def _start(pipeline: Pipeline, request: Request) -> Start | None:
    if request.image is None:
        return None
    size = pipeline.spec.defaults.size_px
    mask = None if request.mask is None else images.load_mask(request.mask, size)
    return Start(images.load_image(request.image, size), mask)


def _draw_one(
    pipeline: Pipeline,
    settings: Settings,
    start: Start | None,
    cache: PromptCache,
    preview: Path | None,
    tick: Callable[[Step | Picture], None],
    refiner: Pipeline | None,
    kept: Kept | None,
    governor: Governor | None,
    resumed: Resumed | None,
) -> Picture:
    resume, log = (None, RunLog()) if resumed is None else (resumed.state, resumed.log)
    for event in sample(pipeline, settings, start, cache, refiner, resume, governor, log):
        tick(event)
        if kept is not None and not isinstance(event, Picture):
            kept.save(event, settings, log)
        if isinstance(event, Picture):
            return event
        if preview is not None:
            images.save_png(preview, preview_image(pipeline, event), None)
    raise DataError("the run ended without a picture", "a whole run", "Report this as a bug")


def preview_image(pipeline: Pipeline, step: Step) -> np.ndarray:
    """The step's x0 as a picture [H,W,3] u8: by the bundle's latent-to-RGB factors, else through the VAE decoder."""
    latent = pipeline.spec.latent
    if latent.rgb_factors is not None:
        return images.preview(step.denoised, latent)
    from edgesd.runtime.generate import decode

    return decode(pipeline, step.denoised)


def _record(pipeline: Pipeline, picture: Picture, start: Start | None, refiner: Pipeline | None) -> dict[str, Any]:
    from edgesd import __version__

    settings = asdict(picture.settings)
    return {
        "settings": settings,
        "start": None if start is None else ("image" if start.mask is None else "image and mask"),
        "model": pipeline.spec.name,
        "identity": pipeline.identity,
        "size_px": list(picture.image.shape[:2]),
        "calls": picture.calls,
        "steps_run": picture.steps_run,
        "truncated": picture.truncated,
        "notes": list(picture.notes),
        "edgesd": __version__,
        **({} if refiner is None else {"refiner": refiner.spec.name}),
    }


def evaluate_model(
    model: str | None,
    against: str | None,
    *,
    prompts: int,
    seed: int,
    sheet: Path | None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    width: float = 1.0,
    **options: Any,
) -> Report:
    """Alignment of a model or bundle over held-out captions; `against`: another one on the same captions and noise.

    width: of the model's UNet; the other draws at its widest.
    """
    from edgesd.evaluate import evaluate

    def drawer(source: str | None, width: float = 1.0) -> Callable[[list[str], list[int]], list[np.ndarray]]:
        pipeline = open_pipeline(source, **options)
        given = {"num_inference_steps": steps, "sampler": sampler, "guidance_scale": guidance, "width": width}
        resolve(pipeline.spec, "a check", **given)
        return lambda captions, seeds: draw_many(pipeline, captions, seeds, **given)

    return evaluate(
        drawer(model, width), prompts=prompts, seed=seed, sheet=sheet,
        against=None if against is None else drawer(against),
    )  # fmt: skip


def draw_many(pipeline: Pipeline, prompts: list[str], seeds: list[int], **given: Any) -> list[np.ndarray]:
    """One picture [H,W,3] u8 a prompt, in batches where the session takes them."""
    cache = PromptCache()
    several = [resolve(pipeline.spec, p, seed=s, **given) for p, s in zip(prompts, seeds, strict=True)]
    size = BATCH if pipeline.session.batches("unet") is None else 1
    drawn: list[np.ndarray] = []
    with progress(len(several)) as tick:
        for at in range(0, len(several), size):
            for event in sample_batch(pipeline, several[at : at + size], cache=cache):
                if isinstance(event, list):
                    drawn += [picture.image for picture in event]
                    for picture in event:
                        tick(picture)
                else:
                    tick(event)
    return drawn


@contextmanager
def progress(pictures: int) -> Iterator[Callable[[Any], None]]:
    """A bar on stderr that is told every step and picture."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        steps = bar.add_task("step", total=None)
        whole = bar.add_task("pictures", total=pictures, visible=pictures > 1)

        def tick(event: Any) -> None:
            if isinstance(event, Picture):
                bar.advance(whole)
            else:
                bar.update(steps, total=event.table.rows, completed=event.row + 1)

        yield tick
