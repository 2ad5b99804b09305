"""A sampler as data: the banded recurrence that turns model outputs into the next UNet input.

With u_i the UNet's input at row i (already scaled as the UNet wants it), e_i its output and z noise:

    u_0     = init_scale * z_start
    u_{i+1} = sum_p input_coef[i,p] u_{i-p} + sum_q output_coef[i,q] e_{i-q} + sum_k noise_coef[i,k] z_{...}

and the recurrence's last value is the finished latents. Because u is in the UNet's own scaling,
u_i = alpha_i x0 + sigma_i eps holds for every scheduler, which previews, re-noising and bridges rest on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SamplerTable:
    """Skeleton: the sampling room completes this file."""

    name: str
    steps: int
    prediction_type: str
    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    input_coef: np.ndarray
    output_coef: np.ndarray
    noise_coef: np.ndarray
    init_scale: float
