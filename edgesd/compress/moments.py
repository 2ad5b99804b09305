"""Second moments of a layer's inputs, and the least-squares problems they answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgesd.errors import DataError

RIDGE = 1e-3
WORK = 1e12  # multiply-adds that one layer's second moments may take: beyond, fewer positions of each call count
ROWS_PER_COLUMN = 4  # fewer rows than this do not tell a layer's columns apart


@dataclass(frozen=True)
class View:
    """How a layer's inputs become rows. unfolded: each tap of a convolution is a column, else each channel.

    stride: of the positions of each call, every which counts.
    """

    columns: int
    unfolded: bool
    stride: int

    def features(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A layer's input as rows: [N, columns]."""
        return self.thin(features(layer, x) if self.unfolded else rows(layer, x), len(x))

    def thin(self, found: torch.Tensor, calls: int) -> torch.Tensor:
        """Rows [calls * positions, K] with the positions that count."""
        return found if self.stride == 1 else found.unflatten(0, (calls, -1))[:, :: self.stride].flatten(0, 1)


def view(layer: Any, inputs: int, total: float) -> View:
    """The fullest view that `total` rows can fill within `WORK`. inputs: channels that come in.

    SD 1.5's widest resnets have 11,520 unfolded inputs and, with 64 recorded calls, 6,000 to 25,000 rows: too few to
    tell so many apart. By channel there are 1,280.
    """
    taps = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
    for columns in dict.fromkeys((inputs * taps, inputs)):
        stride = max(1, math.ceil(total * columns**2 / WORK))
        if columns == inputs or total / stride >= ROWS_PER_COLUMN * columns:
            break
    return View(columns, columns == inputs * taps, stride)


def count_rows(batches: Sequence[Any], batch: Any, rows_of_batch: int) -> float:
    """Rows that all batches bring, where one of them brings so many before guidance mixes its halves."""
    calls = sum(len(b.weight) * (3 if b.pairs else 1) for b in batches)
    return rows_of_batch / (len(batch.weight) * (2 if batch.pairs else 1)) * calls


def features(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer's input as rows of the products it sums: [N, columns of the flattened weight]."""
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding  # numbers in these models, though a convolution may have words there
        unfolded = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
        return unfolded.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def rows(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """A layer's output as rows that match `features`: [N, out]."""
    return y.flatten(2).transpose(1, 2).flatten(0, 1) if isinstance(layer, nn.Conv2d) else y.flatten(0, -2)


def require_finite(name: str, *tensors: torch.Tensor) -> None:
    """Raises DataError that names the layer if anything is NaN or infinite."""
    if not all(bool(torch.isfinite(x).all()) for x in tensors):
        raise DataError(
            f"activations at {name} that are not finite", "finite values", "Check the model and the calibration set"
        )


class Moments:
    """Sums over rows of 1, x, x x^T, and with targets y, x y^T; float32, as long as the calls are few millions of rows.

    x and y are counted from the mean of the first rows (`origin`): a column that hardly varies about a large mean, such
    as a head that attends to everything alike, would be lost in the rounding of its squares.
    Memory: inputs^2 floats. SD 1.5's widest layer has 11,520 unfolded inputs: 0.5 GB, and twice 1.1 GB while solved.
    """

    def __init__(self, inputs: int, outputs: int = 0) -> None:
        self._gram, self._x = torch.zeros(inputs, inputs), torch.zeros(inputs)
        self._cross, self._y = torch.zeros(inputs, outputs), torch.zeros(outputs)
        self._origin: tuple[torch.Tensor, torch.Tensor] | None = None
        self.weight, self.rows = 0.0, 0

    @property
    def columns(self) -> int:
        return len(self._x)

    def add(self, one: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Rows scaled by the root of their weight: one [N, 1] is what 1 became, x [N, inputs], y [N, outputs]."""
        if self._origin is None:
            total = one.square().sum().clamp_min(1e-30)
            self._origin = (x.T @ one[:, 0]) / total, self._y if y is None else (y.T @ one[:, 0]) / total
        x = x - one * self._origin[0]
        self._gram.addmm_(x.T, x)
        self._x.addmv_(x.T, one[:, 0])
        self.weight += float(one.square().sum())
        self.rows += len(x)
        if y is not None:
            y = y - one * self._origin[1]
            self._cross.addmm_(x.T, y)
            self._y.addmv_(y.T, one[:, 0])

    def mean(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of x [inputs] and y [outputs], float64."""
        x, y = (0, 0) if self._origin is None else (origin.double() for origin in self._origin)
        return self._x.double() / self.weight + x, self._y.double() / self.weight + y

    def covariance(self) -> torch.Tensor:
        """Mean of (x - mean)(x - mean)^T per unit of weight, float64."""
        drift = self._x.double() / self.weight
        return (self._gram.double() / self.weight).addr_(drift, drift, alpha=-1)

    def second(self) -> torch.Tensor:
        """Mean of x x^T per unit of weight, float64."""
        mean = self.mean()[0]
        return self.covariance().addr_(mean, mean)

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """D [outputs, inputs], b [outputs], float64, that minimise |y - D x - b|^2 + ridge * mean diagonal * |D|^2."""
        mean_x, mean_y = self.mean()
        drift_x, drift_y = self._x.double() / self.weight, self._y.double() / self.weight
        cross = (self._cross.double() / self.weight).addr_(drift_x, drift_y, alpha=-1)
        solved = torch.cholesky_solve(cross, factor(self.covariance(), ridge))
        return solved.T, mean_y - mean_x @ solved


def factor(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor of covariance + ridge * its mean diagonal; `covariance` is overwritten.

    Raises DataError where that is not positive: too few calls for the ridge, or broken values.
    """
    covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-12)
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise DataError(
            "second moments that cannot be solved", f"enough calls for a ridge of {ridge:g}", "Record more calls"
        )
    return lower
