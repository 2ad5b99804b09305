"""What flows through a component's layers over recorded calls, and the int8 grid that serves each tensor best.

Three passes over the calls, nothing of an activation kept: extents (per channel, per timestep band), histograms within
them, and the layer's own output error under each candidate grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgesd.compress.calls import Batch
from edgesd.compress.layouts import dequantized_weight, grid_of
from edgesd.compress.moments import require_finite
from edgesd.compress.quantize import quantizable
from edgesd.compress.quantplan import HIGH, LOW, Scale
from edgesd.models.modules import Component

BANDS = 4  # of timesteps, for the report
BINS = 2048
TAILS = {"percentile 99.99": 1e-4, "percentile 99.9": 1e-3}
SHRINKS = torch.linspace(0.3, 1.0, 29)  # of each end of the range, searched for the least squared error
Arrive = Callable[[str, Any, torch.Tensor, torch.Tensor], None]


@dataclass(eq=False)
class Extent:
    """Least and greatest values a layer met. low, high [input channels]; output: of the whole tensor.

    bands: (least, greatest) input by timestep band, where the band was met.
    """

    low: torch.Tensor
    high: torch.Tensor
    output: tuple[float, float]
    bands: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Grids:
    """A layer's chosen grids. method: how the input's range was found. error: of the layer's output, squared, relative.

    shift, weight_shift [out]: the mean output error with the input quantized, and with the weight alone: what a bias
    has to make good.
    """

    input: Scale
    output: Scale
    method: str
    error: float
    shift: torch.Tensor
    weight_shift: torch.Tensor


def call(component: Component, batch: Batch) -> tuple[torch.Tensor, ...]:
    """The component's outputs for a batch of calls, nothing recorded for gradients."""
    with torch.inference_mode():
        made = component.module(*(batch.inputs[spec.name] for spec in component.inputs))
    return made if isinstance(made, tuple) else (made,)


def levels(batch: Batch, count: int) -> torch.Tensor:
    """[rows] which of `count` equal bands of timesteps 0..1000 each row lies in; 0 where there is no timestep."""
    time = batch.inputs.get("timestep")
    if time is None:
        return torch.zeros(len(next(iter(batch.inputs.values()))), dtype=torch.long)
    return (time * (count / 1000)).long().clamp(0, count - 1)


@contextmanager
def watching(component: Component, names: Sequence[str], arrive: Arrive) -> Iterator[None]:
    """Calls arrive(name, layer, input, output) whenever one of the layers runs."""
    with ExitStack() as hooks:
        for name in names:

            def hook(layer: nn.Module, inputs: tuple, output: torch.Tensor, name: str = name) -> None:
                arrive(name, layer, inputs[0], output)

            hooks.enter_context(component.module.get_submodule(name).register_forward_hook(hook))
        yield


def channel_last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer's input as [rows, ..., channels]."""
    return x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x


# ---- the passes -------------------------------------------------------------------------------------------------


