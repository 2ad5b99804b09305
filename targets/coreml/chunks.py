"""A UNet as pieces that run one after the other: phones refuse to load one of more than about a gigabyte.

Chunks talk by name: each takes the UNet's own inputs that it needs and what earlier chunks made (`hidden_<i>` the
stream behind chunk i, `temb` the time embedding, `skip_<n>` the n-th skip connection), so a session needs no more than
to keep every tensor by its name.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgesd.errors import RequestError
from edgesd.manifest import TensorSpec
from edgesd.models.modules import Component
from edgesd.models.plain import Layer, share

Names = tuple[str, ...]


@dataclass(frozen=True)
class _Stage:
    """A down, middle or up block. pushes, pops: the skip connections it makes and takes, by number.

    size: for an up block, height and width that its upsampler must meet (None: twice its own).
    """

    path: str
    block: Layer
    pushes: tuple[int, ...] = ()
    pops: tuple[int, ...] = ()
    size: tuple[int, int] | None = None

    @property
    def attends(self) -> bool:
        return getattr(self.block, "has_cross_attention", False)


def unet_chunks(component: Component, count: int) -> tuple[Component, ...]:
    """`count` components that together equal the UNet, cut between blocks so that the largest is as small as can be.

    Each shares the UNet's weights and keeps its example (running it once). Raises RequestError: not a UNet, or fewer
    blocks than chunks.
    """
    if component.name != "unet":
        raise RequestError(f"{component.name} in {count} chunks", "chunks of a unet", "Lower it whole")
    stages = _stages(component)
    if not 1 <= count <= len(stages):
        raise RequestError(f"{count} chunks", f"1 to {len(stages)} for this UNet", "Choose fewer chunks")
    groups = _balanced(stages, count)
    known = dict(zip((spec.name for spec in component.inputs), component.example, strict=True))
    specs = {spec.name: spec for spec in component.inputs}
    made = []
    for index, group in enumerate(groups):
        takes = _takes(component, group, index)
        gives = (component.outputs[0].name,) if index == count - 1 else _gives(groups, index)
        module = _Chunk(component.module, group, index, last=index == count - 1, takes=takes, gives=gives).eval()
        example = tuple(known[name] for name in takes)
        with torch.no_grad():
            known |= (results := dict(zip(gives, module(*example), strict=True)))
        specs |= {name: _spec(name, x) for name, x in results.items()} | {s.name: s for s in component.outputs}
        made.append(Component("unet", module, tuple(specs[n] for n in takes), tuple(specs[n] for n in gives), example))
    return tuple(made)


class _Chunk(nn.Module):
    """The stages of one chunk. The first also embeds time and takes the latents in; the last makes the output.

    Repeats the order of diffusers' `UNet2DConditionModel.forward`, on a copy of the UNet that has the other blocks
    taken out.
    """

    def __init__(
        self, wrapped: Layer, group: list[_Stage], index: int, *, last: bool, takes: Names, gives: Names
    ) -> None:
        super().__init__()
        self.unet = _trimmed(wrapped.unet, {stage.path for stage in group}, first=index == 0, last=last)
        self.stages = [(stage, self.unet.get_submodule(stage.path)) for stage in group]
        self.takes, self.gives, self.extra, self.index, self.last = takes, gives, wrapped.extra, index, last

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(self.takes, inputs, strict=True))
        if self.index == 0:
            values["temb"] = self._embed_time(values)
            hidden = values["skip_0"] = self.unet.conv_in(values["sample"])
        else:
            hidden = values[f"hidden_{self.index - 1}"]
        for stage, block in self.stages:
            hidden = _run(stage, block, hidden, values)
        if not self.last:
            values[f"hidden_{self.index}"] = hidden
            return tuple(values[name] for name in self.gives)
        if self.unet.conv_norm_out is not None:
            hidden = self.unet.conv_act(self.unet.conv_norm_out(hidden))
        return (self.unet.conv_out(hidden),)

    def _embed_time(self, values: dict[str, Tensor]) -> Tensor:
        unet, sample = self.unet, values["sample"]
        added = {name: values[name] for name in self.extra if name != "timestep_cond"}
        temb = unet.time_embedding(
            unet.get_time_embed(sample=sample, timestep=values["timestep"]), values.get("timestep_cond")
        )
        more = unet.get_aug_embed(
            emb=temb, encoder_hidden_states=values["encoder_hidden_states"], added_cond_kwargs=added
        )
        return temb if more is None else temb + more


def _run(stage: _Stage, block: Layer, hidden: Tensor, values: dict[str, Tensor]) -> Tensor:
    context = {"encoder_hidden_states": values["encoder_hidden_states"]} if stage.attends else {}
    if stage.pushes:
        hidden, skips = block(hidden_states=hidden, temb=values["temb"], **context)
        values |= {f"skip_{n}": skip for n, skip in zip(stage.pushes, skips, strict=True)}
        return hidden
    if not stage.pops:
        return block(hidden, values["temb"], **context)
    taken = tuple(values[f"skip_{n}"] for n in stage.pops)
    return block(
        hidden_states=hidden, temb=values["temb"], res_hidden_states_tuple=taken, upsample_size=stage.size, **context
    )


def _stages(component: Component) -> list[_Stage]:
    """The blocks in order with the skip connections between them, numbered from conv_in's on."""
    wrapped: Layer = component.module
    unet = wrapped.unet
    height, width = component.inputs[0].shape[2:]
    uneven = any(side % 2**unet.num_upsamplers for side in (height, width))
    stages, sizes = [], [(height, width)]
    for i, block in enumerate(unet.down_blocks):
        first = len(sizes)
        sizes += [(height, width)] * len(block.resnets)
        if block.downsamplers is not None:
            height, width = -(-height // 2), -(-width // 2)
            sizes.append((height, width))
        stages.append(_Stage(f"down_blocks.{i}", block, pushes=tuple(range(first, len(sizes)))))
    if unet.mid_block is not None:
        stages.append(_Stage("mid_block", unet.mid_block))
    left = len(sizes)
    for i, block in enumerate(unet.up_blocks):
        pops = tuple(range(left - len(block.resnets), left))
        left -= len(pops)
        stages.append(_Stage(f"up_blocks.{i}", block, pops=pops, size=sizes[left - 1] if left and uneven else None))
    return stages


def _balanced(stages: list[_Stage], count: int) -> list[list[_Stage]]:
    """Contiguous groups whose largest has the fewest parameters."""
    weights = [sum(p.numel() for p in stage.block.parameters()) for stage in stages]

    def groups(cuts: tuple[int, ...]) -> list[slice]:
        return [slice(a, b) for a, b in itertools.pairwise((0, *cuts, len(stages)))]

    best = min(
        itertools.combinations(range(1, len(stages)), count - 1),
        key=lambda cuts: max(sum(weights[part]) for part in groups(cuts)),
    )
    return [stages[part] for part in groups(best)]


def _takes(component: Component, group: list[_Stage], index: int) -> Names:
    if index == 0:
        return tuple(spec.name for spec in component.inputs)
    here = {n for stage in group for n in stage.pushes}
    skips = sorted({n for stage in group for n in stage.pops} - here)
    context = ("encoder_hidden_states",) if any(stage.attends for stage in group) else ()
    return (f"hidden_{index - 1}", "temb", *context, *(f"skip_{n}" for n in skips))


def _gives(groups: list[list[_Stage]], index: int) -> Names:
    """What later chunks need of what this one makes."""
    made = {n for stage in groups[index] for n in stage.pushes} | ({0} if index == 0 else set())
    wanted = {n for group in groups[index + 1 :] for stage in group for n in stage.pops}
    time = ("temb",) if index == 0 else ()
    return (f"hidden_{index}", *time, *(f"skip_{n}" for n in sorted(made & wanted)))


def _trimmed(unet: Layer, kept: set[str], *, first: bool, last: bool) -> Layer:
    """The UNet on the same weights without the blocks of other chunks."""
    trimmed = share(unet)
    paths = [f"{kind}.{i}" for kind in ("down_blocks", "up_blocks") for i in range(len(getattr(unet, kind)))]
    away = {path for path in (*paths, "mid_block") if path not in kept}
    away |= set() if first else {"conv_in", "time_embedding", "add_embedding"}
    away |= set() if last else {"conv_norm_out", "conv_out"}
    for path in away:
        parent, _, child = path.rpartition(".")
        if getattr(trimmed.get_submodule(parent), child, None) is not None:
            setattr(trimmed.get_submodule(parent), child, nn.Identity())
    return trimmed


def passed_on(name: str) -> bool:
    """Whether a tensor of this name only passes between chunks."""
    return name == "temb" or name.startswith(("hidden_", "skip_"))


def _spec(name: str, x: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=tuple(x.shape), meaning="passed on to a later chunk")
