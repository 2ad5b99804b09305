"""Low-rank training: a module's weights stay, what it learns is a LoRA from the start (Hu et al., arXiv 2106.09685).

Convolutions too (LoCon): a kernel [out,in,h,w] changes by up [out,rank] @ down [rank,in*h*w]. The file that comes of it
is peft's style, which diffusers and `--lora` read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import parametrize

from edgesd.files import write_whole


class LowRank(nn.Module):
    """weight + up @ down; nothing at first, since `up` starts at 0."""

    def __init__(self, weight: torch.Tensor, rank: int, rng: torch.Generator) -> None:
        super().__init__()
        inputs = weight[0].numel()
        self.rank = min(rank, len(weight), inputs)
        self.up = nn.Parameter(torch.zeros(len(weight), self.rank))
        self.down = nn.Parameter(torch.empty(self.rank, inputs))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=rng)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def low_rank(module: nn.Module, rank: int, seed: int = 0) -> nn.Module:
    """A copy of which only a change of `rank` of each convolution's and linear layer's weight learns."""
    made, rng = copy.deepcopy(module).requires_grad_(False), torch.Generator().manual_seed(seed)
    for layer in list(made.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, rng))
    return made


def _changes(module: nn.Module) -> Iterator[tuple[str, Any, LowRank]]:
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            yield name, layer, cast("Any", layer).parametrizations.weight[0]


def fused(module: nn.Module, base: nn.Module) -> nn.Module:
    """A copy of `base`, which `module` was made from, with the changes in its weights."""
    made = copy.deepcopy(base)
    for name, layer, _ in _changes(module):
        weight = cast("torch.Tensor", made.get_submodule(name).weight)
        weight.data.copy_(layer.weight.detach())
    return made


def save_lora(unet: nn.Module, path: Path) -> None:
    """Writes the changes as a LoRA of a UNet, float16. Kernels: down [rank,in,h,w], up [out,rank,1,1]."""
    tensors = {}
    for name, layer, change in _changes(unet):
        down, up = change.down.detach(), change.up.detach()
        if layer.weight.ndim == 4:
            down, up = down.view(-1, *layer.weight.shape[1:]), up[:, :, None, None]
        for role, value in (("lora_A", down), ("lora_B", up)):
            tensors[f"unet.{name}.{role}.weight"] = value.half().cpu().contiguous()
    write_whole(path, save(tensors))
