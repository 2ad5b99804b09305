"""Recorded calls as torch batches, and what of their rows counts how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from edgesd.manifest import ModelSpec
from edgesd.models.session import forward

# component -> (part of a checkpoint, which of its modules the component runs)
PARTS = {
    "unet": ("unet", ""), "text_encoder": ("text_encoder", ""), "text_encoder_2": ("text_encoder_2", ""),
    "vae_decoder": ("vae", "decoder."), "vae_encoder": ("vae", "encoder."),
}  # fmt: skip
MAX_BATCH = 24
MAX_LATENTS = 24 * 16 * 16  # latent positions a batch holds, so that SD 1.5 runs call by call
POSITION_PIXELS = 64  # of a latent position, for VAEs' pictures


class Recorded(Protocol):
    """What is asked of a recorded call (see `edgesd.calibration.capture.Call`)."""

    inputs: dict[str, np.ndarray]
    weight: float
    guidance: float
    row: int
    target: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Calls run together. compute: what the component does, with modules by part name.

    inputs: as `edgesd.runtime.session` names them; of pairs, all unconditional rows come first.
    weight, guidance [B]: of each call. pairs: whether each call has an unconditional and a conditional row. steps: the
    sampler's row of each call. target [B, ...]: what a perfect model would have answered, where known.
    """

    part: str
    compute: Callable[[dict, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    inputs: dict[str, torch.Tensor]
    weight: torch.Tensor
    guidance: torch.Tensor
    pairs: bool
    steps: tuple[int, ...]
    target: torch.Tensor | None

    def loss(self, output: torch.Tensor) -> torch.Tensor:
        """The denoising loss of an output, weighted by call; without a target, the output's energy."""
        if self.target is None:
            return output.square().sum()
        wanted = torch.cat([self.target] * 2) if self.pairs else self.target
        weight = self.weight.repeat(2) if self.pairs else self.weight
        return ((output - wanted).square().flatten(1).sum(1) * weight).sum()

    def with_inputs(self, inputs: dict[str, torch.Tensor]) -> Batch:
        """The same calls with other input tensors."""
        return replace(self, inputs=inputs)

    def split(self, calls: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """The same calls, at most so many at a time, each lot with the rows of this batch that it holds."""
        count = len(self.weight)
        for at in range(0, count, calls):
            own = torch.arange(at, min(at + calls, count))
            rows = torch.cat([own, own + count]) if self.pairs else own
            yield (
                replace(
                    self, inputs={name: x[rows] for name, x in self.inputs.items()}, weight=self.weight[own],
                    guidance=self.guidance[own], steps=self.steps[at : at + calls],
                    target=None if self.target is None else self.target[own],
                ),
                rows,
            )  # fmt: skip

    def forward(self, module: nn.Module) -> torch.Tensor:
        """The component's first output, with `module` as its part."""
        return next(iter(self.compute({self.part: module}, self.inputs).values()))

    def mixed(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Rows that should count in a least-squares fit, each scaled by the root of what it counts.

        tensors: [rows of the batch * n, K] each, call after call. Yields the rows as they are and, for pairs, as
        guidance combines them: u + g (c - u). A layer's error reaches the picture in that combination, where what both
        halves have in common counts once and what tells the prompt counts g times.
        """
        root, g = self.weight.sqrt(), self.guidance
        if not self.pairs:
            yield _scaled(root, *tensors)
            return
        yield _scaled(root.repeat(2), *tensors)
        halves = zip(
            _scaled(root * (1 - g), *(x[: len(x) // 2] for x in tensors)),
            _scaled(root * g, *(x[len(x) // 2 :] for x in tensors)),
            strict=True,
        )
        yield tuple(u + c for u, c in halves)


def _scaled(factor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each call's rows times its factor; tensors [calls * n, K]."""
    return tuple((x.unflatten(0, (len(factor), -1)) * factor.view(-1, 1, 1)).flatten(0, 1) for x in tensors)


def batches(
    component: str, calls: Sequence[Recorded], spec: ModelSpec | None = None, size: int | None = None
) -> list[Batch]:
    """Calls as batches; calls of one batch are alike in shape and in whether they are pairs."""
    made = []
    waiting: list[Recorded] = []
    for call in calls:
        if waiting and (
            _kind(call) != _kind(waiting[0]) or len(waiting) >= (size if size is not None else _fitting(call))
        ):
            made.append(_batch(component, waiting, spec))
            waiting = []
        waiting.append(call)
    return [*made, _batch(component, waiting, spec)] if waiting else made


def _kind(call: Recorded) -> tuple:
    return tuple(sorted((name, array.shape) for name, array in call.inputs.items()))


def _fitting(call: Recorded) -> int:
    for name, pixels in (("sample", 1), ("latents", 1), ("image", POSITION_PIXELS)):
        if name in call.inputs:
            return max(1, min(MAX_BATCH, MAX_LATENTS * pixels // call.inputs[name][0, 0].size))
    return MAX_BATCH


def _batch(component: str, calls: Sequence[Recorded], spec: ModelSpec | None) -> Batch:
    targets = [call.target for call in calls if call.target is not None]
    rows = len(next(iter(calls[0].inputs.values()))) if component != "unet" else len(calls[0].inputs["sample"])
    inputs = {}
    for name in calls[0].inputs:
        each = [torch.from_numpy(np.ascontiguousarray(call.inputs[name])) for call in calls]
        # [calls, rows] -> rows first, so that the halves of guidance stay together; a timestep counts for both.
        tensor = torch.stack([x.expand(rows, *x.shape[1:]) for x in each], dim=1).flatten(0, 1)
        inputs[name] = tensor
    return Batch(
        PARTS[component][0], forward(spec)[component], inputs, torch.tensor([call.weight for call in calls]),
        torch.tensor([call.guidance for call in calls]), rows == 2, tuple(call.row for call in calls),
        torch.from_numpy(np.stack(targets)) if len(targets) == len(calls) else None,
    )  # fmt: skip
