"""Nested widths while training: narrow modules that are views of a dense one's weights, gradients and all.

Width w keeps the leading units of every inner group (whole norm groups, heads, feed-forward units), so narrow lies
inside wide. The sandwich rule (Yu & Huang, "Universally Slimmable Networks", arXiv 1903.05134) trains the widest, the
narrowest and one in between at each step; the narrow ones learn from what the widest said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from edgesd.compress.groups import find_groups
from edgesd.compress.widths import leading, narrowed
from edgesd.models.plain import share


class Nested:
    """A dense module and its narrower forms. widths: descending, the first is 1. forms: by width, without weights."""

    def __init__(self, dense: nn.Module, widths: Sequence[float]) -> None:
        self.dense, self.widths = dense, tuple(sorted(widths, reverse=True))
        self._groups = find_groups(dense)
        empty = share(dense).to("meta")  # narrow forms have no weights of their own: each call brings them
        self.forms = {width: narrowed(empty, self._groups, width) for width in self.widths if width < 1}

    def call(self, width: float, *args: Any, **kwargs: Any) -> Any:
        """The module's forward at a width; the gradients reach the dense weights."""
        if width >= 1:
            return self.dense(*args, **kwargs)
        form = self.forms[width]
        form.train(self.dense.training)
        return functional_call(form, self._weights(width), args, kwargs)

    def chosen(self, rng: torch.Generator) -> tuple[float, ...]:
        """The narrow widths of one step: the narrowest and one of the others."""
        narrow = self.widths[1:]
        if len(narrow) < 2:
            return narrow
        return (narrow[-1], narrow[int(torch.randint(0, len(narrow) - 1, (), generator=rng))])

    def _weights(self, width: float) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = dict(self.dense.named_parameters())
        for group in self._groups:
            kept, whole = leading(group, width) * group.unit_size, group.units * group.unit_size
            for piece in group.slices:
                name = f"{piece.module}.{piece.parameter}"
                blocks = [weights[name].narrow(piece.axis, b * whole, kept) for b in range(piece.blocks)]
                weights[name] = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=piece.axis)
        return weights | dict(self.dense.named_buffers())
