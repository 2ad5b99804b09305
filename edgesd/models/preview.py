"""Latent → RGB factors: the least-squares shortcut past the VAE that makes a preview cost nothing."""

from __future__ import annotations

import numpy as np

from edgesd.runtime.noise import Philox, Purpose
from edgesd.runtime.pipeline import Pipeline

GRIDS = (1, 2, 4)  # cells a side: flat fields teach the colours, coarse ones the transitions
DRAWS = 8


def fit_rgb(truth: Pipeline) -> tuple[list[list[float]], list[float]]:
    """(factors 3 x C, bias 3) with RGB in 0..1 about factors @ latents + bias, latents in the UNet's scale.

    Smooth random latents of unit variance are decoded and averaged over each latent pixel's block; one linear fit.
    """
    latent, source = truth.spec.latent, Philox(0)
    side = max(GRIDS) * 4
    rows, colours = [], []
    for grid in GRIDS:
        for draw in range(DRAWS):
            coarse = source.normal((latent.channels, grid, grid), draw, grid, Purpose.START)
            x = np.kron(coarse, np.ones((1, side // grid, side // grid), np.float32))[None]
            scaled = x / np.float32(latent.scaling_factor) + np.float32(latent.shift_factor)
            picture = truth.session.run("vae_decoder", {"latents": scaled.astype(np.float32)})["image"][0]
            k = latent.downscale
            pooled = picture.reshape(3, side, k, side, k).mean(axis=(2, 4)) / 2 + 0.5
            rows.append(x[0].reshape(latent.channels, -1).T)
            colours.append(pooled.clip(0, 1).reshape(3, -1).T)
    x, y = np.concatenate(rows).astype(np.float64), np.concatenate(colours).astype(np.float64)
    solved = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
    return np.round(solved[:-1].T, 6).tolist(), np.round(solved[-1], 6).tolist()
