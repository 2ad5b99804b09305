"""What a group's width costs in time on a target: its block alone, lowered, opened and timed at a few widths.

A UNet's blocks run one after the other, so what a block saves alone is about what the whole saves; memory traffic
between blocks and the runtime's fusions across them are not seen, which is why `prune` times the whole model before
and after as well, and reports that. Blocks of the same shape are timed once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from edgesd.compress.calls import Batch
from edgesd.compress.groups import Group, cut
from edgesd.manifest import Axes, FileEntry, Manifest, ModelSpec, Provenance, SamplerFile, TensorSpec, Variant
from edgesd.manifest import Component as Listed
from edgesd.models.modules import Component, build
from edgesd.models.plain import plain, share
from edgesd.timing import measure

TARGETS = ("onnx-web", "openvino", "tflite")  # whose runtimes execute here, as they do on devices
POINTS = (1.0, 0.5, 0.25)  # kept shares that a block is timed at
RUNS, WARMUP = 15, 3


@dataclass(frozen=True)
class Latency:
    """Seconds of one call. whole: of the dense model. blocks: group -> [(units kept, seconds)], ascending."""

    target: str
    whole: float
    blocks: Mapping[str, Sequence[tuple[int, float]]]

    def saved(self, name: str, gone: int) -> float:
        """Seconds saved when so many units of a group are gone, interpolated between what was timed."""
        units, seconds = zip(*self.blocks[name], strict=True)
        return float(seconds[-1] - np.interp(units[-1] - gone, units, seconds))


def observe(module: nn.Module, groups: Sequence[Group], batch: Batch, spec: ModelSpec, target: str) -> Latency:
    """Times every group's block of a UNet, and the whole of it, on a target, one row a call."""
    seen = _inputs(module, groups, batch.with_inputs({name: x[:1] for name, x in batch.inputs.items()}))
    timed: dict[tuple, list[tuple[int, float]]] = {}
    blocks = {}
    for group in groups:
        shapes = tuple((name, tuple(x.shape)) for name, x in seen[group.name].items())
        out = len(cast(torch.Tensor, module.get_submodule(group.consumer).weight))
        alike = (group.kind, group.units, group.unit_size, out, shapes)
        if alike not in timed:
            timed[alike] = [
                (kept, _seconds(_component(module, group, kept, seen[group.name]), spec, target))
                for kept in sorted({max(1, round(share * group.units)) for share in POINTS})
            ]
        blocks[group.name] = timed[alike]
    return Latency(target, whole(module, spec, target), blocks)


def whole(module: nn.Module, spec: ModelSpec, target: str) -> float:
    """Seconds of one call of a whole UNet on a target."""
    return _seconds(build("unet", {"unet": module}, spec, _axes(spec)), spec, target)


def _axes(spec: ModelSpec) -> Axes:
    return Axes(size_px=spec.defaults.size_px, precision="fp32")


class _Block(nn.Module):
    """A block with positional inputs, called by the names it was called with."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.block, self.names = block, tuple(names)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        first = [x for name, x in zip(self.names, tensors, strict=True) if name.isdigit()]
        named = {name: x for name, x in zip(self.names, tensors, strict=True) if not name.isdigit()}
        return self.block(*first, **named)


def _component(module: nn.Module, group: Group, kept: int, inputs: Mapping[str, torch.Tensor]) -> Component:
    """A group's block cut to its first `kept` units, ready to lower; the module given is left alone."""
    smaller = share(module)
    cut(smaller, group, range(kept))
    block, example = _Block(plain(smaller.get_submodule(group.name)), tuple(inputs)).eval(), tuple(inputs.values())
    with torch.no_grad():
        made = block(*example)
    takes = tuple(_spec(f"x{i}", x) for i, x in enumerate(example))
    return Component("unet", block, takes, (_spec("y", made),), example)


def _inputs(module: nn.Module, groups: Sequence[Group], batch: Batch) -> dict[str, dict[str, torch.Tensor]]:
    """What each group's block is called with in a real call: positions as "0", "1", keywords by name."""
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def note(name: str, args: tuple, kwargs: dict) -> None:
        every = {**{str(i): x for i, x in enumerate(args)}, **kwargs}
        seen[name] = {key: x for key, x in every.items() if isinstance(x, torch.Tensor)}

    with ExitStack() as hooks, torch.no_grad():
        for group in groups:
            block = module.get_submodule(group.name)
            hooks.enter_context(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, name=group.name: note(name, args, kwargs), with_kwargs=True
                )
            )
        batch.forward(module)
    return seen


def _seconds(component: Component, spec: ModelSpec, target: str) -> float:
    """The quickest of several calls on a target, lowered into a temporary bundle of one component: others' load on the
    machine only ever adds."""
    from edgesd import targets

    runtime = targets.load(target, lowering=True)
    with tempfile.TemporaryDirectory() as scratch:
        lowered = runtime.lower(component, _axes(spec), Path(scratch))
        files = tuple(path.as_posix() for path in lowered.files)
        variant = Variant(axes=_axes(spec), files=files, inputs=lowered.inputs, outputs=lowered.outputs)
        session = runtime.open(Path(scratch), _manifest(spec, target, variant))
        call = {t.name: x.numpy() for t, x in zip(component.inputs, component.example, strict=True)}
        return measure(lambda: session.run("unet", call), RUNS, WARMUP).min


def _spec(name: str, x: torch.Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=tuple(x.shape))


def _manifest(spec: ModelSpec, target: str, variant: Variant) -> Manifest:
    """The least that a target's session reads."""
    tables = "tables.safetensors"
    every = {*variant.files, tables, *(t.file for t in spec.tokenizers)}
    return Manifest(
        target=target, model=spec, components=(Listed(name="unet", variants=(variant,)),),
        samplers=(SamplerFile(name="ddim", file=tables, steps=(1,)),),
        provenance=Provenance(source=spec.name, sha256="0" * 64),
        files=tuple(FileEntry(path=path, bytes=0, sha256="0" * 64) for path in sorted(every)),
    )  # fmt: skip
