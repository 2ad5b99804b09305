"""What the widths of a bundle cost and lose, and when changing width within a picture pays.

The figures come with the bundle (`quality["widths"]` of its manifest, made by edgesd/narrowing.py): the share of a
call's MACs, and by tenths of the run how much of the finished picture's energy is wrong when those rows are narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from edgesd.errors import DataError
from edgesd.manifest import Manifest
from edgesd.runtime.policy import Limits, width_cost

BINS = 10
MARGIN = 0.75  # a switch must leave at most this share of the error that its uniform rival has


@dataclass(frozen=True)
class Widths:
    """macs: share of the widest's MACs a call by width. errors: by width, per tenth of the run, the error it adds to
    the finished latents (mean square); empty = not measured. load_calls: loading it, in calls of the widest. bytes: its
    weights in memory, at most.
    """

    macs: Mapping[float, float]
    errors: Mapping[float, tuple[float, ...]]
    load_calls: Mapping[float, float]
    bytes: Mapping[float, int]

    def share(self, width: float) -> float:
        """What a call at a width costs of one at 1; one the bundle has not by SD 1.5's shape."""
        return self.macs[width] if width in self.macs else width_cost(width)

    def switch(
        self, width: float, limits: Limits, calls: float, free_bytes: float | None = None
    ) -> tuple[float, float, float] | None:
        """(first width, share of the run, second width) that costs no more than a picture of `width` and loses less.

        calls: UNet calls of the picture. The second width's loading counts as cost, and each must fit `free_bytes`
        where that is known. None where no switch wins by MARGIN, or nothing was measured.
        """
        known = [w for w in self.macs if w == 1 or w in self.errors]
        allowed = [
            w for w in known
            if limits.min_width <= w <= limits.max_width and (free_bytes is None or self.bytes.get(w, 0) <= free_bytes)
        ]  # fmt: skip
        if width not in self.errors:
            return None
        best, least = None, MARGIN * sum(self.errors[width])
        for first, second in permutations(allowed, 2):
            for tenths in range(1, BINS):
                share = tenths / BINS
                cost = share * self.share(first) + (1 - share) * self.share(second)
                if cost + self.load_calls.get(second, math.inf) / calls > self.share(width):
                    continue
                error = sum(self._error(first)[:tenths]) + sum(self._error(second)[tenths:])
                if error < least:
                    best, least = (first, share, second), error
        return best

    def _error(self, width: float) -> tuple[float, ...]:
        return self.errors.get(width, (0.0,) * BINS)


def read_widths(manifest: Manifest) -> Widths | None:
    """The widths of a bundle's UNet, None where it has one. Raises DataError for figures that are none."""
    variants = {v.axes.width: v for v in reversed(manifest.component("unet").variants)}
    if len(variants) < 2 or 1.0 not in variants:
        return None
    sizes = {entry.path: entry.bytes for entry in manifest.files}
    whole = max(variants[1.0].macs, 1)
    told: Any = manifest.quality.get("widths", {})
    try:
        errors = {float(w): tuple(float(x) for x in row) for w, row in told.get("sensitivity", {}).items()}
        loads = {float(w): float(x) for w, x in told.get("load_calls", {}).items()}
        good = all(len(row) == BINS and all(0 <= x < math.inf for x in row) for row in errors.values())
        good = good and all(0 <= x < math.inf for x in loads.values()) and len(errors) <= 64 and len(loads) <= 64
    except (TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise DataError(
            "the manifest's figures of widths do not parse", "what edgesd package writes", "Package it again"
        )
    return Widths(
        {w: v.macs / whole for w, v in variants.items()}, errors, loads,
        {w: min(sum(sizes[f] for f in v.files), 4 * v.params) for w, v in variants.items()},
    )  # fmt: skip
