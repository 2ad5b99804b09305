"""Made-up calls: of any component, as batches, and of a UNet as a run with guidance makes them."""

from __future__ import annotations

import numpy as np
import tiny
import torch

from edgesd.calibration.sets import Call
from edgesd.compress.calls import batches


def lots_for(component, count: int, family: str = "sd1"):
    """`count` calls of one row like the component's example, timesteps spread over a run."""
    generator = torch.Generator().manual_seed(9)
    calls = []
    for row in range(count):
        inputs = {}
        for spec, example in zip(component.inputs, component.example, strict=True):
            x = example.clone()
            if spec.name == "timestep":
                x = torch.full_like(x, 990.0 - 980.0 * row / max(count - 1, 1))
            elif spec.name == "input_ids":
                x[0, 1 : 1 + row % 4] = torch.randint(0, 90, (row % 4,), generator=generator)
            elif spec.name != "time_ids":
                x = torch.randn(x.shape, generator=generator)
            inputs[spec.name] = np.ascontiguousarray(x.numpy())
        calls.append(Call(component.name, inputs, row=row))
    return batches(component.name, calls, tiny.spec(family))


def guided_calls(count: int = 24) -> list[Call]:
    """UNet calls of the tiny sd1 model, both halves of guidance on one latent, less noisy from one to the next."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    made = []
    for row in range(count):
        sample = normal(1, 4, 8, 8)
        inputs = {
            "sample": np.concatenate([sample, sample]), "timestep": np.array([980.0 - 40 * row], np.float32),
            "encoder_hidden_states": normal(2, tiny.TOKENS, tiny.TEXT),
        }  # fmt: skip
        made.append(Call("unet", inputs, weight=1 - row / count, guidance=4.0, row=row, target=normal(4, 8, 8)))
    return made
