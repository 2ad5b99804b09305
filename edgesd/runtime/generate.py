"""A prompt becomes pictures: text once, then the table's rows through the UNet, then the VAE. The words are diffusers'.

`generate` returns finished pictures; `sample` is the generator beneath it, which yields every step, so that progress,
preview, pause and cancel live with the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgesd.errors import RequestError
from edgesd.runtime import image as images
from edgesd.runtime import loop, state
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.canvas import BatchNoise, Canvas, Start, blank, concatenates, latent_shape
from edgesd.runtime.governed import Governor, Replay
from edgesd.runtime.noise import Purpose
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import MAX_IMAGES, Settings, check, resolve
from edgesd.runtime.stage import RunLog, Stage
from edgesd.runtime.table import SamplerTable

TIMESTEPS = 1000  # the noise range of every Stable Diffusion
REFINER_START = 0.8  # what SDXL's authors trained its refiner for: the last fifth of the noise range


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished picture.

    image [H,W,3] u8; latents [1,C,h,w] f32 as the sampler left them; calls: UNet rows computed, guidance counted twice;
    truncated: text that did not fit the encoder; notes: what a reader of the log should know.
    """

    image: np.ndarray
    latents: np.ndarray
    settings: Settings
    calls: int
    steps_run: int
    truncated: str = ""
    notes: tuple[str, ...] = field(default=())


def generate(
    pipeline: Pipeline,
    prompt: str,
    *,
    num_images: int = 1,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    callback_on_step_end: Callable[[Pipeline, int, float, dict[str, Any]], Any] | None = None,
    cache: PromptCache | None = None,
    refiner: Pipeline | None = None,
    **settings: Any,
) -> list[Picture]:
    """Draws `num_images` pictures of a prompt, as diffusers' pipelines are called.

    settings: fields of `Settings` (negative_prompt, num_inference_steps, guidance_scale, seed, sampler, …); what is
    left out comes from the model. The text is encoded once. callback_on_step_end(pipeline, row, timestep,
    {"latents", "denoised", "step"}) is called after every step; returning False stops the run with what is there.
    refiner: SDXL's second model, which draws on from `refiner_start` (0.8 where it is not said).
    """
    if refiner is not None:
        settings = {"refiner_start": REFINER_START} | settings
    chosen = resolve(pipeline.spec, prompt, **settings)
    if not 1 <= num_images <= MAX_IMAGES:
        raise RequestError(f"{num_images} pictures", f"1 to {MAX_IMAGES}", "Change the count")
    start = None if image is None else Start(image, mask)
    cache = PromptCache() if cache is None else cache
    pictures = []
    for index in range(num_images):
        one = replace(chosen, index=chosen.index + index)
        run = sample(pipeline, one, start, cache, refiner)
        for event in run:
            if isinstance(event, Picture):
                pictures.append(event)
            elif callback_on_step_end is not None:
                told = {"latents": event.latents, "denoised": event.denoised, "step": event}
                if callback_on_step_end(pipeline, event.row, event.timestep, told) is False:
                    return pictures
    return pictures


def sample(
    pipeline: Pipeline,
    settings: Settings,
    start: Start | None = None,
    cache: PromptCache | None = None,
    refiner: Pipeline | None = None,
    resume: state.State | None = None,
    governor: Governor | None = None,
    log: RunLog | None = None,
) -> Iterator[loop.Step | Picture]:
    """Yields a `loop.Step` per row, then the `Picture`. Closing the generator cancels.

    resume: a `step.state` of an earlier run with the same arguments; the picture equals the uninterrupted one's bits.
    log: filled as the run goes; to resume a run with a governor, pass what it was at that step.
    """
    for event in sample_batch(pipeline, [settings], start, cache, refiner, resume, governor, log):
        if isinstance(event, list):
            yield event[0]
        else:
            yield event


