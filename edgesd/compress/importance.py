"""Which units of a group matter: one function per criterion, and what removing them costs.

A criterion turns a group's `Evidence` into scores, the smallest going first; `curve` says what each step of that order
costs, in squared error of the model's own output, so that steps of different groups can be compared (`allocate`).

To add a criterion, write one function here and list it in `IMPORTANCE`; it must beat `random`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from edgesd.compress.evidence import Evidence
from edgesd.compress.moments import RIDGE, factor

SHRINK = 0.8  # of a group's columns left: then the matrices shrink to them


@dataclass(frozen=True)
class Curve:
    """order: units, the first to go in front. errors: squared output error per call once step, 2 step, ... are gone."""

    order: tuple[int, ...]
    errors: tuple[float, ...]


# ---- criteria: scores [units], the smallest goes first ---------------------------------------------------------


def random(evidence: Evidence) -> torch.Tensor:
    """Nothing: the baseline every criterion must beat. The same for the same group."""
    generator = torch.Generator().manual_seed(zlib.crc32(evidence.group.name.encode()))
    return torch.rand(evidence.group.units, generator=generator)


def l1(evidence: Evidence) -> torch.Tensor:
    """Sum of magnitudes over all coupled tensors (Li et al. 2017)."""
    return torch.stack([piece.abs().sum(1) for piece in evidence.pieces]).sum(0)


def l2(evidence: Evidence) -> torch.Tensor:
    """Euclidean norm over all coupled tensors."""
    return torch.stack([piece.square().sum(1) for piece in evidence.pieces]).sum(0).sqrt()


def wanda(evidence: Evidence) -> torch.Tensor:
    """Sum of |W| |x| over the consumer's columns of a unit (Sun et al. 2024, made structured)."""
    scale = evidence.moments.second().diagonal().sqrt()
    return evidence.by_unit(evidence.weight.abs().sum(0) * scale).sum(-1)


def variance(evidence: Evidence) -> torch.Tensor:
    """Variance of what the unit puts out: a head that always says the same can be said by a bias (An et al. 2024)."""
    return evidence.by_unit(evidence.moments.covariance().diagonal()).sum(-1)


def taylor(evidence: Evidence) -> torch.Tensor:
    """First-order change of the denoising loss when the unit's gate closes, summed over calls and so over timesteps."""
    return evidence.taylor


def obs(evidence: Evidence) -> torch.Tensor | None:
    """No scores: at each step goes what costs least after the rest has compensated (Hassibi & Stork 1993)."""
    return None


def merge(evidence: Evidence) -> torch.Tensor | None:
    """Heads whose attention maps have a twin go first, into the twin by least squares; other groups as `obs`.

    Agglomerative: of the most alike pair left, the one that varies less goes. Causal masks are not looked at.
    """
    if not evidence.maps.numel():
        return None
    size, alike = variance(evidence), evidence.maps.clone().fill_diagonal_(-torch.inf)
    scores = torch.full((evidence.group.units,), float(evidence.group.units))
    for rank in range(evidence.group.units - 1):
        a, b = divmod(int(alike.argmax()), len(alike))
        gone = a if size[a] < size[b] else b
        alike[gone, :] = alike[:, gone] = -torch.inf
        scores[gone] = rank
    return scores


Criterion = Callable[[Evidence], "torch.Tensor | None"]
IMPORTANCE: dict[str, Criterion] = {
    "random": random, "l1": l1, "l2": l2, "wanda": wanda, "variance": variance, "taylor": taylor, "obs": obs,
    "merge": merge,
}  # fmt: skip


# ---- what an order costs ----------------------------------------------------------------------------------------


def curve(evidence: Evidence, importance: str, restore: str, ridge: float = RIDGE) -> Curve:
    """The order a criterion gives and its cost step by step, down to the last step that leaves something."""
    scores = IMPORTANCE[importance](evidence)
    order = None if scores is None else scores.argsort(stable=True).tolist()
    if restore == "ls" or order is None:
        restored = _restored(evidence, order, ridge)
        if restore == "ls":
            return restored
        order = list(restored.order)
    return _unrestored(evidence, order, centred=restore == "bias")


def _restored(evidence: Evidence, order: list[int] | None, ridge: float) -> Curve:
    """Cost when the rest compensates: with H the inverse covariance, taking R out costs tr(W_R H_RR^-1 W_R^T)."""
    group, weight = evidence.group, evidence.weight.clone()
    inverse = torch.cholesky_inverse(factor(evidence.moments.covariance(), ridge))
    size = weight.shape[1] // group.units
    here = list(range(group.units))  # units whose columns the matrices hold
    left = list(range(group.units))  # places in `here` that are not gone
    gone: list[int] = []
    errors: list[float] = []
    while len(left) > group.step:
        if order is None:
            pick = _cheapest(inverse, weight, left, size, group.step)
        else:
            pick = [here.index(unit) for unit in order[len(gone) : len(gone) + group.step]]
        columns = _unit_columns(pick, size)
        block, removed = inverse[columns][:, columns], weight[:, columns]
        share = torch.linalg.solve(block, removed.T)
        errors.append((errors[-1] if errors else 0.0) + max(0.0, float((removed.T * share).sum())))
        across = inverse[:, columns]
        weight -= (across @ share).T
        inverse -= across @ torch.linalg.solve(block, across.T)
        gone += [here[place] for place in pick]
        left = [place for place in left if place not in set(pick)]
        if len(left) <= SHRINK * len(here):  # what is gone is zero from here on
            columns = _unit_columns(left, size)
            inverse, weight = inverse[columns][:, columns], weight[:, columns]
            here, left = [here[place] for place in left], list(range(len(left)))
    rest = [here[place] for place in left] if order is None else order[len(gone) :]
    return Curve((*gone, *rest), tuple(e * evidence.positions for e in errors))


def _cheapest(inverse: torch.Tensor, weight: torch.Tensor, left: list[int], size: int, step: int) -> list[int]:
    columns = _unit_columns(left, size).view(len(left), size)
    blocks = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
    removed = weight[:, columns].permute(1, 2, 0)
    costs = (removed * torch.linalg.solve(blocks, removed)).sum((1, 2))
    return [left[i] for i in costs.argsort(stable=True)[:step].tolist()]


def _unit_columns(units: Sequence[int], size: int) -> torch.Tensor:
    return (torch.tensor(list(units)).unsqueeze(1) * size + torch.arange(size)).flatten()


def _unrestored(evidence: Evidence, order: list[int], centred: bool) -> Curve:
    """Cost when nothing compensates, or the mean alone does: tr(W_R M_RR W_R^T)."""
    group, weight, sums = evidence.group, evidence.weight, evidence.moments
    second = sums.covariance() if centred else sums.second()
    size = weight.shape[1] // group.units
    lost = torch.zeros_like(weight)
    errors: list[float] = []
    for at in range(0, group.units - group.step, group.step):
        columns = _unit_columns(order[at : at + group.step], size)
        own = weight[:, columns] @ second[columns]
        cost = 2 * (lost[:, columns] * weight[:, columns]).sum() + (own[:, columns] * weight[:, columns]).sum()
        errors.append((errors[-1] if errors else 0.0) + float(cost))
        lost += own
    return Curve(tuple(order), tuple(e * evidence.positions for e in errors))
