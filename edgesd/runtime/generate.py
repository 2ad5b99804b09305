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
from edgesd.runtime.cache import PromptCache, prompt_key
from edgesd.runtime.canvas import BatchNoise, Canvas, Start, latent_shape
from edgesd.runtime.noise import Purpose
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.plan import RunPlan, combine, make_plan
from edgesd.runtime.settings import MAX_IMAGES, Settings, check, resolve
from edgesd.runtime.table import SamplerTable
from edgesd.runtime.tokenizer import apply_weights


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
    **settings: Any,
) -> list[Picture]:
    """Draws `num_images` pictures of a prompt, as diffusers' pipelines are called.

    settings: fields of `Settings` (negative_prompt, num_inference_steps, guidance_scale, seed, sampler, …); what is
    left out comes from the model. The text is encoded once. callback_on_step_end(pipeline, row, timestep,
    {"latents", "denoised", "step"}) is called after every step; returning False stops the run with what is there.
    """
    chosen = resolve(pipeline.spec, prompt, **settings)
    if not 1 <= num_images <= MAX_IMAGES:
        raise RequestError(f"{num_images} pictures", f"1 to {MAX_IMAGES}", "Change the count")
    start = None if image is None else Start(image, mask)
    cache = PromptCache() if cache is None else cache
    pictures = []
    for index in range(num_images):
        one = replace(chosen, index=chosen.index + index)
        run = sample(pipeline, one, start, cache)
        for event in run:
            if isinstance(event, Picture):
                pictures.append(event)
            elif callback_on_step_end is not None:
                told = {"latents": event.latents, "denoised": event.denoised, "step": event}
                if callback_on_step_end(pipeline, event.row, event.timestep, told) is False:
                    return pictures
    return pictures


def sample(
    pipeline: Pipeline, settings: Settings, start: Start | None = None, cache: PromptCache | None = None
) -> Iterator[loop.Step | Picture]:
    """Yields a `loop.Step` per row, then the `Picture`. Closing the generator cancels."""
    for event in sample_batch(pipeline, [settings], start, cache):
        if isinstance(event, list):
            yield event[0]
        else:
            yield event


def sample_batch(
    pipeline: Pipeline, several: Sequence[Settings], start: Start | None = None, cache: PromptCache | None = None
) -> Iterator[loop.Step | list[Picture]]:
    """Several pictures in step: they may differ in prompt, negative prompt, seed and index alone.

    A batch shares each UNet call where the session takes more than one row; its pictures equal those drawn alone up to
    the rounding of the runtime.
    """
    first = check(several[0])
    cache = PromptCache() if cache is None else cache
    table = pipeline.table(first.sampler, first.num_inference_steps)
    at = table.start_row(first.strength) if start is not None else 0
    embeds = pipeline.spec.guidance_embedding_dim > 0
    guidance = first.guidance_scale if first.guidance_scale > 1 and not embeds else 1.0
    plan = make_plan(
        first.guidance_schedule, table.rows, guidance, until=first.guidance_until, rescale=first.guidance_rescale,
        early_stop=first.early_stop,
    )  # fmt: skip
    text, truncated = _encode_all(pipeline, several, plan, cache)
    noise = BatchNoise(pipeline.spec, several, latent_shape(pipeline, start))
    canvas = None if start is None else Canvas.make(pipeline, table, start, noise)
    denoiser = _Denoiser(pipeline, table, plan, text, canvas, first.guidance_scale if embeds else None)
    latents = state.init_latents(table, noise(0, Purpose.START)) if canvas is None else canvas.begin(at)
    adjust = None if canvas is None else canvas.adjust
    step: loop.Step | None = None
    before: np.ndarray | None = None
    for step in loop.run(table, denoiser, latents, lambda row: noise(row, Purpose.STEP), at, adjust=adjust):
        yield step
        if plan.early_stop is not None and not step.last:
            x0 = step.denoised
            if before is not None and plan.settled(before, x0):
                break
            before = x0
    if step is None:
        raise RequestError("a run without steps", "at least one", "Raise the steps or the strength")
    final = step.latents if step.last else step.denoised
    notes = () if step.last else (f"stopped early after row {step.row + 1} of {table.rows}",)
    calls = denoiser.calls // len(several)
    yield [
        Picture(decode(pipeline, final[i : i + 1]), final[i : i + 1], s, calls, step.row + 1 - at, cut, notes)
        for i, (s, cut) in enumerate(zip(several, truncated, strict=True))
    ]


