"""Groups: tensors that shrink together when a hidden channel, an attention head or a feed-forward unit is taken out.

Only *inner* widths are grouped: what a residual block makes and itself consumes. The residual stream, skips and time
embedding keep their width, so groups are independent of each other and cost falls in proportion to what is removed.
A resnet's hidden channels go by whole GroupNorm groups: the statistics of those that stay are untouched.

To add a block type, write one rule below and list its class name in `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from edgesd.errors import RequestError
from edgesd.models.count import Cost

Kind = Literal["resnet", "self_attention", "cross_attention", "feed_forward", "conv"]
KERNEL_MULTIPLE = 8  # channel counts that kernels like


@dataclass(frozen=True)
class Slice:
    """One tensor's share: `parameter` of `module` loses along `axis`; blocks = 2 for GEGLU's values and gates."""

    module: str
    parameter: str
    axis: int
    blocks: int = 1


@dataclass(frozen=True)
class Group:
    """Coupled tensors and the layer that consumes what they make.

    name: the block. units: how many can go, one by one; unit_size: channels in each. consumer: the layer whose input
    channels are the units. residual: the module whose input is later added to the consumer's output ("" for none);
    shortcut: the module which that input passes first. heads: the attention module whose head count follows.
    params, macs: of one unit, all tensors together (macs 0 when not counted).
    """

    name: str
    kind: Kind
    units: int
    unit_size: int
    slices: tuple[Slice, ...]
    consumer: str
    residual: str = ""
    shortcut: str = ""
    heads: str = ""
    params: int = 0
    macs: int = 0

    def __str__(self) -> str:
        cost = f"{self.params:,} parameters" + (f" and {self.macs:,} MACs" if self.macs else "")
        return f"{self.name} ({self.kind}): {self.units} units of {self.unit_size}, each {cost}, into {self.consumer}"

    @property
    def step(self) -> int:
        """Units that go at a time, so that channel counts stay multiples of 8 and big layers take at most 64 steps."""
        if self.heads:
            return 1
        step = KERNEL_MULTIPLE // math.gcd(KERNEL_MULTIPLE, self.unit_size)
        step *= max(1, self.units // (64 * step))
        return step if step < self.units else 1

    def channels(self, units: Sequence[int]) -> torch.Tensor:
        """Consumer input channels of these units, in the given order."""
        starts = torch.tensor(list(units), dtype=torch.long).unsqueeze(1) * self.unit_size
        return (starts + torch.arange(self.unit_size)).flatten()


def find_groups(module: nn.Module, cost: Cost | None = None) -> tuple[Group, ...]:
    """All groups of a UNet2DConditionModel, CLIP text model, AutoencoderKL or AutoencoderTiny, in module order.

    cost: of this module at the shapes it will run, for MACs. Raises RequestError when nothing here can be pruned.
    """
    found: list[Group] = []
    for name, block in module.named_modules():
        rule = RULES.get(type(block).__name__)
        found += rule(name, block) if rule is not None else ()
    groups = tuple(_priced(module, group, cost) for group in found if group.units > 1)
    if not groups:
        known = "UNet2DConditionModel, CLIPTextModel, AutoencoderKL, AutoencoderTiny"
        raise RequestError(f"nothing to prune in {type(module).__name__}", known, "Choose another component")
    return groups


def cut(module: nn.Module, group: Group, kept: Sequence[int]) -> None:
    """Takes the units that are not in `kept` out of a module, in place; the old tensors are left as they were.

    Works on the meta device too, where it only gives layers their new shapes.
    """
    for piece in group.slices:
        layer = module.get_submodule(piece.module)
        tensor = getattr(layer, piece.parameter)
        width = group.units * group.unit_size
        index = torch.cat([group.channels(kept) + block * width for block in range(piece.blocks)])
        smaller = tensor.detach().index_select(piece.axis, index.to(tensor.device))
        setattr(layer, piece.parameter, nn.Parameter(smaller, requires_grad=False))
        _fit(layer)
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = len(kept)
    if group.heads:
        attention = module.get_submodule(group.heads)
        for attribute in ("heads", "num_heads", "sliceable_head_dim"):
            if hasattr(attention, attribute):
                setattr(attention, attribute, len(kept))
        for attribute in ("inner_dim", "inner_kv_dim"):
            if hasattr(attention, attribute):
                setattr(attention, attribute, len(kept) * group.unit_size)


def _fit(layer: Any) -> None:
    """Makes a layer's declared widths those of its weight."""
    weight = layer.weight
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(weight)