def sample_batch(
    pipeline: Pipeline,
    several: Sequence[Settings],
    start: Start | None = None,
    cache: PromptCache | None = None,
    refiner: Pipeline | None = None,
    resume: state.State | None = None,
    governor: Governor | None = None,
    log: RunLog | None = None,
) -> Iterator[loop.Step | list[Picture]]:
    """Several pictures in step: they may differ in prompt, negative prompt, seed and index alone.

    All texts are encoded first, then all is denoised, then all decoded: each component is needed in one stretch.
    A batch shares each UNet call where the session takes more than one row; its pictures equal those drawn alone up to
    the rounding of the runtime. governor: a policy, asked before every step; what it changed is in the pictures'
    settings, and settings with changes repeat them.
    """
    first = check(several[0])
    if (refiner is None) != (first.refiner_start is None):
        raise RequestError("half a refiner", "a second model together with refiner_start", "Pass both or neither")
    if resume is not None and (refiner is not None or first.early_stop is not None):
        raise RequestError("a run to resume with a refiner or early stop", "one without", "Draw the picture anew")
    governor = Replay(first.changes) if governor is None and first.changes else governor
    if governor is not None and refiner is not None:
        raise RequestError("a policy's run with a refiner", "one without", "Leave out the refiner")
    if governor is not None and resume is not None and (log is None or log.last is None):
        raise RequestError("a policy's run to resume without its log", "the log as it was", "Draw the picture anew")
    cache = PromptCache() if cache is None else cache
    table = pipeline.table(first.sampler, first.num_inference_steps)
    at = table.start_row(first.strength) if start is not None else 0
    start = blank(pipeline.spec) if start is None and concatenates(pipeline.spec) else start
    noise = BatchNoise(pipeline.spec, several, latent_shape(pipeline, start))
    canvas = None if start is None else Canvas.make(pipeline, table, start, noise, at)
    stage = Stage(pipeline, table, several, noise, cache, canvas, log)
    latents = state.init_latents(table, noise(0, Purpose.START)) if canvas is None else canvas.begin(at)
    end = table.rows if refiner is None else handover_row(table, first)
    yield from stage.run(latents, at, end, resume, governor)
    changes = tuple(stage.log.changes)
    calls, steps_run = stage.log.calls, stage.log.rows_run
    if refiner is not None and stage.step is not None:
        other = refiner.table(first.sampler, first.num_inference_steps)
        enter, latents = _handover(stage.step, other)
        second = Stage(refiner, other, several, noise, cache, None)
        yield from second.run(latents, enter, other.rows)
        stage, calls, steps_run = second, calls + second.log.calls, steps_run + second.log.rows_run
    step = stage.step
    if step is None:
        raise RequestError("a run without steps", "at least one", "Raise the steps or the strength")
    final = step.latents if step.last else step.denoised
    notes = (*(c.describe() for c in changes), *(() if step.last else (stage.early(step),)))
    calls //= len(several)
    decoder = pipeline if refiner is None else refiner
    yield [
        Picture(decode(decoder, final[i : i + 1]), final[i : i + 1], s, calls, steps_run, cut, notes)
        for i, (s, cut) in enumerate(zip((replace(s, changes=changes) for s in several), stage.truncated, strict=True))
    ]


def handover_row(table: SamplerTable, settings: Settings) -> int:
    """The first row a refiner takes: the one below its share of the noise range, as diffusers' denoising_end counts.

    Raises RequestError where no row is left for one of the two models.
    """
    cutoff = round(TIMESTEPS - (settings.refiner_start or 0.0) * TIMESTEPS)
    row = int((table.timestep >= cutoff).sum())
    if not 0 < row < table.rows:
        came = f"a refiner from {settings.refiner_start} on with {settings.num_inference_steps} steps"
        raise RequestError(came, "at least one step for each model", "Raise --steps or change --refiner-start")
    return -(-row // table.order) * table.order


def _handover(step: loop.Step, table: SamplerTable) -> tuple[int, np.ndarray]:
    """(row, the UNet's input there) for a second model that goes on after `step`, along its own noise levels."""
    row = step.row + 1
    same = step.table.rows == table.rows and np.allclose(
        [step.table.alpha[row], step.table.sigma[row]], [table.alpha[row], table.sigma[row]], rtol=1e-5
    )
    if same:
        return row, step.latents
    entered = state.bridge(step.table, step.row, step.sample, step.model_output, table)
    return entered.row, entered.inputs[0]


def decode(pipeline: Pipeline, latents: np.ndarray) -> np.ndarray:
    """Finished latents [1,C,h,w] -> picture [H,W,3] u8."""
    spec = pipeline.spec.latent
    scaled = (latents / np.float32(spec.scaling_factor) + np.float32(spec.shift_factor)).astype(np.float32)
    return images.to_uint8(pipeline.session.run("vae_decoder", {"latents": scaled})["image"])