def decode(pipeline: Pipeline, latents: np.ndarray) -> np.ndarray:
    """Finished latents [1,C,h,w] -> picture [H,W,3] u8."""
    spec = pipeline.spec.latent
    scaled = (latents / np.float32(spec.scaling_factor) + np.float32(spec.shift_factor)).astype(np.float32)
    return images.to_uint8(pipeline.session.run("vae_decoder", {"latents": scaled})["image"])


def encode_prompt(pipeline: Pipeline, prompt: str, cache: PromptCache) -> tuple[np.ndarray, str]:
    """(text states [1,L,D] f32 with the prompt's weights applied, the text that did not fit)."""
    tokenizer = pipeline.tokenizers[0]
    tokens = tokenizer.encode(prompt)
    component = tokenizer.spec.component

    def compute() -> np.ndarray:
        return pipeline.session.run(component, {"input_ids": tokens.ids})["encoder_hidden_states"]

    hidden = cache.get(prompt_key(pipeline.identity, component, prompt), compute)
    return (apply_weights(hidden, tokens.weights) if tokens.weighted else hidden), tokens.truncated


@dataclass(frozen=True, eq=False)
class _Text:
    """Text states of a batch, [B,L,D] each; uncond is None where no row needs it."""

    cond: np.ndarray
    uncond: np.ndarray | None


def _encode_all(
    pipeline: Pipeline, several: Sequence[Settings], plan: RunPlan, cache: PromptCache
) -> tuple[_Text, list[str]]:
    encoded = [encode_prompt(pipeline, s.prompt, cache) for s in several]
    uncond = None
    if any(plan.uncond):
        uncond = np.concatenate([encode_prompt(pipeline, s.negative_prompt, cache)[0] for s in several])
    return _Text(np.concatenate([states for states, _ in encoded]), uncond), [cut for _, cut in encoded]


class _Denoiser:
    """What the loop calls: guidance over one or two halves, split into calls of the size that the session takes."""

    def __init__(
        self,
        pipeline: Pipeline,
        table: SamplerTable,
        plan: RunPlan,
        text: _Text,
        canvas: Canvas | None,
        embedded: float | None,
    ) -> None:
        self._session, self._table, self._plan, self._text = pipeline.session, table, plan, text
        self._extra = None if canvas is None else canvas.channels(pipeline.spec)
        self._embedded, self._embedding_dim = embedded, pipeline.spec.guidance_embedding_dim
        self.calls = 0

    def __call__(self, sample: np.ndarray, row: int) -> np.ndarray:
        if not self._plan.uncond[row] or self._text.uncond is None:
            return self._predict(sample, row, self._text.cond)
        both = self._predict(
            np.concatenate([sample, sample]), row, np.concatenate([self._text.uncond, self._text.cond])
        )
        uncond, cond = both[: len(sample)], both[len(sample) :]
        return combine(uncond, cond, self._plan.guidance[row], self._plan.rescale)

    def _predict(self, sample: np.ndarray, row: int, states: np.ndarray) -> np.ndarray:
        if self._extra is not None:
            sample = np.concatenate([sample, np.repeat(self._extra, len(sample) // len(self._extra), axis=0)], axis=1)
        self.calls += len(sample)
        sizes = self._session.batches("unet")
        outputs, done = [], 0
        while done < len(sample):
            left = len(sample) - done
            size = left if sizes is None else max(n for n in sizes if n <= left)
            inputs: dict[str, np.ndarray] = {
                "sample": sample[done : done + size],
                "timestep": self._table.timestep[row : row + 1],
                "encoder_hidden_states": states[done : done + size],
            }
            if self._embedded is not None:
                inputs["timestep_cond"] = guidance_embedding(self._embedded, self._embedding_dim, size)
            outputs.append(self._session.run("unet", inputs)["model_output"])
            done += size
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)


def guidance_embedding(guidance: float, dim: int, rows: int) -> np.ndarray:
    """Sinusoids of guidance - 1 for consistency models, [rows, dim] f32 (diffusers' get_guidance_scale_embedding)."""
    half = dim // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
    angles = np.float32((guidance - 1) * 1000.0) * frequencies
    wave = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(dim % 2, np.float32)])
    return np.repeat(wave[None].astype(np.float32), rows, axis=0)
