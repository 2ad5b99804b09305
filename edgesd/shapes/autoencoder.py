"""How the embedded model's tiny VAE learns: pictures of the world there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesd.training.pool import world_scenes

EDGES, EDGE_CONTRAST = 4.0, 0.2  # what errors at edges count beyond the others; the least step in -1..1 that is one
LATENT_NOISE = 0.08  # the decoder learns to bear what a sampler leaves


class Autoencoder:
    """A job: pictures through encoder and decoder, in absolute and squared error, latents kept near unit variance."""

    name = "vae"

    def __init__(self, vae: nn.Module, batch: int, decoder_only: bool = False) -> None:
        self.vae: Any = vae.train().requires_grad_(True)
        self.vae.encoder.requires_grad_(not decoder_only)
        self.decoder_only = decoder_only
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self._batch = batch

    def loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        start = int(torch.randint(0, 1 << 30, (), generator=rng))
        picture = _floats([image for _, image in world_scenes(self._batch, start)]).to(device)
        latents = self.vae.encoder(picture).float()
        noise = torch.randn(latents.shape, generator=rng).to(device)
        error = self.vae.decoder(latents + LATENT_NOISE * noise).float() - picture
        spread = latents.mean((0, 2, 3)).square().mean() + (latents.var((0, 2, 3)) - 1).square().mean()
        each = error.abs() + 2 * error.square()
        return (each * (1 + EDGES * _edges(picture))).mean() + 0.02 * spread

    def measure(self) -> Mapping[str, float]:
        """PSNR of reconstructions, and the share that the oracle reads as their captions say."""
        from edgesd.runtime.image import psnr_db, to_uint8
        from edgesd.shapes.oracle import judge

        captions, pictures = zip(*world_scenes(256, start=1 << 31), strict=True)
        with torch.no_grad():
            device = next(self.vae.parameters()).device
            made = self.vae.decoder(self.vae.encoder(_floats(pictures).to(device))).float().cpu().numpy()
        rebuilt = [to_uint8(image[None]) for image in made]
        right = [judge(image, caption).all for image, caption in zip(rebuilt, captions, strict=True)]
        decibels = [psnr_db(a, b) for a, b in zip(rebuilt, pictures, strict=True)]
        return {"reconstructions read right": float(np.mean(right)), "PSNR, dB": float(np.mean(decibels))}

    def scale(self) -> float:
        with torch.no_grad():
            device = next(self.vae.parameters()).device
            pictures = _floats([image for _, image in world_scenes(64)]).to(device)
            return round(1 / float(self.vae.encoder(pictures).float().std()), 4)


def _edges(picture: torch.Tensor) -> torch.Tensor:
    """[B,1,H,W]: 1 within two pixels of a change of colour, else 0. Flat fields, most of a picture, are learnt soon."""
    spread = nn.functional.max_pool2d(picture, 5, 1, 2) + nn.functional.max_pool2d(-picture, 5, 1, 2)
    return (spread.amax(1, keepdim=True) > EDGE_CONTRAST).float()


def _floats(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
