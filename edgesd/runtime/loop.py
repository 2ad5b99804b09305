"""The loop: a table's rows through a model. Every target ports this file and nothing else of a sampler.

    for step in run(table, denoise, init_latents(table, z), step_noise(source, shape, images)):
        ...              # step.row, step.timestep, step.denoised (x0), step.latents, step.state
    step.latents         # after the last row: the finished latents, not yet divided by the VAE's scale

Sums are float32, input columns first, then output columns, then noise, newest first, zero coefficients skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgesd.errors import RequestError
from edgesd.runtime.state import State
from edgesd.runtime.table import SamplerTable


@dataclass(frozen=True, eq=False)
class Step:
    """One finished row. sample: the UNet's input; latents: its next one, or the finished latents; state: to resume."""

    table: SamplerTable
    row: int
    timestep: float
    sample: np.ndarray
    model_output: np.ndarray
    latents: np.ndarray
    state: State

    @property
    def denoised(self) -> np.ndarray:
        """x0 as this row predicts it: the preview, and the picture when a run stops early."""
        skip, out = self.table.x0_coefficients(self.row)
        return skip * self.sample + out * self.model_output

    @property
    def last(self) -> bool:
        return self.row == self.table.rows - 1


def run(
    table: SamplerTable, denoise: Callable[[np.ndarray, int], np.ndarray], latents: np.ndarray,
    noise: Callable[[int], np.ndarray], start: int = 0, state: State | None = None,
    adjust: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Yields a Step per row, from `start` with latents = the UNet's input there, or from `state` (both then ignored).

    denoise(sample [B,C,h,w] f32, row) -> model output, same shape; noise(row) -> the row's normals, same shape;
    adjust(latents, row) -> latents may replace what the coming row gets (inpainting; row == table.rows: the result).
    Raises RequestError for a start that the table has no warm-up for.
    """
    state = State(start, start, (np.asarray(latents, np.float32),)) if state is None else state
    if state.start and state.start not in table.starts:
        raise RequestError(f"a start at row {state.start}", f"0 or one of {list(table.starts)}", "Choose one of these")
    inputs, outputs = list(state.inputs), list(state.outputs)
    for row in range(state.row, table.rows):
        outputs.insert(0, np.asarray(denoise(inputs[0], row), np.float32))
        input_coef, output_coef, noise_coef = table.coefficients(row, state.start)
        terms = [*zip(input_coef, inputs, strict=False), *zip(output_coef, outputs, strict=False)]
        if table.draws[row]:  # drawn even where it is not used: the order of draws is part of the result
            terms.append((noise_coef, noise(row)))
        total = input_coef[0] * inputs[0]
        for coef, array in terms[1:]:
            if coef:
                total += coef * array
        sample, model_output = inputs[0], outputs[0]
        inputs.insert(0, total if adjust is None else np.asarray(adjust(total, row + 1), np.float32))
        del inputs[table.input_coef.shape[1] :], outputs[table.output_coef.shape[1] - 1 :]
        after = State(row + 1, state.start, tuple(inputs), tuple(outputs))
        yield Step(table, row, float(table.timestep[row]), sample, model_output, inputs[0], after)
