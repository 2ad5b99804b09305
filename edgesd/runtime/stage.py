"""One model's share of a run: its table, its plan by row, and its UNet with all that it is told.

`sample_batch` (edgesd/runtime/generate.py) drives it; a governor may shorten, narrow or unguide what is left of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from edgesd.errors import DataError
from edgesd.runtime import loop, state
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.canvas import BatchNoise, Canvas
from edgesd.runtime.governed import MAX_CHANGES, Change, Governor
from edgesd.runtime.noise import Purpose
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.plan import RunPlan, combine, make_plan
from edgesd.runtime.settings import Settings
from edgesd.runtime.table import SamplerTable
from edgesd.runtime.text import Conditions, conditions


@dataclass
class RunLog:
    """What a run has done so far: with the loop's `State`, all that a resumed run must know.

    rows_run: finished rows; calls: UNet rows computed, of all pictures; draws: of noise; bridges: changes of table.
    steps, guidance_until, width: in force now, None = as the settings say. changes: what a governor had its way with.
    last: the UNet's input and output of the last row [B,C,h,w], which a change of table starts from.
    """

    rows_run: int = 0
    calls: int = 0
    draws: int = 0
    bridges: int = 0
    steps: int | None = None
    guidance_until: float | None = None
    width: float | None = None
    changes: list[Change] = field(default_factory=list)
    last: tuple[np.ndarray, np.ndarray] | None = None

    def to_json(self) -> dict[str, Any]:
        """All but `last`, which is kept with the state's arrays."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("changes", "last")} | {
            "changes": [asdict(change) for change in self.changes]
        }

    @classmethod
    def from_json(cls, data: Any) -> RunLog:
        """A log from a file, which may come from anywhere; DataError for what is none."""
        try:
            log = cls(**{**data, "changes": []})
            whole = (log.rows_run, log.calls, log.draws, log.bridges)
            good = all(type(n) is int and 0 <= n <= 1 << 20 for n in whole) and len(data["changes"]) <= MAX_CHANGES
            good = good and (log.steps is None or (type(log.steps) is int and 1 <= log.steps <= 1000))
            good = good and all(
                x is None or (isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= 1)
                for x, low in ((log.guidance_until, 0.0), (log.width, 1e-3))
            )
            good = good and log.last is None
        except (TypeError, KeyError):
            good = False
        if not good:
            raise DataError("the saved run's log does not parse", "what edgesd saved", "Draw the picture anew")
        log.changes = [Change.from_json(change) for change in data["changes"]]
        return log


