"""The start image of a run: image-to-image begins from it, inpainting keeps the part outside the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgesd.errors import RequestError
from edgesd.manifest import ModelSpec
from edgesd.runtime import image as images
from edgesd.runtime import state
from edgesd.runtime.noise import Purpose, batch, make_source
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import Settings
from edgesd.runtime.table import SamplerTable


@dataclass(frozen=True, eq=False)
class Start:
    """Where image-to-image and inpainting begin: image [H,W,3] u8, mask [H,W] f32 with 1 where it is redrawn."""

    image: np.ndarray
    mask: np.ndarray | None = None


def latent_shape(pipeline: Pipeline, start: Start | None) -> tuple[int, int, int]:
    spec = pipeline.spec
    height, width = spec.defaults.size_px if start is None else start.image.shape[:2]
    if height % spec.latent.downscale or width % spec.latent.downscale:
        raise RequestError(f"a picture of {width}x{height} px", f"multiples of {spec.latent.downscale}", "Resize it")
    return spec.latent.channels, height // spec.latent.downscale, width // spec.latent.downscale


class BatchNoise:
    """(row, purpose) -> [B,C,h,w]: each picture's own source, so that a batch draws what its pictures draw alone."""

    def __init__(self, spec: ModelSpec, several: Sequence[Settings], shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._sources = [(make_source(s.rng, s.seed), s.index) for s in several]

    def __call__(self, row: int, purpose: Purpose) -> np.ndarray:
        return np.concatenate([batch(source, self.shape, [index], row, purpose) for source, index in self._sources])


@dataclass(frozen=True, eq=False)
class Canvas:
    """The start image in latents. x0, noise [B,C,h,w]; mask [1,1,h,w] or None; masked: latents of the kept part.

    x0 is None where nothing needs it: a 9-channel UNet that begins with noise alone.
    """

    table: SamplerTable
    x0: np.ndarray | None
    noise: np.ndarray
    mask: np.ndarray | None
    masked: np.ndarray | None

    @classmethod
    def make(cls, pipeline: Pipeline, table: SamplerTable, start: Start, noise: BatchNoise, row: int) -> Canvas:
        """row: where the run starts. Normals are drawn in diffusers' order: image, noise, masked image."""
        nine, mask = concatenates(pipeline.spec), start.mask
        if mask is not None and pipeline.spec.unet_in_channels != pipeline.spec.latent.channels and not nine:
            came = f"a mask with a UNet of {pipeline.spec.unet_in_channels} channels"
            raise RequestError(came, "4 or 9", "Leave it out")
        if mask is None and nine:
            mask = np.ones(start.image.shape[:2], np.float32)
        pure = nine and row == 0
        x0 = None if pure else _encode_image(pipeline, images.to_float(start.image), noise)
        drawn = noise(0, Purpose.START if pure else Purpose.RENOISE)
        if mask is None:
            return cls(table, x0, drawn, None, None)
        small = images.latent_mask(mask, noise.shape[1:])
        if not nine:
            return cls(table, x0, drawn, small, None)
        kept = images.to_float(start.image) * (mask < 0.5)[None, None]
        return cls(table, x0, drawn, small, _encode_image(pipeline, kept.astype(np.float32), noise))

    def begin(self, row: int) -> np.ndarray:
        """The UNet's input at the start row. Inpainting from row 0 begins with noise alone, as diffusers does."""
        if self.x0 is None or (self.mask is not None and row == 0):
            return state.init_latents(self.table, self.noise)
        return state.add_noise(self.table, row, self.x0, self.noise)

    def adjust(self, latents: np.ndarray, row: int) -> np.ndarray:
        """Outside the mask, the start image at the noise of the coming row (Avrahami et al. 2023, blended latents)."""
        if self.mask is None or self.masked is not None or self.x0 is None:
            return latents
        return self.mask * latents + (1 - self.mask) * state.add_noise(self.table, row, self.x0, self.noise)

    def channels(self) -> np.ndarray | None:
        """[B,5,h,w] that a 9-channel inpainting UNet takes behind the latents: mask, latents of the masked image."""
        if self.mask is None or self.masked is None:
            return None
        return np.concatenate([np.repeat(self.mask, len(self.masked), axis=0), self.masked], axis=1)


def concatenates(spec: ModelSpec) -> bool:
    """Whether the UNet takes a mask and a masked image beside its latents."""
    return spec.unet_in_channels == 2 * spec.latent.channels + 1


def blank(spec: ModelSpec) -> Start:
    """What such a UNet starts from without a picture: all of it is to be drawn."""
    height, width = spec.defaults.size_px
    return Start(np.full((height, width, 3), 128, np.uint8), np.ones((height, width), np.float32))


def _encode_image(pipeline: Pipeline, image: np.ndarray, noise: BatchNoise) -> np.ndarray:
    """Picture [1,3,H,W] f32 -> latents [B,C,h,w] in the UNet's scale; a full VAE's posterior is sampled."""
    if not pipeline.session.has("vae_encoder"):
        raise RequestError("a start image", "prompts alone: this bundle has no VAE encoder", "Package it with one")
    encoded = pipeline.session.run("vae_encoder", {"image": image})
    latents = encoded["mean"]
    if "std" in encoded:
        latents = latents + encoded["std"] * noise(0, Purpose.POSTERIOR)
    spec = pipeline.spec.latent
    return ((latents - np.float32(spec.shift_factor)) * np.float32(spec.scaling_factor)).astype(np.float32)
