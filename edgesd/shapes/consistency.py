"""A student of few steps: latent consistency distillation (Luo et al., arXiv 2310.04378), guidance baked in.

The student's answer at any noise level is the clean picture; it learns that two neighbouring points of the teacher's
path lead to the same one. Its own frozen answer is the target (Song & Dhariwal, arXiv 2310.14189, section 3.2), and its
boundary scaling is that of diffusers' LCMScheduler, whose table `lcm` then draws with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgesd.training.finetune import levels

if TYPE_CHECKING:
    from edgesd.models.load import LoadedModel
    from edgesd.shapes.train import Data

ORIGINAL_STEPS = 50  # LCMScheduler's original_inference_steps
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER = 1e-3
GUIDANCE = 4.0
DRAWN: dict[str, Any] = {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}


class Consistency:
    """A job of `training.loop`: a copy of the model's UNet becomes its student; the model itself is the teacher."""

    name = "student"

    def __init__(self, model: LoadedModel, data: Data, batch: int) -> None:
        teacher = model.modules["unet"].eval().requires_grad_(False)
        student = copy.deepcopy(teacher).train().requires_grad_(True)
        text = model.modules["text_encoder"].eval().requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"unet": student, "teacher": teacher, "text_encoder": text}
        self._model, self._data, self._batch, self._levels = model, data, batch, levels(model.spec)
        self._apart = len(self._levels.alpha) // ORIGINAL_STEPS

    def loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        latents, ids = self._data.draw(rng, self._batch, 0.0)
        noise = torch.randn(latents.shape, generator=rng)
        step = torch.randint(1, ORIGINAL_STEPS + 1, (self._batch,), generator=rng)
        timestep = (step * self._apart - 1).to(device)
        before = (timestep - self._apart).clamp(min=0)
        noisy = self._levels.noisy(latents, noise, timestep.cpu()).to(device)
        student, text = self.modules["unet"], self.modules["text_encoder"]
        with torch.no_grad():
            told = text(torch.cat([ids, self._data.empty.expand_as(ids)]).to(device)).last_hidden_state
            earlier = self._solver_step(noisy, timestep, before, told)
            cond = told[: self._batch]
            target = self._clean(student, earlier, before, cond)
        error = self._clean(student, noisy, timestep, cond) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()

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
        from edgesd.shapes.train import alignment

        return {"alignment at 4 steps (128 captions)": alignment(self.student_model(), **DRAWN)}

    def student_model(self) -> LoadedModel:
        """The model with the student for its UNet."""
        return replace(self._model, modules=self._model.modules | {"unet": self.modules["unet"]})
