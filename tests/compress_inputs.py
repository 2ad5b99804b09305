"""Made-up calls of any component, as batches."""

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
