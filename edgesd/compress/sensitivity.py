"""Which layers int8 hurts: one at a time, by one step's output error, and stepping back where a gate asks it.

Ranking one layer at a time and stepping back worst first follows Apple's recipe for Stable Diffusion's activations
(ml-stable-diffusion, activation_quantization.py); here a layer first becomes weight-only, then float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from edgesd.compress.calls import Batch
from edgesd.compress.observe import call, levels
from edgesd.compress.quantize import quantized
from edgesd.compress.quantplan import Mode, QuantPlan, Sensitivity
from edgesd.errors import GateError
from edgesd.models.modules import Component

LEVELS = 10  # equal bands of timesteps: the noise levels that a gate holds at
STEP = 0.04  # of the layers, stepped back between two looks at the gate
Build = Callable[[QuantPlan], Component]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Truth:
    """The float answers to some calls, to hold others against."""

    batches: Sequence[Batch]
    outputs: list[tuple[torch.Tensor, ...]]

    @classmethod
    def of(cls, component: Component, batches: Sequence[Batch]) -> Truth:
        return cls(batches, [call(component, batch) for batch in batches])

    def errors(self, component: Component) -> dict[int, float]:
        """Noise level -> squared error of the outputs over their energy; of several outputs the mean."""
        sums: dict[int, torch.Tensor] = {}
        for batch, wanted in zip(self.batches, self.outputs, strict=True):
            level = levels(batch, LEVELS)
            for i, (truth, got) in enumerate(zip(wanted, call(component, batch), strict=True)):
                error, energy = ((x.double() ** 2).flatten(1).sum(1) for x in (got - truth, truth))
                for at in level.unique().tolist():
                    table = sums.setdefault(at, torch.zeros(len(wanted), 2, dtype=torch.float64))
                    table[i] += torch.stack([error[level == at].sum(), energy[level == at].sum()])
        return {at: float((t[:, 0] / t[:, 1].clamp_min(1e-30)).mean()) for at, t in sorted(sums.items())}

    def snr_db(self, component: Component) -> dict[int, float]:
        """Noise level -> dB."""
        return {at: decibels(error) for at, error in self.errors(component).items()}


def decibels(error: float) -> float:
    """Of a relative squared error; at most 200."""
    return 200.0 if error <= 1e-20 else -10 * math.log10(error)


def rank(component: Component, plan: QuantPlan, truth: Truth, progress: Progress) -> tuple[Sensitivity, ...]:
    """The layers that the plan quantizes, the worst first, each quantized alone."""
    layers = [layer for layer in plan.layers if layer.mode != "float"]
    found = []
    for done, layer in enumerate(layers):
        alone = quantized(component, plan.model_copy(update={"layers": (layer,)}), "simulated")
        errors = truth.errors(alone).values()
        error = sum(errors) / len(errors)
        found.append(Sensitivity(name=layer.name, snr_db=round(decibels(error), 2)))
        progress("sensitivity", done + 1, len(layers))
    return tuple(sorted(found, key=lambda one: one.snr_db))


def hold(plan: QuantPlan, build: Build, truth: Truth, gate_db: float) -> tuple[QuantPlan, dict[int, float]]:
    """The plan with as many layers stepped back, worst first, as the gate needs; and what it reached by noise level.

    An int8 layer becomes weight-only, a weight-only one float; each steps back once. Raises GateError
    where nothing is left in the plan's precision.
    """
    kept: Mode = "w8" if plan.precision == "w8" else "int8"
    left = [one.name for one in plan.sensitivities]
    while True:
        reached = truth.snr_db(build(plan))
        if min(reached.values()) >= gate_db:
            return plan, reached
        modes = {layer.name: layer.mode for layer in plan.layers}
        if kept not in modes.values():
            raise GateError(
                f"{plan.component} reaches {min(reached.values()):.1f} dB with nothing left in {plan.precision}",
                f"the gate, {gate_db:g} dB at every noise level", "Lower --gate-db, or choose another --precision",
            )  # fmt: skip
        count = _count(plan, left, min(reached.values()), gate_db)
        for name in left[:count]:
            mode: Mode = "w8" if modes[name] == "int8" else "float"
            plan = plan.with_mode(name, mode, f"gate of {gate_db:g} dB")
        left = left[count:]


def _count(plan: QuantPlan, left: Sequence[str], reached_db: float, gate_db: float) -> int:
    """How many to step back now: what the layers' own errors foretell, at most a small share, at least one."""
    errors = {one.name: 10 ** (-one.snr_db / 10) for one in plan.sensitivities}
    surplus = sum(errors[name] for name in left) * (1 - 10 ** ((reached_db - gate_db) / 10))
    count = 0
    while surplus > 0 and count < len(left):
        surplus -= errors[left[count]]
        count += 1
    return max(1, min(count, math.ceil(STEP * len(left))))
