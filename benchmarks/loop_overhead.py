"""Time per step outside the UNet: `python benchmarks/loop_overhead.py` prints one JSON object.

Runs each table over 4x64x64 latents with a model that returns an array made before, so that what is left is the loop.
Medians over repeats; noise_ms is one row's Philox normals, drawn by the stochastic samplers alone.
"""

import json
import statistics
import time

import numpy as np

from edgesd.runtime.loop import run
from edgesd.runtime.noise import Philox, Purpose
from edgesd.sampling.compile import compile_table

SHAPE, STEPS, REPEATS = (1, 4, 64, 64), 50, 41
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = ("ddim", "euler_a", "dpmpp_2m_karras", "dpmpp_3m", "pndm", "unipc_3")


def median_ms(work, per: int = 1) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) / per)
    return round(1e3 * statistics.median(times), 4)


def main() -> None:
    source = Philox(0)
    z = source.normal(SHAPE, 0, 0, Purpose.START)
    output = source.normal(SHAPE, 0, 1, Purpose.STEP)

    def loop_ms(name: str, preview: bool) -> float:
        table = compile_table(name, SD, STEPS)

        def work() -> None:
            for step in run(table, lambda u, row: output, z, lambda row: output):
                if preview:
                    _ = step.denoised

        return median_ms(work, table.rows)

    print(json.dumps({
        "shape": SHAPE, "numpy": np.__version__,
        "step_ms": {name: loop_ms(name, False) for name in NAMES},
        "step_with_preview_ms": {name: loop_ms(name, True) for name in NAMES},
        "noise_ms": median_ms(lambda: source.normal(SHAPE[1:], 0, 2, Purpose.STEP)),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
