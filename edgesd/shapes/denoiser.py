"""Text encoder and UNet learn the world: epsilon prediction, at several widths, with a lesson of where to look.

Noise levels weigh as min-SNR has it (Hang et al., arXiv 2303.09556) and a little more where they are noisiest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgesd.models.plain import two_product_attention
from edgesd.shapes.grounding import NOWHERE, grounding_loss, looking, standing
from edgesd.shapes.reading import token_ids
from edgesd.shapes.world import parse
from edgesd.training.finetune import levels
from edgesd.training.nested import Nested
from edgesd.training.pool import numbered_scenes

if TYPE_CHECKING:
    from edgesd.models.load import LoadedModel
    from edgesd.runtime.pipeline import Pipeline

WITHOUT_CAPTION = 0.1
LAYOUT = 0.1  # least weight of a clean picture's error at any noise level: what goes where is settled in the noisiest
NARROW_SHARE = 4  # a narrow width learns on one row in so many


@dataclass(frozen=True, eq=False)
class Data:
    """latents [N,4,16,16] scaled; ids [N,24] of their captions; standing [N,16,16]: see `grounding`; empty [24]; share
    [N]: how often each is drawn."""

    latents: torch.Tensor
    ids: torch.Tensor
    standing: torch.Tensor
    empty: torch.Tensor
    share: torch.Tensor

    def draw(self, rng: torch.Generator, batch: int, without: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, ids and what stands where; a share `without` of the rows comes without a caption."""
        index = torch.multinomial(self.share, batch, replacement=True, generator=rng)
        ids, here = self.ids[index].clone(), self.standing[index].clone()
        untold = torch.rand(batch, generator=rng) < without
        ids[untold], here[untold] = self.empty, NOWHERE
        return self.latents[index], ids, here


def make_data(pipeline: Pipeline, latents: np.ndarray, captions: Sequence[str], pairs: float) -> Data:
    """Latents of the first scenes with their captions' tokens; those of two objects come up `pairs` times as often."""
    share = torch.tensor([pairs if parse(text).relation is not None else 1.0 for text in captions])
    ids = token_ids(pipeline.tokenizers[0], (*captions, ""))
    here = standing(numbered_scenes(len(captions)), latents.shape[-1])
    return Data(torch.from_numpy(latents), ids[:-1], here, ids[-1], share)


class Denoiser:
    """A job: text encoder and UNet learn to predict the noise; narrow widths learn from the widest (sandwich rule).

    grounding: weight of `grounding_loss`.
    """

    name = "denoiser"

    def __init__(
        self, model: LoadedModel, data: Data, batch: int, widths: Sequence[float] = (1.0,), *, grounding: float = 0.0
    ) -> None:
        unet, text = (model.modules[part].train().requires_grad_(True) for part in ("unet", "text_encoder"))
        two_product_attention(unet)
        self.modules: dict[str, nn.Module] = {"unet": unet, "text_encoder": text}
        self._model, self._data, self._batch, self._grounding = model, data, batch, grounding
        self._levels = levels(model.spec, least=LAYOUT)
        self._nested = Nested(unet, widths)

    def loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        latents, ids, here = self._data.draw(rng, self._batch, WITHOUT_CAPTION)
        noise = torch.randn(latents.shape, generator=rng)
        timestep = torch.randint(0, len(self._levels.alpha), (len(latents),), generator=rng)
        noisy = self._levels.noisy(latents, noise, timestep).to(device)
        weight = self._levels.weight[timestep].to(device)
        states = self.modules["text_encoder"](ids.to(device)).last_hidden_state
        told = (noisy, timestep.to(device), states)
        with looking(self.modules["unet"]) as looks:
            wide = self._nested.call(1.0, *told).sample.float()
        total = _weighted(wide - noise.to(device), weight)
        if self._grounding:
            total = total + self._grounding * grounding_loss(looks, here.to(device))
        narrow = self._nested.chosen(rng)
        if narrow:  # one of the sandwich's two a step: the widest gets most of the time
            width = narrow[int(torch.randint(0, len(narrow), (), generator=rng))]
            some = slice(0, max(1, len(latents) // NARROW_SHARE))
            output = self._nested.call(width, *(x[some] for x in told)).sample.float()
            total = total + _weighted(output - wide[some].detach(), weight[some])
        return total

    def measure(self) -> Mapping[str, float]:
        return {"alignment (128 captions)": alignment(self._model)}


def _weighted(error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (error.square().flatten(1).mean(1) * weight).mean()


def alignment(model: LoadedModel, captions: int = 128, **settings: Any) -> float:
    """Share of held-out captions drawn right, as `edgesd evaluate` counts them; other seed than the card's figures."""
    from edgesd.drawing import draw_many
    from edgesd.evaluate import evaluate
    from edgesd.sources import torch_pipeline

    modes = {name: module.training for name, module in model.modules.items()}
    for module in model.modules.values():
        module.eval()
    pipeline = torch_pipeline(model, device=str(next(model.modules["unet"].parameters()).device))
    given = {"num_inference_steps": 20, "sampler": "dpmpp_2m_karras", "guidance_scale": 4.0} | settings
    report = evaluate(lambda texts, seeds: draw_many(pipeline, texts, seeds, **given), prompts=captions, seed=1)
    for name, module in model.modules.items():
        module.train(modes[name])
    return report.alignment["all"]
