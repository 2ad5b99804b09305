"""Which layers int8 hurts: one at a time, by one step's output error, and stepping back where a gate asks it.

Ranking one layer at a time and stepping back worst first follows Apple's recipe for Stable Diffusion's activations
(ml-stable-diffusion, activation_quantization.py); here a layer first becomes weight-only, then float, and the ranks
of all layers come from the same few backward passes: SD 1.5 has 280 layers, and a call for each takes hours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from edgesd.compress.calls import Batch
from edgesd.compress.layouts import LAYOUTS
from edgesd.compress.observe import call, levels
from edgesd.compress.quantplan import LayerPlan, Mode, QuantPlan, Sensitivity
from edgesd.errors import GateError
from edgesd.models.modules import Component

# Random rows that ranks rest on: an estimated squared error is within 18 % (one standard deviation, 0.7 dB).
PROBES = 64
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
        errors: dict[int, float] = {}
        for batch, wanted, shares in zip(self.batches, self.outputs, self.shares, strict=True):
            level = levels(batch, LEVELS)
            for truth, got, share in zip(wanted, call(component, batch), shares, strict=True):
                error = _squares(got - truth) * share
                for at in level.unique().tolist():
                    errors[at] = errors.get(at, 0.0) + float(error[level == at].sum())
        return dict(sorted(errors.items()))

    @cached_property
    def shares(self) -> list[list[torch.Tensor]]:
        """By batch and output: what a row's squared error is multiplied with to add up to its level's, [rows]."""
        energy: defaultdict[tuple[int, int], float] = defaultdict(float)
        by_row = [levels(batch, LEVELS).tolist() for batch in self.batches]
        for level, outputs in zip(by_row, self.outputs, strict=True):
            for i, truth in enumerate(outputs):
                for at, squares in zip(level, _squares(truth).tolist(), strict=True):
                    energy[at, i] += squares
        return [
            [torch.tensor([1 / max(energy[at, i] * len(outputs), 1e-30) for at in level]) for i in range(len(outputs))]
            for level, outputs in zip(by_row, self.outputs, strict=True)
        ]

    def snr_db(self, component: Component) -> dict[int, float]:
        """Noise level -> dB."""
        return {at: decibels(error) for at, error in self.errors(component).items()}


def _squares(x: torch.Tensor) -> torch.Tensor:
    """Of each row, summed in float64."""
    return (x.double() ** 2).flatten(1).sum(1)


def decibels(error: float) -> float:
    """Of a relative squared error; at most 200."""
    return 200.0 if error <= 1e-20 else -10 * math.log10(error)


def rank(component: Component, plan: QuantPlan, truth: Truth, progress: Progress) -> tuple[Sensitivity, ...]:
    """The layers that the plan quantizes, the worst first, each quantized alone: to first order, and estimated.

    A layer's own error e reaches the output as J e. With v normal, E (v^T J e)^2 = |J e|^2 (Hutchinson 1990), and one
    backward pass from v gives v^T J for every layer at once; rows of a batch are told apart. The same seed, the same
    ranks.
    """
    layers = {layer.name: layer for layer in plan.layers if layer.mode != "float"}
    found = dict.fromkeys(layers, 0.0)
    noise_levels = len({at for batch in truth.batches for at in levels(batch, LEVELS).tolist()})
    passes = math.ceil(PROBES / sum(len(outputs[0]) for outputs in truth.outputs))
    generator = torch.Generator().manual_seed(0)
    for done, (batch, shares) in enumerate(zip(truth.batches, truth.shares, strict=True)):
        outputs, seen = _with_errors(component, layers, batch)
        for probe in range(passes):
            pulled = [
                (y * torch.randn(y.shape, generator=generator)).flatten(1).sum(1) @ share.sqrt()
                for y, share in zip(outputs, shares, strict=True)
            ]
            for name, dots in _reached(pulled, seen, last=probe == passes - 1).items():
                found[name] += float(dots.square().sum()) / (passes * noise_levels)
            progress("sensitivity", done * passes + probe + 1, len(truth.batches) * passes)
    told = (Sensitivity(name=name, snr_db=round(decibels(error), 2)) for name, error in found.items())
    return tuple(sorted(told, key=lambda one: one.snr_db))


Seen = list[tuple[str, torch.Tensor, torch.Tensor]]  # layer, its output, what quantizing it alone adds to that


def _with_errors(
    component: Component, layers: Mapping[str, LayerPlan], batch: Batch
) -> tuple[tuple[torch.Tensor, ...], Seen]:
    """A batch's outputs with their graph, and its layers as they ran."""
    seen: Seen = []

    def hook(layer: torch.nn.Module, inputs: tuple, made: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        with torch.no_grad():
            error = LAYOUTS["simulated"](layer, plan, False).finish()(inputs[0]) - made
        made = made if made.requires_grad else made.detach().requires_grad_(True)  # a graph begins here
        seen.append((plan.name, made, error))
        return made

    with ExitStack() as hooks, torch.enable_grad():
        for name, plan in layers.items():
            layer = component.module.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(partial(hook, plan=plan)))
        made = component.module(*(batch.inputs[spec.name] for spec in component.inputs))
    return made if isinstance(made, tuple) else (made,), seen


def _reached(pulled: Sequence[torch.Tensor], seen: Seen, last: bool) -> dict[str, torch.Tensor]:
    """By layer: what its error adds to `pulled`, to first order, [rows]. last: the graph is not needed again."""
    gradients = torch.autograd.grad(pulled, [made for _, made, _ in seen], retain_graph=not last, allow_unused=True)
    dots: dict[str, torch.Tensor] = {}
    for (name, _, error), gradient in zip(seen, gradients, strict=True):
        if gradient is not None:
            dots[name] = dots.get(name, torch.zeros(())) + (gradient * error).double().flatten(1).sum(1)
    return dots


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
                f"the gate, {gate_db:g} dB at every noise level",
                "Lower --gate-db, or choose --profile quality or another --precision",
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
