"""What varies by row besides the sampler: guidance, width, the unconditional call, and when a run may end early.

A table never knows of its plan: the caller's `denoise` reads guidance and width by row. Public: RunPlan, Stage,
make_plan(kind, rows, guidance, ...), combine (classifier-free guidance with rescale), run_stages (staged plans).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from edgesd.errors import RequestError
from edgesd.runtime.loop import Step, run
from edgesd.runtime.state import bridge
from edgesd.runtime.table import SamplerTable

MAX_GUIDANCE = 1000.0


@dataclass(frozen=True)
class RunPlan:
    """Per row of a table: guidance (1 = none), width (fraction of channels that stay, 0..1], uncond (is it called).

    rescale: guidance_rescale phi, 0..1. early_stop: end the run when x0 moves by less than this fraction of its own
    size between two rows (rms), or None for never.
    """

    guidance: tuple[float, ...]
    width: tuple[float, ...]
    uncond: tuple[bool, ...]
    rescale: float = 0.0
    early_stop: float | None = None

    def __post_init__(self) -> None:
        if not self.guidance or not len(self.guidance) == len(self.width) == len(self.uncond):
            raise _refused("a plan whose lists differ in length", "one guidance, width and uncond per row")
        if not all(0 <= g <= MAX_GUIDANCE for g in self.guidance):  # also refuses NaN
            raise _refused(f"guidance {list(self.guidance)}", f"0 to {MAX_GUIDANCE:g}")
        if not all(0 < w <= 1 for w in self.width):
            raise _refused(f"width {list(self.width)}", "above 0, at most 1")
        if any(g != 1 and not called for g, called in zip(self.guidance, self.uncond, strict=True)):
            raise _refused("guidance without the unconditional call", "guidance 1 where it is skipped")
        if not 0 <= self.rescale <= 1:
            raise _refused(f"guidance_rescale {self.rescale}", "0 to 1")
        if self.early_stop is not None and not 0 < self.early_stop < 1:
            raise _refused(f"early_stop {self.early_stop}", "above 0, below 1")

    @property
    def rows(self) -> int:
        return len(self.guidance)

    def calls(self, start: int = 0, stop: int | None = None) -> int:
        """UNet calls per picture for rows start .. stop-1: one each, two where the unconditional call is made."""
        uncond = self.uncond[start:stop]
        return len(uncond) + sum(uncond)

    def settled(self, before: np.ndarray, x0: np.ndarray) -> bool:
        """Whether early_stop is set and x0 [B,C,h,w] moved less than that since the row before, in every picture."""
        if self.early_stop is None:
            return False
        axes = tuple(range(1, x0.ndim))
        moved, size = (np.sqrt(np.mean(np.square(a, dtype=np.float64), axis=axes)) for a in (x0 - before, x0))
        return bool((moved < self.early_stop * size).all())


def _refused(came: str, allowed: str) -> RequestError:
    return RequestError(came, allowed, "Change the guidance settings")


def _constant(x: float, guidance: float) -> float:
    return guidance


def _linear(x: float, guidance: float) -> float:
    """From 1 up to twice the excess, so that the mean stays (Wang et al. 2024, "Analysis of CFG weight schedulers")."""
    return 1 + 2 * x * (guidance - 1)


def _cosine(x: float, guidance: float) -> float:
    """As linear, along half a cosine: 1 at the start, flat at both ends."""
    return 1 + (1 - math.cos(math.pi * x)) * (guidance - 1)


def _interval(x: float, guidance: float) -> float:
    """Guidance in the middle of the run only (Kynkaanniemi et al. 2024): off in the first 20 % and the last 20 %."""
    return guidance if 0.2 <= x <= 0.8 else 1.0


def _three_stage(x: float, guidance: float) -> float:
    """Low, rising, full: 1/3 of the excess in the first 20 %, then linear up to all of it at 60 %."""
    return 1 + (guidance - 1) * min(max(1 / 3 + (x - 0.2) / 0.4 * 2 / 3, 1 / 3), 1.0)


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant, "linear": _linear, "cosine": _cosine, "interval": _interval, "three_stage": _three_stage,
}  # fmt: skip


def make_plan(
    kind: str, rows: int, guidance: float, *, until: float = 1.0, rescale: float = 0.0,
    width: float = 1.0, switch: tuple[float, float] | None = None, early_stop: float | None = None,
) -> RunPlan:  # fmt: skip
    """A plan whose guidance follows SCHEDULES[kind] over x = row / (rows - 1), 0 at pure noise and 1 at the last row.

    until: after this fraction of the rows guidance is 1 and the unconditional call is not made (1.0 = never). It is not
    made either wherever guidance comes out as exactly 1. width: of every row; switch (share of the rows, width): from
    there on that width. Raises RequestError for values out of range.
    """
    if kind not in SCHEDULES:
        raise RequestError(f"guidance schedule {kind!r}", ", ".join(SCHEDULES), "Choose one of these")
    if rows < 1 or not 0 <= until <= 1:
        raise _refused(f"guidance until {until} of {rows} rows", "0 to 1, of at least one row")
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise _refused(f"guidance {guidance}", f"0 to {MAX_GUIDANCE:g}")
    scale = [SCHEDULES[kind](row / max(rows - 1, 1), guidance) if row < until * rows else 1.0 for row in range(rows)]
    scale = [min(max(float(np.float32(g)), 0.0), MAX_GUIDANCE) for g in scale]
    first = rows if switch is None else switch_row(rows, switch[0])
    widths = (width,) * first + (width if switch is None else switch[1],) * (rows - first)
    return RunPlan(tuple(scale), widths, tuple(g != 1 for g in scale), rescale, early_stop)


def switch_row(rows: int, share: float) -> int:
    """The first row of a table's `rows` that has the second width of a switch after `share` of the run (0..1)."""
    return min(rows, max(0, math.floor(share * rows + 0.5)))


