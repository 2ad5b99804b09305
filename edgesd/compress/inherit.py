"""A narrow width's int8 weights out of the widest one's, so that a bundle stores the integers once (mode "shared").

The widest is planned first. A narrow width takes over how it was smoothed, its layers' modes and, sliced, its integers
and their scales. A layer behind a cut has weights that least squares changed, by 4-bit steps of one size an output
channel (edgesd/compress/widths.py), and that outgrow the widest one's up to fifteen times. Its integers are

    slice * gain + steps * ratio, rounded, held to -127..127

gain, ratio [out]: one of the widest's integers, and a step, in the narrow width's scale. Both are multiples of 1/4096,
so that every runtime's float32 gives the same sum exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from edgesd.compress.groups import Group, find_groups
from edgesd.compress.layouts import WEIGHT_HIGH, grid_of, quantize_weight, weight_scales
from edgesd.compress.quantize import adjusted
from edgesd.compress.quantplan import OWN_INTEGERS, OWN_SCALES, Mode, QuantPlan
from edgesd.compress.widths import LEVELS, narrowed
from edgesd.models.modules import Component
from edgesd.models.plain import share

FINE = 4096  # of what gains and ratios are multiples: sums below 2^9 then need 21 bits of float32's 24


@dataclass(frozen=True, eq=False)
class Correction:
    """How a layer's integers come out of the slice. steps: int8 [out, ...], -7..7; gain, ratio: f32 [out, 1, ...]."""

    steps: np.ndarray
    gain: np.ndarray
    ratio: np.ndarray

    def transposed(self) -> Correction:
        """Of a linear's weight that is stored [in, out]."""
        return Correction(self.steps.T, self.gain.T, self.ratio.T)


@dataclass(frozen=True, eq=False)
class Start:
    """What a plan begins with: changed parameters by path (`adjusted`), smoothing's strengths, layers' first modes.

    corrections: by layer, of those whose integers are not slices alone.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    modes: Mapping[str, Mode] = field(default_factory=dict)
    corrections: Mapping[str, Correction] = field(default_factory=dict)


def behind_cuts(component: Component) -> frozenset[str]:
    """The layers whose input channels a narrow width cuts and whose weights it corrects."""
    return frozenset(group.consumer for group in find_groups(component.module))


def own_integers(component: Component, plan: QuantPlan) -> dict[str, torch.Tensor]:
    """The integers and scales of a planned component's layers, by path, for it to bring: a converter that rounds a
    weight anew may fall to the other side of a half, and then nothing is a slice of what it wrote."""
    made = {}
    for layer in plan.layers:
        if layer.mode != "float":
            given = layer.input.scale if layer.mode == "int8" and layer.input is not None else None
            weight, scales = grid_of(component.module.get_submodule(layer.name), given)
            made[f"{layer.name}.{OWN_INTEGERS}"] = quantize_weight(weight, scales)
            made[f"{layer.name}.{OWN_SCALES}"] = scales
    return made


def from_widest(
    narrow: Component, wide: Component, width: float, plan: QuantPlan, tensors: Mapping[str, torch.Tensor]
) -> Start:
    """How a narrow width's plan begins, given the widest one's plan and the tensors that go with it.

    wide, narrow: in float, as `widths.nest` made them in mode "shared". tensors: `own_integers` among them. The plan
    must have left the columns of `behind_cuts` as they were: a factor an input channel and a scale an output channel do
    not meet in one ratio.
    """
    groups = find_groups(wide.module)
    whole = adjusted(wide, tensors)
    plain: Any = narrowed(whole.module, groups, width)
    others = {f"{layer.name}.{kind}" for layer in plan.layers for kind in ("bias", OWN_INTEGERS, OWN_SCALES)}
    taken = {path: plain.get_parameter(path).data for path in tensors if path not in others}
    stored = {layer.name: tensors[f"{layer.name}.{OWN_INTEGERS}"] for layer in plan.layers if layer.mode != "float"}
    integers = _cut(whole.module, groups, width, stored)
    columns = {name: _beside(tensors[f"{name}.{OWN_SCALES}"], weight) for name, weight in stored.items()}
    scales = {name: cut.flatten(1)[:, 0] for name, cut in _cut(whole.module, groups, width, columns).items()}
    small: Any = adjusted(narrow, taken).module
    corrections = {}
    for name, piece in integers.items():
        layer = small.get_submodule(name)
        delta = layer.weight.detach() - plain.get_submodule(name).weight.detach()
        own = scales[name].contiguous()
        if bool(delta.any()):
            corrections[name], own = _correction(layer.weight.detach(), delta, own)
            piece = torch.from_numpy(corrected(piece.numpy(), corrections[name]))
        taken[f"{name}.{OWN_INTEGERS}"], taken[f"{name}.{OWN_SCALES}"] = piece, own
    return Start(taken, dict(plan.strengths), {layer.name: layer.mode for layer in plan.layers}, corrections)


def corrected(pieces: np.ndarray, correction: Correction) -> np.ndarray:
    """int8 slices with their correction: what a graph's constant operations compute."""
    steps = correction.steps.astype(np.float32)
    sums = pieces.astype(np.float32) * correction.gain + steps * correction.ratio
    return np.clip(np.rint(sums), -WEIGHT_HIGH, WEIGHT_HIGH).astype(np.int8)


def _correction(weight: torch.Tensor, delta: torch.Tensor, scales: torch.Tensor) -> tuple[Correction, torch.Tensor]:
    """What was changed about a weight [out, ...], and the scales [out] of the integers that come of it.

    delta: of LEVELS steps on each side an output channel. scales: the slice's, which grow where the weight outgrew it.
    """
    needed = weight_scales(weight, None, None)
    gain = (scales / needed * FINE).floor().clamp_max(FINE) / FINE
    own = torch.where(gain > 0, scales / gain, needed)
    step = delta.flatten(1).abs().amax(1) / LEVELS
    per_channel = (-1, *[1] * (delta.ndim - 1))
    steps = (delta / step.clamp_min(1e-30).view(per_channel)).round().to(torch.int8)
    ratio = (step / own * FINE).round() / FINE
    return Correction(steps.numpy(), gain.view(per_channel).numpy(), ratio.view(per_channel).numpy()), own


def _beside(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Scales [out] as [out, in, 1, ...], a view: cut as the weight is, they are the slice's."""
    ones = [1] * (weight.ndim - 2)
    return scales.view(-1, 1, *ones).expand(*weight.shape[:2], *ones)


def _cut(
    module: nn.Module, groups: Sequence[Group], width: float, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors that stand for layers' weights, [out, in, ...] by layer, cut as those are."""
    copy: Any = share(module)
    for name, weight in weights.items():
        copy.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    small: Any = narrowed(copy, groups, width)
    return {name: small.get_submodule(name).weight.data for name in weights}


# ---- on disk, between the stages of a build ---------------------------------------------------------------------


def save_corrections(corrections: Mapping[str, Correction], path: Path) -> None:
    save_file({f"{name}/{part}": x for name, one in corrections.items() for part, x in vars(one).items()}, path)


def load_corrections(path: Path) -> list[Correction]:
    """What `save_corrections` wrote."""
    stored = load_file(path)
    names = dict.fromkeys(key.rpartition("/")[0] for key in stored)
    return [Correction(*(stored[f"{name}/{part.name}"] for part in fields(Correction))) for name in names]
