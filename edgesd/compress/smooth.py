"""SmoothQuant (Xiao et al. 2022) where it costs nothing at run time: outliers move from activations into weights.

x W = (x / s) (s W): where what makes x can be divided by s exactly, one channel at a time, the division is folded into
its weights. Norms with gains, the value half of attention and of GEGLU, and what lies before a ReLU can be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgesd.compress.calls import Batch
from edgesd.compress.layouts import dequantized_weight, weight_scales
from edgesd.compress.observe import Extent, call, functional, grid, on_grid, watching
from edgesd.models.modules import Component
from edgesd.models.plain import share

STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8, 0.95)  # 0: leave as it is
LIMIT = 1e3  # of a factor


@dataclass(frozen=True)
class Fold:
    """Channels that may be rescaled. source: a module whose weight and bias make them, its first `rows` alone.

    consumers: all layers that read them.
    """

    source: str
    rows: int
    consumers: tuple[str, ...]


def find_folds(module: nn.Module) -> list[Fold]:
    """Every exact fold of a component's module: diffusers' UNets and VAEs, CLIP's towers, tiny VAEs."""
    found: list[Fold] = []
    for path, layer in module.named_modules():
        found += [
            Fold(f"{path}.{source}" if path else source, rows, tuple(f"{path}.{c}" if path else c for c in consumers))
            for source, rows, consumers in _inside(layer)
        ]
    return [fold for fold in found if _affine(module.get_submodule(fold.source))]


def _inside(layer: Any) -> list[tuple[str, int, tuple[str, ...]]]:
    """(source, rows, consumers) of the folds whose nearest common module is this one, by relative paths."""
    names = {name for name, _ in layer.named_children()}
    folds: list[tuple[str, int, tuple[str, ...]]] = []
    if {"norm1", "attn1", "norm3", "ff"} <= names and not getattr(layer, "only_cross_attention", False):
        folds.append(("norm1", _width(layer.norm1), ("attn1.to_q", "attn1.to_k", "attn1.to_v")))
        if getattr(layer, "attn2", None) is not None:  # its keys and values see the text
            folds.append(("norm2", _width(layer.norm2), ("attn2.to_q",)))
        folds.append(("norm3", _width(layer.norm3), ("ff.net.0.proj",)))
        if type(layer.ff.net[0]).__name__ in ("Gate", "GEGLU"):
            folds.append(("ff.net.0.proj", layer.ff.net[2].in_features, ("ff.net.2",)))
    if {"norm", "proj_in"} <= names:
        folds.append(("norm", _width(layer.norm), ("proj_in",)))
    if {"to_q", "to_v", "to_out"} <= names:
        folds.append(("to_v", layer.to_v.out_features, ("to_out.0",)))
        if getattr(layer, "group_norm", None) is not None:
            folds.append(("group_norm", _width(layer.group_norm), ("to_q", "to_k", "to_v")))
    if {"layer_norm1", "self_attn", "layer_norm2", "mlp"} <= names:
        heads = tuple(f"self_attn.{name}_proj" for name in "qkv")
        folds.append(("layer_norm1", _width(layer.layer_norm1), heads))
        folds.append(("layer_norm2", _width(layer.layer_norm2), ("mlp.fc1",)))
        folds.append(("self_attn.v_proj", layer.self_attn.v_proj.out_features, ("self_attn.out_proj",)))
    if isinstance(layer, nn.Sequential):
        kinds = [type(child) for child in layer]
        for i in range(len(kinds) - 2):
            if kinds[i : i + 3] == [nn.Conv2d, nn.ReLU, nn.Conv2d]:
                folds.append((str(i), layer[i].out_channels, (str(i + 2),)))  # type: ignore[arg-type]
    return folds


def _width(norm: Any) -> int:
    return len(norm.weight) if getattr(norm, "weight", None) is not None else 0


def _affine(source: Any) -> bool:
    return getattr(source, "weight", None) is not None