def _priced(module: nn.Module, group: Group, cost: Cost | None) -> Group:
    params = sum(getattr(module.get_submodule(s.module), s.parameter).numel() for s in group.slices)
    macs = 0
    if cost is not None and group.heads:  # all that attention does is done head by head
        macs = cost.by_module[group.heads]
    elif cost is not None:
        macs = sum(cost.by_module.get(layer, 0) for layer in {s.module for s in group.slices})
    return replace(group, params=params // group.units, macs=macs // group.units)


def _rows(prefix: str, block: Any, *layers: str, blocks: int = 1) -> Iterable[Slice]:
    """The output side of these layers of a block, biases included."""
    for layer in layers:
        for parameter in ("weight", "bias"):
            if getattr(block.get_submodule(layer), parameter) is not None:
                yield Slice(f"{prefix}.{layer}", parameter, 0, blocks)


def _resnet(name: str, block: Any) -> list[Group]:
    """ResnetBlock2D: conv1 and the time projection make the hidden channels, norm2 groups them, conv2 consumes them."""
    slices = [*_rows(name, block, "conv1", "norm2")]
    if block.time_emb_proj is not None:
        # A scale and a shift side by side, or one shift.
        slices += _rows(
            name, block, "time_emb_proj", blocks=block.time_emb_proj.out_features // block.conv1.out_channels
        )
    return [
        Group(
            name, "resnet", block.norm2.num_groups, block.norm2.num_channels // block.norm2.num_groups,
            (*slices, Slice(f"{name}.conv2", "weight", 1)), f"{name}.conv2",
            residual=f"{name}.norm1", shortcut=f"{name}.conv_shortcut" if block.conv_shortcut is not None else "",
        )
    ]  # fmt: skip


def _attention(name: str, attn: Any, residual: str, qkv: tuple[str, ...], out: str, heads: int) -> Group:
    cross = bool(getattr(attn, "is_cross_attention", False))
    return Group(
        name, "cross_attention" if cross else "self_attention", heads,
        attn.get_submodule(out).in_features // heads,
        (*_rows(name, attn, *qkv), Slice(f"{name}.{out}", "weight", 1)), f"{name}.{out}", residual, heads=name,
    )  # fmt: skip


def _transformer(name: str, block: Any) -> list[Group]:
    """BasicTransformerBlock: heads of self- and cross-attention, and feed-forward units (pairs of value and gate)."""
    groups = []
    for attn, norm in (("attn1", "norm1"), ("attn2", "norm2")):
        if getattr(block, attn, None) is not None:
            layer = getattr(block, attn)
            groups.append(
                _attention(f"{name}.{attn}", layer, f"{name}.{norm}", ("to_q", "to_k", "to_v"), "to_out.0", layer.heads)
            )
    into, out = block.ff.net[0].proj, block.ff.net[2]
    blocks = into.out_features // out.in_features
    slices = (*_rows(f"{name}.ff", block.ff, "net.0.proj", blocks=blocks), Slice(f"{name}.ff.net.2", "weight", 1))
    groups.append(
        Group(f"{name}.ff", "feed_forward", out.in_features, 1, slices, f"{name}.ff.net.2", residual=f"{name}.norm3")
    )
    return groups


def _clip(name: str, layer: Any) -> list[Group]:
    """CLIPEncoderLayer: heads and feed-forward units."""
    attn, mlp = layer.self_attn, layer.mlp
    heads = attn.q_proj.out_features // attn.head_dim
    slices = (*_rows(f"{name}.mlp", mlp, "fc1"), Slice(f"{name}.mlp.fc2", "weight", 1))
    return [
        _attention(f"{name}.self_attn", attn, f"{name}.layer_norm1", ("q_proj", "k_proj", "v_proj"), "out_proj", heads),
        Group(f"{name}.mlp", "feed_forward", mlp.fc1.out_features, 1, slices, f"{name}.mlp.fc2", f"{name}.layer_norm2"),
    ]


def _vae_middle(name: str, block: Any) -> list[Group]:
    """UNetMidBlock2D of AutoencoderKL: heads of its attention (one head in published models, hence no group)."""
    return [
        _attention(
            f"{name}.attentions.{i}", attn, f"{name}.attentions.{i}", ("to_q", "to_k", "to_v"), "to_out.0", attn.heads
        )
        for i, attn in enumerate(block.attentions)
        if attn is not None
    ]


def _tiny_vae(name: str, block: Any) -> list[Group]:
    """AutoencoderTinyBlock: the channels between its three convolutions."""
    first, second, third = (f"{name}.conv.{i}" for i in (0, 2, 4))
    shortcut = f"{name}.skip" if isinstance(block.skip, nn.Conv2d) else ""
    ends = ((first, second, "", ""), (second, third, first, shortcut))
    return [
        Group(
            maker, "conv", block.get_submodule(consumer.removeprefix(f"{name}.")).in_channels, 1,
            (*_rows(name, block, maker.removeprefix(f"{name}.")), Slice(consumer, "weight", 1)),
            consumer, residual, passed,
        )
        for maker, consumer, residual, passed in ends
    ]  # fmt: skip


RULES = {
    "ResnetBlock2D": _resnet,
    "BasicTransformerBlock": _transformer,
    "CLIPEncoderLayer": _clip,
    "UNetMidBlock2D": _vae_middle,
    "AutoencoderTinyBlock": _tiny_vae,
}
