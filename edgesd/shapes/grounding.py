"""A lesson for the UNet: to look, where an object stands, at what the caption says of that place.

The denoising error alone hardly tells a UNet to read which of two objects goes left. The world knows where they stand,
so the first heads of every cross-attention layer learn it outright: at an object's pixels they look at the token that
`reading` taught to say what stands there. Wang et al., "TokenCompose" (arXiv 2312.03626), ground tokens likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesd.shapes.reading import PLACES, stands
from edgesd.shapes.world import Scene

HEADS = 2  # of each layer; the others look where they like. Every trained width keeps them
NOWHERE = len(PLACES)
Looks = list[tuple[torch.Tensor, torch.Tensor, int]]  # queries [B,S,C], keys [B,T,C], channels of a head


def standing(scenes: Iterable[tuple[str, Scene]], side: int) -> torch.Tensor:
    """[N,side,side] u8: the number of the place whose object covers a cell's middle, NOWHERE where none does.

    An object covers its square of twice the extent; a scene of one object has no places.
    """
    middles = (np.arange(side) + 0.5) / side
    found = []
    for caption, scene in scenes:
        cells = np.full((side, side), NOWHERE, np.uint8)
        for place, placed in zip(stands(caption), scene.objects, strict=False):
            rows, columns = (np.abs(middles - at) < placed.extent for at in (placed.y, placed.x))
            cells[np.ix_(rows, columns)] = PLACES.index(place)
        found.append(cells)
    return torch.from_numpy(np.stack(found))


@contextmanager
def looking(unet: nn.Module) -> Iterator[Looks]:
    """Collects the queries and keys of every cross-attention layer while the UNet runs."""
    looks: Looks = []
    layers: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    queries: list[torch.Tensor] = []

    def keys(layer: Any) -> Any:
        return lambda _module, _inputs, output: looks.append((queries.pop(), output, output.shape[-1] // layer.heads))

    hooks = [layer.to_q.register_forward_hook(lambda *call: queries.append(call[2])) for layer in layers]
    hooks += [layer.to_k.register_forward_hook(keys(layer)) for layer in layers]
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


def grounding_loss(looks: Looks, standing: torch.Tensor) -> torch.Tensor:
    """Mean over layers of the cross entropy between where the first HEADS heads look and what stands there.

    standing: [B,side,side] as `standing` gives it. Cells of coarser layers are shared among what stands in them.
    """
    side = standing.shape[-1]
    here = nn.functional.one_hot(standing.long(), NOWHERE + 1)[..., :NOWHERE].movedim(-1, 1).float()
    total = here.new_zeros(())
    for queries, keys, width in looks:
        wide = HEADS * width
        q, k = (x[..., :wide].float().unflatten(-1, (HEADS, width)).transpose(1, 2) for x in (queries, keys))
        told = (q @ k.transpose(2, 3) * width**-0.5).log_softmax(-1)[..., -NOWHERE:].mean(1)  # [B,S,4]
        share = nn.functional.avg_pool2d(here, side // round(told.shape[1] ** 0.5)).flatten(2).transpose(1, 2)
        total = total - (share * told).sum() / share.sum().clamp(min=1)
    return total / len(looks)