def cap_guidance(plan: RunPlan, until_row: int) -> RunPlan:
    """The plan with guidance off from `until_row` on: what a policy may take away, never add."""
    keep = [row < until_row for row in range(plan.rows)]
    return replace(
        plan,
        guidance=tuple(g if kept else 1.0 for g, kept in zip(plan.guidance, keep, strict=True)),
        uncond=tuple(called and kept for called, kept in zip(plan.uncond, keep, strict=True)),
    )


def combine(uncond: np.ndarray, cond: np.ndarray, guidance: float, rescale: float = 0.0) -> np.ndarray:
    """Classifier-free guidance on model outputs [B,C,h,w] f32, as diffusers; rescale: Lin et al. 2023, eqs. 15-16."""
    guided = uncond + np.float32(guidance) * (cond - uncond)
    if rescale:
        axes = tuple(range(1, cond.ndim))
        ratio = cond.std(axis=axes, keepdims=True, ddof=1) / guided.std(axis=axes, keepdims=True, ddof=1)
        guided = np.float32(rescale) * (guided * ratio) + np.float32(1 - rescale) * guided
    return guided


@dataclass(frozen=True, eq=False)
class Stage:
    """Part of a staged run: `rows` rows of `table` (None: to its end), then the bridge into the next stage's table."""

    table: SamplerTable
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and not 1 <= self.rows <= self.table.rows:
            raise RequestError(f"a stage of {self.rows} rows", f"1 to {self.table.rows}", "Shorten the stage")


def run_stages(
    stages: Sequence[Stage], denoise: Callable[[SamplerTable, np.ndarray, int], np.ndarray], latents: np.ndarray,
    noise: Callable[[SamplerTable, int], np.ndarray], **options: Any,
) -> Iterator[Step]:  # fmt: skip
    """`loop.run` over several tables: yields their steps in turn; the last one's latents are the picture.

    A stage is left through the bridge after its rows' last UNet call, so no call is lost. denoise and noise get the
    table too. Ends early where the next table has no lower noise level (then x0 is the result: `step.denoised`).
    """
    state = None
    for number, stage in enumerate(stages):
        table, last = stage.table, None
        steps = run(table, partial(denoise, table), latents, partial(noise, table), state=state, **options)
        for count, step in enumerate(steps, 1):
            yield step
            last = step
            if count == stage.rows:
                break
        if last is None or number == len(stages) - 1:
            return
        state = bridge(table, last.row, last.sample, last.model_output, stages[number + 1].table)
