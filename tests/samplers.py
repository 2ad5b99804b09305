"""What the sampler tests share: a fixed non-linear function in place of a UNet, its noise, and diffusers' own loop."""

from __future__ import annotations

import sys

import numpy as np

from edgesd.runtime.loop import run
from edgesd.runtime.noise import Philox, Purpose
from edgesd.runtime.state import init_latents
from edgesd.sampling.schedules import SAMPLERS

SHAPE = (1, 4, 4, 6)
STEPS = (1, 2, 4, 7, 20, 50)
SD = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "timestep_spacing": "leading", "prediction_type": "epsilon",
}  # fmt: skip
SOURCE = Philox(11)
START = SOURCE.normal(SHAPE, 0, 0, Purpose.START)


def model(sample: np.ndarray, timestep: float) -> np.ndarray:
    """The fixed function: float64 from one addition, product and quotient each, rounded to float32 at the end."""
    u = sample.astype(np.float64)
    return ((1.2 * u + 0.0001 * timestep) / (1.0 + 0.5 * u * u)).astype(np.float32)


def step_noise(row: int) -> np.ndarray:
    return SOURCE.normal(SHAPE, 0, row, Purpose.STEP)


def config_for(name: str, **changes) -> dict:
    """SD's scheduler config with changes; flow, EDM and IPNDM samplers get a config of their own kind."""
    kind = SAMPLERS[name][0] if name in SAMPLERS else ""
    own = kind.startswith(("FlowMatch", "EDM", "IPNDM"))
    return {"_class_name": kind} if own else {**SD, **changes}


def table_run(table, latents=None, **options):
    """The steps of a table's run on the fixed function."""
    latents = init_latents(table, START) if latents is None else latents
    return list(run(table, lambda u, row: model(u, float(table.timestep[row])), latents, step_noise, **options))


class _Wide:
    """torch, where float32 means float64: for schedulers whose own float32 rounding is what a comparison would show."""

    def __init__(self, torch) -> None:
        self._torch = torch
        self.float32 = torch.float64

    def __getattr__(self, name):
        return getattr(self._torch, name)


def diffusers_run(scheduler, steps: int, start: int = 0, x0=None, wide: bool = False, mask=None) -> np.ndarray:
    """Finished latents of diffusers' loop as its pipelines write it, with this file's function and noise.

    x0: the image to start from; mask: where it is drawn anew (its inpainting pipeline with a 4-channel UNet).
    """
    import torch

    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    module = sys.modules[type(scheduler).__module__]
    originals = {key: getattr(module, key, None) for key in ("randn_tensor", "torch")}
    row, kind = start, torch.float64 if wide else torch.float32
    module.randn_tensor = lambda *args, **kwargs: torch.from_numpy(step_noise(row)).to(kind)
    module.torch = _Wide(torch) if wide else torch
    try:
        latents = z = torch.from_numpy(START).to(kind)
        if x0 is None:
            latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        else:
            noisy = scheduler.add_noise if hasattr(scheduler, "add_noise") else None
            where = scheduler.timesteps[start : start + 1]
            clean = torch.from_numpy(x0).to(kind)
            latents = noisy(clean, latents, where) if noisy else scheduler.scale_noise(clean, where, latents)
        for row in range(start, len(scheduler.timesteps)):
            t = scheduler.timesteps[row]
            sample = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
            output = torch.from_numpy(model(sample.float().numpy(), float(t))).to(kind)
            latents = scheduler.step(output, t, latents, return_dict=False)[0]
            if mask is not None:
                kept = clean
                if row < len(scheduler.timesteps) - 1:
                    kept = scheduler.add_noise(clean, z, scheduler.timesteps[row + 1 : row + 2])
                drawn = torch.from_numpy(mask).to(kind)
                latents = (1 - drawn) * kept + drawn * latents
    finally:
        for key, value in originals.items():
            setattr(module, key, value)
    return latents.float().numpy()


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
