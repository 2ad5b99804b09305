"""What pruning knows of each group: moments, gains and gradients over recorded calls of the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from edgesd.compress.calls import Batch
from edgesd.compress.groups import Group
from edgesd.compress.moments import Moments, View, count_rows, require_finite, rows, view

PROBES = 48  # calls that gradients are taken on, fewer where calls are big
BIG_PROBES = 8
GRAPH_LATENTS = 4 * 16 * 16  # latent positions whose forward pass is kept for a backward pass
MAP_QUERIES = 64  # attention rows compared when heads are


@dataclass(eq=False)
class Evidence:
    """What is known of one group.

    pieces: [units, n] views of its tensors. consumed: the consumer's weight; gain [outputs]: how much a squared error
    there moves the model's output. moments: of the columns, units side by side. positions: rows that a call brings.
    taylor, maps: [units] and [units, units] where collected.
    """

    group: Group
    pieces: list[torch.Tensor]
    consumed: torch.Tensor
    gain: torch.Tensor
    moments: Moments
    positions: float
    taylor: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    maps: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @cached_property
    def weight(self) -> torch.Tensor:
        """The consumer's weight by the root of its gain, [outputs, columns] f64."""
        gain = self.gain.sqrt().view(-1, *[1] * (self.consumed.ndim - 1))
        return _layout(self.consumed.double() * gain, self.moments)

    def by_unit(self, columns: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> [..., units, columns of a unit]."""
        return columns.unflatten(-1, (self.group.units, -1))


def collect(
    module: nn.Module, groups: Sequence[Group], batches: Sequence[Batch], importance: str
) -> dict[str, Evidence]:
    """Evidence by group name, in the order of execution: one pass for moments, one backward pass for gradients.

    Groups that the component's output does not depend on are left out (a text encoder's last layer, where the UNet
    attends to the one before). Raises DataError, naming the layer, for activations that are not finite.
    """
    gain, taylor = _gradients(module, groups, _some(batches), importance == "taylor")
    groups = [g for g in groups if g.name in gain]
    heads = [g for g in groups if g.heads] if importance == "merge" else []
    moments, strides, maps = _moments(module, groups, batches, heads)
    calls = sum(float(batch.weight.sum()) for batch in batches)
    found = {}
    for name, sums in moments.items():
        group = next(g for g in groups if g.name == name)
        consumer: Any = module.get_submodule(group.consumer)
        found[name] = Evidence(
            group, _pieces(module, group), consumer.weight, gain[name], sums, sums.weight * strides[name] / calls,
            taylor.get(name, torch.zeros(0)), maps.get(name, torch.zeros(0)),
        )  # fmt: skip
    return found


def _some(batches: Sequence[Batch]) -> list[Batch]:
    alone = len(batches[0].weight) == 1 and batches[0].inputs.get("sample") is not None  # too big to go together
    count = max(1, (BIG_PROBES if alone else PROBES) // len(batches[0].weight))
    return [batches[i * len(batches) // count] for i in range(count)] if count < len(batches) else list(batches)


def _pieces(module: nn.Module, group: Group) -> list[torch.Tensor]:
    tensors = [(s, getattr(module.get_submodule(s.module), s.parameter)) for s in group.slices]
    return [
        t.detach().transpose(0, s.axis).reshape(s.blocks, group.units, -1).transpose(0, 1).flatten(1)
        for s, t in tensors
    ]


def _layout(weight: torch.Tensor, sums: Moments) -> torch.Tensor:
    """A weight [out, in, ...] as [outputs, columns]; on channels, every tap counts as an output of its own."""
    if sums.columns == weight[0].numel():
        return weight.flatten(1)
    return weight.flatten(2).transpose(1, 2).flatten(0, 1)


def _moments(
    module: nn.Module, groups: Sequence[Group], batches: Sequence[Batch], heads: Sequence[Group]
) -> tuple[dict[str, Moments], dict[str, float], dict[str, torch.Tensor]]:
    """Moments by group; real positions per position counted; likeness of heads."""
    found: dict[str, Moments] = {}
    views: dict[str, View] = {}
    strides: dict[str, float] = {}
    queries: dict[str, torch.Tensor] = {}
    keys: dict[str, torch.Tensor] = {}
    maps: dict[str, torch.Tensor] = {}
    now = batches[0]

    def arrive(group: Group, layer: Any, x: torch.Tensor) -> None:
        require_finite(f"{group.consumer} (steps {now.steps})", x)
        if group.name not in views:
            every = x.numel() // x.shape[1 if isinstance(layer, nn.Conv2d) else -1]
            views[group.name] = view(layer, layer.weight.shape[1], count_rows(batches, now, every))
            found[group.name] = Moments(views[group.name].columns)
            strides[group.name] = every / len(views[group.name].thin(torch.empty(every, 0), len(x)))
        inputs, sums = views[group.name].features(layer, x), found[group.name]
        for one, scaled in now.mixed(torch.ones(len(inputs), 1), inputs):
            sums.add(one, scaled)
        if group.name in queries:
            alike = _likeness(queries.pop(group.name), keys.pop(group.name), group)
            maps[group.name] = maps.get(group.name, torch.zeros(())) + alike

    with ExitStack() as hooks, torch.no_grad():
        for group in groups:
            layer = module.get_submodule(group.consumer)
            hooks.enter_context(layer.register_forward_pre_hook(lambda m, args, g=group: arrive(g, m, args[0])))
        for group in heads:
            for kept, piece in zip((queries, keys), _query_and_key(group), strict=True):
                hooks.enter_context(
                    module.get_submodule(piece).register_forward_hook(
                        lambda m, args, out, kept=kept, name=group.name: kept.__setitem__(name, out)
                    )
                )
        for now in batches:
            now.forward(module)
    return found, strides, maps


def _query_and_key(group: Group) -> tuple[str, str]:
    named = list(dict.fromkeys(s.module for s in group.slices))
    return named[0], named[1]


def _likeness(query: torch.Tensor, key: torch.Tensor, group: Group) -> torch.Tensor:
    """How alike the heads' attention maps are, [heads, heads] cosines, on evenly chosen queries of the batch's ends."""
    ends = torch.tensor([0, len(query) - 1])
    chosen = torch.linspace(0, query.shape[1] - 1, min(MAP_QUERIES, query.shape[1])).long()
    q, k = (x[ends].unflatten(-1, (group.units, -1)).transpose(1, 2) for x in (query[:, chosen], key))
    maps = (q @ k.transpose(-1, -2) * group.unit_size**-0.5).softmax(-1)
    flat = nn.functional.normalize(maps.transpose(0, 1).flatten(1), dim=1)
    return flat @ flat.T


def _gradients(
    module: nn.Module, groups: Sequence[Group], batches: Sequence[Batch], taylor_too: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By group: mean squared gain [out] from an error at the consumer's output to the model's; Taylor scores [units].
    The scores take a backward pass more, so they are there where asked for alone.

    The gain is Hutchinson's: with v normal, E (J^T v)^2 is the squared column norm of the Jacobian J. Taylor is
    |x dL/dx| summed within a call (Molchanov et al. 2019, gates), L the denoising loss against the call's target.
    """
    gain: dict[str, torch.Tensor] = {}
    taylor: dict[str, torch.Tensor] = {}
    counts: dict[str, float] = {}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as hooks, torch.enable_grad():
        for group in groups:
            layer = module.get_submodule(group.consumer)
            hooks.enter_context(layer.register_forward_pre_hook(_tracked))
            hooks.enter_context(
                layer.register_forward_hook(lambda m, args, out, g=group: seen.__setitem__(g.name, (args[0], out)))
            )
        for batch, output, probe in _probed(module, batches, generator):
            gains = _grad((output * probe).sum(), [seen[g.name][1] for g in groups], keep=taylor_too)
            losses = _grad(batch.loss(output), [seen[g.name][0] for g in groups]) if taylor_too else gains
            weight = batch.weight.repeat(2) if batch.pairs else batch.weight
            for group, g, loss in zip(groups, gains, losses, strict=True):
                if g is None or loss is None:
                    continue
                layer, x = module.get_submodule(group.consumer), seen[group.name][0]
                squared = rows(layer, g * weight.sqrt().view(-1, *[1] * (g.ndim - 1))).square()
                gain[group.name] = gain.get(group.name, 0) + squared.sum(0)
                counts[group.name] = counts.get(group.name, 0) + float(weight.sum()) * len(squared) / len(g)
                if taylor_too:
                    gates = rows(layer, (x * loss).detach()).unflatten(0, (len(x), -1)).sum(1)
                    scores = gates.unflatten(1, (group.units, -1)).sum(2).abs().sum(0)
                    taylor[group.name] = taylor.get(group.name, 0) + scores
            seen.clear()  # before the next are made
    return {name: total / counts[name] for name, total in gain.items()}, taylor


def _probed(
    module: nn.Module, batches: Sequence[Batch], generator: torch.Generator
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """(calls, output, probe) in portions whose graph is small; the noise is drawn for whole batches all the same."""
    for batch in batches:
        sample = batch.inputs.get("sample")
        calls = len(batch.weight) if sample is None else max(1, GRAPH_LATENTS // sample[0, 0].numel())
        noise = None
        for portion, held in batch.split(calls):
            output = portion.forward(module)
            if noise is None:
                whole = len(next(iter(batch.inputs.values())))
                noise = torch.randn((whole, *output.shape[1:]), generator=generator)
            yield portion, output, noise[held]


def _grad(output: torch.Tensor, inputs: Sequence[torch.Tensor], keep: bool = False) -> tuple[torch.Tensor | None, ...]:
    """Gradients, None for inputs that the output does not depend on. keep: the graph serves once more."""
    return torch.autograd.grad(output, inputs, retain_graph=keep, allow_unused=True)


def _tracked(layer: nn.Module, args: tuple) -> tuple | None:
    """Lets gradients begin at a consumer's input where nothing before it asks for them."""
    return None if args[0].requires_grad else (args[0].detach().requires_grad_(True), *args[1:])
