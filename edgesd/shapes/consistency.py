"""A student of few steps: latent consistency distillation (Luo et al., arXiv 2310.04378), guidance baked in, as a LoRA.

The student's answer at any noise level is the clean picture; it learns that two points of the teacher's path lead to
the same one. The later point is the next row of a run of four steps, not the neighbour: what is right near the picture
then reaches pure noise over four answers instead of fifty. Its own frozen answer is the target (Song & Dhariwal, arXiv
2310.14189, section 3.2), and its boundary scaling is that of diffusers' LCMScheduler, whose table `lcm` then draws with
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgesd.models.plain import two_product_attention
from edgesd.training.finetune import levels
from edgesd.training.lowrank import fused, low_rank

if TYPE_CHECKING:
    from edgesd.models.load import LoadedModel
    from edgesd.shapes.denoiser import Data

ORIGINAL_STEPS = 50  # LCMScheduler's original_inference_steps
ON_ROWS = 0.75  # of the noisier points are rows of a run of STEPS, the only ones that such a run asks about
SUBSTEPS = 3  # DDIM steps of the teacher from a point to the next row
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER = 1e-3
GUIDANCE = 4.0
STEPS, RANK = 4, 32
DRAWN: dict[str, Any] = {"sampler": "lcm", "num_inference_steps": STEPS, "guidance_scale": 1.0}


class Consistency:
    """A job of `training.loop`: the model's UNet is the teacher, and with a LoRA that learns, the student."""

    name = "student"

    def __init__(self, model: LoadedModel, data: Data, batch: int, seed: int = 0) -> None:
        from diffusers import LCMScheduler

        teacher = model.modules["unet"].eval().requires_grad_(False)
        student = low_rank(teacher, RANK, seed).train()
        two_product_attention(student)
        text = model.modules["text_encoder"].eval().requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"unet": student, "teacher": teacher, "text_encoder": text}
        self._model, self._data, self._batch, self._levels = model, data, batch, levels(model.spec)
        scheduler = LCMScheduler.from_config(model.spec.scheduler, original_inference_steps=ORIGINAL_STEPS)
        scheduler.set_timesteps(STEPS)
        self._rows = scheduler.timesteps.flip(0)  # ascending
        self._apart = len(self._levels.alpha) // ORIGINAL_STEPS

    def loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        latents, ids, _ = self._data.draw(rng, self._batch, 0.0)
        noise = torch.randn(latents.shape, generator=rng)
        at, until = self._points(rng)
        noisy = self._levels.noisy(latents, noise, at).to(device)
        student, text = self.modules["unet"], self.modules["text_encoder"]
        with torch.no_grad():
            told = text(torch.cat([ids, self._data.empty.expand_as(ids)]).to(device)).last_hidden_state
            later, cond = noisy, told[: self._batch]
            path = [at + (until - at) * k // SUBSTEPS for k in range(SUBSTEPS + 1)]
            for now, after in pairwise(path):
                later = self._solver_step(later, now.to(device), after.to(device), told)
            target = self._clean(student, later, until.to(device), cond)
        error = self._clean(student, noisy, at.to(device), cond) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()

    def _points(self, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps [B] of the noisier point, most of them rows of a run of four steps, and of the row below, or 0."""
        anywhere = torch.randint(1, ORIGINAL_STEPS + 1, (self._batch,), generator=rng) * self._apart - 1
        rows = self._rows[torch.randint(0, STEPS, (self._batch,), generator=rng)]
        at = torch.where(torch.rand(self._batch, generator=rng) < ON_ROWS, rows, anywhere)
        below = torch.cat([torch.zeros_like(self._rows[:1]), self._rows])
        return at, below[torch.searchsorted(self._rows, at)]

    def _clean(self, unet: Any, sample: torch.Tensor, timestep: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """The consistency function: the clean latents, exactly the sample where there is no noise."""
        output = unet(sample, timestep, told).sample.float()
        alpha, sigma = self._at(timestep)
        scaled = (timestep.float() * TIMESTEP_SCALING).view(-1, 1, 1, 1)
        skip = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
        out = scaled / (scaled.square() + SIGMA_DATA**2).sqrt()
        return skip * sample + out * (sample - sigma * output) / alpha

    def _solver_step(
        self, sample: torch.Tensor, timestep: torch.Tensor, before: torch.Tensor, told: torch.Tensor
    ) -> torch.Tensor:
        """One DDIM step of the guided teacher."""
        both = self.modules["teacher"](torch.cat([sample] * 2), torch.cat([timestep] * 2), told).sample.float()
        cond, uncond = both.chunk(2)
        output = uncond + GUIDANCE * (cond - uncond)
        (alpha, sigma), (alpha_before, sigma_before) = self._at(timestep), self._at(before)
        return alpha_before * (sample - sigma * output) / alpha + sigma_before * output

    def _at(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = timestep.cpu()
        shape = (-1, 1, 1, 1)
        return (self._levels.alpha[index].view(shape).to(timestep.device),
                self._levels.sigma[index].view(shape).to(timestep.device))  # fmt: skip

    def measure(self) -> Mapping[str, float]:
        from edgesd.shapes.denoiser import alignment

        return {"alignment at 4 steps (128 captions)": alignment(self.student_model(), **DRAWN)}

    def student_model(self) -> LoadedModel:
        """The model with the student for its UNet."""
        unet = fused(self.modules["unet"], self.modules["teacher"])
        return replace(self._model, modules=self._model.modules | {"unet": unet})