class Stage:
    """One model's share of a run.

    log: kept up to date, and gone on from where it is an earlier run's. After `run`: step, the one it ended with;
    truncated: text that did not fit, by picture.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        table: SamplerTable,
        several: Sequence[Settings],
        noise: BatchNoise,
        cache: PromptCache,
        canvas: Canvas | None,
        log: RunLog | None = None,
    ) -> None:
        self._pipeline, self._first = pipeline, several[0]
        self.log = RunLog() if log is None else log
        self.step: loop.Step | None = None
        self._session, self._noise, self._canvas = pipeline.session, noise, canvas
        self._extra = None if canvas is None else canvas.channels()
        self._width: float | None = None
        self._table = table
        if self.log.steps is not None:
            self._enter(pipeline.table(several[0].sampler, self.log.steps))
        self._plan = self._make_plan()
        scale = pipeline.spec.latent.downscale
        size_px = (noise.shape[1] * scale, noise.shape[2] * scale)
        self._cond, self.truncated = conditions(pipeline, several, size_px, cache, negative=False)
        self._uncond: Conditions | None = None
        if any(self._plan.uncond):
            self._uncond, _ = conditions(pipeline, several, size_px, cache, negative=True)

    def _make_plan(self) -> RunPlan:
        """The plan of the table in force: the settings', less what has changed since."""
        first, embeds = self._first, self._pipeline.spec.guidance_embedding_dim > 0
        guidance = first.guidance_scale if first.guidance_scale > 1 and not embeds else 1.0
        until = first.guidance_until if self.log.guidance_until is None else self.log.guidance_until
        return make_plan(
            first.guidance_schedule, self._table.rows, guidance, until=until, rescale=first.guidance_rescale,
            early_stop=first.early_stop, width=first.width if self.log.width is None else self.log.width,
            switch=first.switch if self.log.width is None else None,
        )  # fmt: skip

    def run(
        self, latents: np.ndarray, at: int, end: int, resume: state.State | None = None,
        governor: Governor | None = None,
    ) -> Iterator[loop.Step]:  # fmt: skip
        """Rows at .. end-1 (fewer with early stop); latents: the UNet's input at row `at`; resume: goes on there.

        A governor may send the rest of the run through another table.
        """
        if resume is not None:
            end = end if self.log.steps is None else self._table.rows
            self._draw_again(at, resume.row)
        if governor is not None and self.log.rows_run == 0:
            self.log.changes += governor.ask(0, 0)
        elif governor is not None and resume is not None and self.log.last is not None and resume.row < end:
            # What an uninterrupted run is asked after the row that this one was stopped behind.
            before = loop.Step(self._table, resume.row - 1, 0.0, *self.log.last, resume.inputs[0], resume)
            if (entered := self._change(before, governor)) is not None:
                latents, at, end, resume = entered.inputs[0], entered.row, self._table.rows, None
        yield from self._rows(latents, at, end, resume, governor)

    def _rows(
        self, latents: np.ndarray, at: int, end: int, resume: state.State | None, governor: Governor | None
    ) -> Iterator[loop.Step]:
        adjust = None if self._canvas is None else self._canvas.adjust
        before: np.ndarray | None = None
        for step in loop.run(self._table, self._denoise, latents, self._step_noise, at, resume, adjust):
            self.step, self.log.last = step, (step.sample, step.model_output)
            self.log.rows_run += 1
            yield step
            if step.row + 1 == end:
                return
            if self._plan.early_stop is not None:
                x0 = step.denoised
                if before is not None and self._plan.settled(before, x0):
                    return
                before = x0
            if governor is not None and (entered := self._change(step, governor)) is not None:
                yield from self._rows(entered.inputs[0], entered.row, self._table.rows, None, governor)
                return

    def _draw_again(self, at: int, row: int) -> None:
        """A stream of noise, as torch's, must have drawn what the first part drew."""
        drawn = self.log.draws if self.log.rows_run else int(self._table.draws[at:row].sum())
        for _ in range(drawn):
            self._noise(row, Purpose.STEP)

    def _step_noise(self, row: int) -> np.ndarray:
        """A row's normals; after a bridge no row draws what a row before it drew."""
        self.log.draws += 1
        return self._noise(row + (self.log.bridges << 16), Purpose.STEP)

    def _change(self, step: loop.Step, governor: Governor) -> state.State | None:
        """Lets the governor have its way after `step`; where that is another table, the state to enter it with."""
        entered = None
        for change in governor.ask(self.log.rows_run, self.log.calls):
            bridged = None if change.kind == "pause" else self._bridge(step, change.steps)
            if change.kind == "shorten" and bridged is None and change.steps != self._table.steps:
                continue  # it would save nothing
            entered = bridged if bridged is not None else entered
            self.log.guidance_until = change.guidance_until
            if change.kind in ("narrow", "shorten"):
                self.log.width = change.width
            self._plan = self._make_plan()
            self.log.changes.append(change)
        return entered

    def _bridge(self, step: loop.Step, steps: int) -> state.State | None:
        """Enters the table of so many steps; None where it is the one in force, or has no fewer rows left."""
        if steps == self._table.steps:
            return None
        other = self._pipeline.table(self._first.sampler, steps)
        bridged = state.bridge(step.table, step.row, step.sample, step.model_output, other)
        if not 0 < other.rows - bridged.row < step.table.rows - step.row - 1:
            return None
        self.log.bridges, self.log.steps = self.log.bridges + 1, steps
        self._enter(other)
        latents = bridged.inputs[0]
        latents = latents if self._canvas is None else self._canvas.adjust(latents, bridged.row)
        return state.State(bridged.row, bridged.row, (latents,))

    def _enter(self, table: SamplerTable) -> None:
        self._table = table
        if self._canvas is not None:
            self._canvas = replace(self._canvas, table=table)

    def early(self, step: loop.Step) -> str:
        """What to say of a run that ended with `step`."""
        saved = self._plan.calls(step.row + 1)
        return f"stopped early after row {step.row + 1} of {step.table.rows}: {saved} UNet calls saved"

    def _denoise(self, sample: np.ndarray, row: int) -> np.ndarray:
        """Guidance over one or two halves, at the row's width."""
        if (width := self._plan.width[row]) != self._width:
            self._session.use_width("unet", width)
            self._width = width
        if not self._plan.uncond[row] or self._uncond is None:
            return self._predict(sample, row, self._cond)
        told = {name: np.concatenate([self._uncond[name], value]) for name, value in self._cond.items()}
        both = self._predict(np.concatenate([sample, sample]), row, told)
        uncond, cond = both[: len(sample)], both[len(sample) :]
        return combine(uncond, cond, self._plan.guidance[row], self._plan.rescale)

    def _predict(self, sample: np.ndarray, row: int, told: Conditions) -> np.ndarray:
        """The UNet on any number of rows, in calls of the size that the session takes."""
        if self._extra is not None:
            sample = np.concatenate([sample, np.repeat(self._extra, len(sample) // len(self._extra), axis=0)], axis=1)
        self.log.calls += len(sample)
        sizes = self._session.batches("unet")
        outputs, done = [], 0
        while done < len(sample):
            left = len(sample) - done
            size = left if sizes is None else max(n for n in sizes if n <= left)
            part = slice(done, done + size)
            inputs = {name: value[part] for name, value in told.items()}
            inputs |= {"sample": sample[part], "timestep": self._table.timestep[row : row + 1]}
            outputs.append(self._session.run("unet", inputs)["model_output"])
            done += size
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
