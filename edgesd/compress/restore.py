"""Taking the loss back: when inputs of a layer go, least squares lets those that stay do their work.

For a layer with kept inputs x, weight W and bias, the correction (D, b) minimises, over recorded calls,

    sum  w |y - (W + D) x - b|^2  +  ridge * mean diagonal * |D|^2

so weights leave what they were only as far as the calls pay for it. That is OBS compensation (Hassibi & Stork 1993) for
structured removal, as in ZipLM (2302.04089), with two differences: y is what the *dense* model's residual stream holds
behind the layer, so that each layer also takes back what the layers before it lost; and beside each row of a guided
call counts the row that guidance makes of the two halves (`Batch.mixed`), because that is what reaches the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgesd.compress.calls import Batch
from edgesd.compress.groups import Group, cut
from edgesd.compress.moments import RIDGE, Moments, View, count_rows, require_finite, rows, view
from edgesd.compress.replay import Halt, lockstep

RESTORE = ("ls", "bias", "none")


def restore(
    dense: nn.Module,
    pruned: nn.Module,
    groups: Sequence[Group],
    kept: Mapping[str, Sequence[int]],
    batches: Sequence[Batch],
    *,
    method: str = "ls",
    ridge: float = RIDGE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Cuts `pruned`, a weight-sharing copy of `dense`, to `kept` and restores each consumer, in order of execution.

    One pass: all batches wait at each consumer, in the dense model and in the pruned one, whose earlier layers are
    finished by then. method: "ls", "bias" (means only) or "none". Consumers of groups kept whole are corrected too,
    once something before them is gone. Raises DataError for activations that are not finite.
    """
    consumers = {g.consumer: g for g in groups}
    watched = Counter(g.residual for g in groups if g.residual)
    lanes = [(module, batch.forward) for batch in batches for module in (dense, pruned)]
    begun = False
    for done, halts in enumerate(lockstep(lanes, consumers.keys(), watched)):
        group = consumers[halts[0].name]
        if len(kept[group.name]) < group.units:
            begun = True
            cut(pruned, group, kept[group.name])
            layer, channels = pruned.get_submodule(group.consumer), group.channels(kept[group.name])
            for halt in halts[1::2]:
                halt.x = halt.x.index_select(1 if isinstance(layer, nn.Conv2d) else -1, channels)
        if begun and method != "none":
            left = set(kept[group.name])
            gone = group.channels([unit for unit in range(group.units) if unit not in left])
            _correct(dense, pruned, group, gone, halts, batches, method, ridge)
        watched[group.residual] -= 1
        if not watched[group.residual]:
            for halt in halts:
                halt.seen.pop(group.residual, None)  # a lane would keep it to its end
        progress(done + 1, len(consumers))


def _correct(
    dense: nn.Module,
    pruned: nn.Module,
    group: Group,
    gone: torch.Tensor,
    halts: Sequence[Halt],
    batches: Sequence[Batch],
    method: str,
    ridge: float,
) -> None:
    layer: Any = pruned.get_submodule(group.consumer)
    pairs = list(zip(halts[::2], halts[1::2], batches, strict=True))
    made = len(rows(layer, layer(pairs[0][1].x)))
    seen = view(layer, layer.weight.shape[1], count_rows(batches, batches[0], made))
    if method == "ls" and not seen.unfolded and len(gone):
        _stand_in(dense.get_submodule(group.consumer), layer, group, gone, pairs, seen, ridge)
    sums = Moments(seen.columns if method == "ls" else 0, len(layer.weight))
    for before, after, batch in pairs:
        missing = rows(layer, _stream(dense, group, before) - _stream(pruned, group, after))
        require_finite(f"{group.consumer} (steps {batch.steps})", missing)
        missing = seen.thin(missing, len(after.x))
        x = seen.features(layer, after.x) if method == "ls" else missing[:, :0]
        for one, scaled, wanted in batch.mixed(torch.ones(len(x), 1), x, missing):
            sums.add(one, scaled, wanted)
    if method == "ls":
        delta, shift = sums.solve(ridge)
        change = delta.float()
        if seen.unfolded:
            change = change.reshape(layer.weight.shape)
        else:  # at the middle tap
            change = torch.zeros_like(layer.weight)
            change[:, :, layer.weight.shape[2] // 2, layer.weight.shape[3] // 2] = delta.float()
        layer.weight = _frozen(layer.weight + change)
    else:
        shift = sums.mean()[1]
    layer.bias = _frozen(shift.float() if layer.bias is None else layer.bias + shift.float())


def _stand_in(
    dense: Any, layer: Any, group: Group, gone: torch.Tensor, pairs: Sequence[Any], seen: View, ridge: float
) -> None:
    """Where taps are too many to tell apart: channels that stay stand in for those gone, alike at every tap.

    x_gone = A x_kept + c by least squares over positions, so that the weights of what is gone move to what stays.
    """
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    sums = Moments(seen.columns, len(gone))
    for before, after, batch in pairs:
        x, wanted = seen.features(layer, after.x), seen.features(dense, before.x.index_select(axis, gone))
        for one, scaled, target in batch.mixed(torch.ones(len(x), 1), x, wanted):
            sums.add(one, scaled, target)
    mapped, constant = sums.solve(ridge)
    lost = dense.weight.index_select(1, gone)
    layer.weight = _frozen(layer.weight + torch.einsum("ogtu,gk->oktu", lost, mapped.float()))
    shift = torch.einsum("ogtu,g->o", lost, constant.float())
    layer.bias = _frozen(shift if layer.bias is None else layer.bias + shift)


def _stream(module: nn.Module, group: Group, halt: Halt) -> torch.Tensor:
    """What the residual stream holds behind the consumer, in the layout of the consumer's output."""
    layer = module.get_submodule(group.consumer)
    made = layer(halt.x)
    if not group.residual:
        return made
    residual = halt.seen[group.residual]
    if group.shortcut:
        residual = module.get_submodule(group.shortcut)(residual)
    if residual.ndim > made.ndim:  # a picture beside its tokens
        residual = residual.flatten(2).transpose(1, 2)
    return made + residual


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