def smooth(
    component: Component, batches: Sequence[Batch], found: Mapping[str, Extent], kept: Collection[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(changed parameters by path, strength chosen by source): per fold the strength of least error of its consumers.

    found: `extents` of the component as it is. kept: layers whose columns stay. A fold that smoothing does not help is
    left alone.
    """
    folds = [fold for fold in find_folds(component.module) if _seen(fold, found) and not {*fold.consumers} & {*kept}]
    trials = {fold: _trials(component, fold, found) for fold in folds}
    by_consumer = {name: trial for fold, trial in trials.items() for name in fold.consumers}

    def arrive(name: str, layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        for trial in by_consumer[name]:
            scaled = layer.weight.detach() * _along_columns(trial.factors, layer.weight)
            weight = dequantized_weight(scaled, weight_scales(scaled, layer.bias, trial.grid.scale))
            rounded = functional(layer, on_grid(x / _along_input(layer, trial.factors, x.ndim), trial.grid), weight)
            trial.error += float((y - rounded).square().sum()) / trial.energy.setdefault(name, float(y.square().sum()))

    with watching(component, list(by_consumer), arrive):
        for batch in batches:
            call(component, batch)
    best = {fold: min(tried, key=lambda trial: trial.error) for fold, tried in trials.items()}
    strengths = {fold.source: trial.strength for fold, trial in best.items()}
    return fold_in(component, {fold: t.factors for fold, t in best.items() if t.strength > 0}), strengths


def fold_in(component: Component, factors: Mapping[Fold, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters, by path, with each source's channels divided and its consumers' columns multiplied; nothing else."""
    module: Any = share(component.module)
    changed: dict[str, torch.Tensor] = {}

    def scale(path: str, name: str, factor: torch.Tensor) -> None:
        layer = module.get_submodule(path)
        old = getattr(layer, name, None)
        if old is not None:
            changed[f"{path}.{name}"] = (old.detach().double() * factor).float()
            setattr(layer, name, nn.Parameter(changed[f"{path}.{name}"], requires_grad=False))

    for fold, s in factors.items():
        source = module.get_submodule(fold.source)
        rows = torch.ones(len(source.weight), dtype=torch.float64)
        rows[: fold.rows] = 1 / s.double()
        scale(fold.source, "weight", rows.view(-1, *[1] * (source.weight.ndim - 1)))
        scale(fold.source, "bias", rows)
        for path in fold.consumers:
            scale(path, "weight", _along_columns(s.double(), module.get_submodule(path).weight))
    return changed


@dataclass(eq=False)
class _Trial:
    """One strength of one fold."""

    strength: float
    factors: torch.Tensor
    grid: Any
    energy: dict[str, float]
    error: float = 0.0


def _seen(fold: Fold, found: Mapping[str, Extent]) -> bool:
    return fold.rows > 0 and all(name in found for name in fold.consumers)


def _trials(component: Component, fold: Fold, found: Mapping[str, Extent]) -> list[_Trial]:
    layers: dict[str, Any] = {name: component.module.get_submodule(name) for name in fold.consumers}
    seen = found[fold.consumers[0]]
    largest = torch.maximum(seen.low.abs(), seen.high.abs())
    columns = torch.stack([layer.weight.detach().abs().transpose(0, 1).flatten(1).amax(1) for layer in layers.values()])
    made = []
    for strength in STRENGTHS:
        s = factors(largest, columns.amax(0), strength)
        scale = grid(float((seen.low / s).min()), float((seen.high / s).max()))
        made.append(_Trial(strength, s, scale, {}))
    return made


def factors(largest: torch.Tensor, columns: torch.Tensor, strength: float) -> torch.Tensor:
    """max|x_j|^a / max|W_j|^(1-a) [channels], scaled to a geometric mean of 1; 1 for channels that are never used."""
    if strength == 0:
        return torch.ones_like(largest)
    used = (largest > 0) & (columns > 0)
    logs = strength * largest.clamp_min(1e-30).log() - (1 - strength) * columns.clamp_min(1e-30).log()
    logs = torch.where(used, logs - logs[used].mean(), 0.0) if bool(used.any()) else torch.zeros_like(logs)
    return logs.exp().clamp(1 / LIMIT, LIMIT)


def _along_columns(s: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return s.view(1, -1, *[1] * (weight.ndim - 2))


def _along_input(layer: Any, s: torch.Tensor, ndim: int) -> torch.Tensor:
    return s.view(1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else s.view(*[1] * (ndim - 1), -1)