def extents(component: Component, batches: Sequence[Batch]) -> dict[str, Extent]:
    """By layer, in the order of execution. Raises DataError, naming layer and step, for values that are not finite."""
    found: dict[str, Extent] = {}
    now = batches[0]

    def arrive(name: str, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        require_finite(f"{name} ({_steps(now, x, y)})", x, y)
        channels = channel_last(layer, x).flatten(0, -2)
        low, high = channels.aminmax(dim=0)
        out = float(y.min()), float(y.max())
        if name in found:
            old = found[name]
            low, high = torch.minimum(low, old.low), torch.maximum(high, old.high)
            out = min(out[0], old.output[0]), max(out[1], old.output[1])
        bands = found[name].bands if name in found else {}
        rows_low, rows_high = x.flatten(1).aminmax(dim=1)
        for band in levels(now, BANDS).unique().tolist():
            mine = levels(now, BANDS) == band
            ends = float(rows_low[mine].min()), float(rows_high[mine].max())
            known = bands.get(band, ends)
            bands[band] = min(ends[0], known[0]), max(ends[1], known[1])
        found[name] = Extent(low, high, out, bands)

    with watching(component, list(quantizable(component.module)), arrive):
        for batch in batches:
            now = batch
            call(component, batch)
    return found


def _steps(batch: Batch, *tensors: torch.Tensor) -> str:
    """The steps of the rows that hold values that are not finite."""
    bad = torch.zeros(len(tensors[0]), dtype=torch.bool)
    for x in tensors:
        bad |= ~torch.isfinite(x).flatten(1).all(1)
    steps = [batch.steps[row % len(batch.steps)] for row in bad.nonzero().flatten().tolist()]
    return "step " + ", ".join(str(step + 1) for step in sorted(set(steps))[:5])


def choose(
    component: Component, batches: Sequence[Batch], found: Mapping[str, Extent], names: Sequence[str]
) -> dict[str, Grids]:
    """Grids by layer: the input's range by least error of the layer's output, the output's by least squared error."""
    counts = _histograms(component, batches, found, names)
    offered = {name: candidates(*counts[name][0]) for name in names}
    trials: dict[str, _Trials] = {}

    def arrive(name: str, layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        if name not in trials:
            trials[name] = _Trials(layer, offered[name])
        trials[name].add(layer, x, y)

    with watching(component, names, arrive):
        for batch in batches:
            call(component, batch)
    return {name: trials[name].best(best_grid(*counts[name][1])) for name in names}


def _histograms(
    component: Component, batches: Sequence[Batch], found: Mapping[str, Extent], names: Sequence[str]
) -> dict[str, tuple[tuple[torch.Tensor, float, float], tuple[torch.Tensor, float, float]]]:
    """(counts [BINS], low, high) of each layer's input and output; of what a ReLU behind it takes next, if one does."""
    cut = {name for name in _rectified(component.module) if name in found and found[name].output[1] > 0}
    ends = {
        name: ((float(e.low.min()), float(e.high.max())), (0.0 if name in cut else e.output[0], e.output[1]))
        for name, e in found.items()
    }
    counts = {name: (torch.zeros(BINS), torch.zeros(BINS)) for name in names}

    def arrive(name: str, layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        for side, tensor in enumerate((x, y.clamp_min(0.0) if name in cut else y)):
            low, high = ends[name][side]
            if high > low:
                counts[name][side].add_(torch.histc(tensor, BINS, low, high))

    with watching(component, names, arrive):
        for batch in batches:
            call(component, batch)
    return {name: tuple((counts[name][i], *ends[name][i]) for i in (0, 1)) for name in names}  # type: ignore[misc]


def _rectified(module: nn.Module) -> set[str]:
    """Layers whose output goes through a ReLU and nowhere else: a grid of their output need not hold what that cuts."""
    return {
        f"{path}.{i}" if path else str(i)
        for path, chain in module.named_modules()
        if isinstance(chain, nn.Sequential)
        for i in range(len(chain) - 1)
        if isinstance(chain[i], nn.Conv2d | nn.Linear) and isinstance(chain[i + 1], nn.ReLU)
    }


class _Trials:
    """A layer's output error under each candidate grid of its input, and with its weight alone on a grid.

    Rounded weights are made anew for each batch: kept, they would come to a model more.
    """

    def __init__(self, layer: Any, offered: Mapping[str, Scale]) -> None:
        self.offered: dict[str, Scale | None] = {**offered, "": None}
        self.errors = dict.fromkeys(self.offered, 0.0)
        self.shifts = {name: torch.zeros(len(layer.weight)) for name in self.offered}
        self.energy, self.rows = 0.0, 0

    def add(self, layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        self.energy += float(y.square().sum())
        self.rows += y.numel() // len(layer.weight)
        axes = tuple(i for i in range(y.ndim) if i != (1 if isinstance(layer, nn.Conv2d) else y.ndim - 1))
        weight, scales = layer.weight, None
        for name, grid in self.offered.items():
            exact, wanted = grid_of(layer, None if grid is None else grid.scale)
            if scales is None or not torch.equal(scales, wanted):
                weight, scales = dequantized_weight(exact, wanted), wanted
            missing = y - functional(layer, x if grid is None else on_grid(x, grid), weight)
            self.errors[name] += float(missing.square().sum())
            self.shifts[name] += missing.sum(axes)

    def best(self, output: Scale) -> Grids:
        grids = {name: grid for name, grid in self.offered.items() if grid is not None}
        method = min(grids, key=lambda name: self.errors[name])
        error = self.errors[method] / max(self.energy, 1e-30)
        shift, weight_shift = (self.shifts[name] / self.rows for name in (method, ""))
        return Grids(grids[method], output, method, error, shift, weight_shift)


def functional(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The layer with another weight."""
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        return nn.functional.conv2d(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)
    return nn.functional.linear(x, weight, layer.bias)


# ---- grids ------------------------------------------------------------------------------------------------------


def grid(low: float, high: float) -> Scale:
    """The int8 grid over low..high; 0, which pads convolutions, is always on it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / (HIGH - LOW), 1e-12)
    return Scale(scale=scale, zero_point=max(LOW, min(HIGH, round(LOW - low / scale))))


def on_grid(x: torch.Tensor, scale: Scale) -> torch.Tensor:
    """x rounded to the grid, as floats."""
    return torch.fake_quantize_per_tensor_affine(x, scale.scale, scale.zero_point, LOW, HIGH)


def candidates(counts: torch.Tensor, low: float, high: float) -> dict[str, Scale]:
    """Grids worth trying for a tensor of this histogram, by the name of their method."""
    found = {"min-max": grid(low, high)}
    if high > low:
        share = counts.cumsum(0) / counts.sum()
        edges = torch.linspace(low, high, BINS + 1)
        for name, tail in TAILS.items():
            ends = torch.searchsorted(share, torch.tensor([tail / 2, 1 - tail / 2])).clamp(max=BINS - 1)
            found[name] = grid(float(edges[ends[0]]), float(edges[ends[1] + 1]))
        found["mse"] = best_grid(counts, low, high)
    return found


def best_grid(counts: torch.Tensor, low: float, high: float) -> Scale:
    """The grid of least squared error over a histogram: each end of the range is shrunk in turn."""
    if high <= low:
        return grid(low, high)
    centres = low + (torch.arange(BINS) + 0.5) * ((high - low) / BINS)
    ends = [low, high]
    for side in (0, 1, 0, 1):
        tried = [[shrink * ends[0], ends[1]] if side == 0 else [ends[0], shrink * ends[1]] for shrink in SHRINKS]
        ends = min(tried, key=lambda pair: _squared_error(counts, centres, grid(*map(float, pair))))
        if side == 1:
            low, high = map(float, ends)
    return grid(float(ends[0]), float(ends[1]))


def _squared_error(counts: torch.Tensor, centres: torch.Tensor, scale: Scale) -> float:
    """Of rounding and clipping each bin's centre; peaked tensors lie mostly where a coarse grid is exact, at 0."""
    return float((counts * (centres - on_grid(centres, scale)).square()).sum())
