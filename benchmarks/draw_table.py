"""Draws docs/sampling_table.png, the figure of docs/sampling.md: `python benchmarks/draw_table.py` (matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from edgesd.runtime.table import SamplerTable
from edgesd.sampling.compile import compile_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TARGET = Path(__file__).parents[1] / "docs" / "sampling_table.png"


def draw(axis, table: SamplerTable, title: str, start: int = 0) -> None:
    """One line per row: timestep, alpha, sigma, then the coefficients; a run from `start` shows its warm-up."""
    rows = range(start, table.rows)
    coefs = [np.r_[tuple(np.atleast_1d(c) for c in table.coefficients(row, start))] for row in rows]
    p, q = table.input_coef.shape[1], table.output_coef.shape[1]
    names = [*(f"$u_{{i{-k or ''}}}$" for k in range(p)), *(f"$e_{{i{-k or ''}}}$" for k in range(q)), "$z_i$"]
    levels = [(f"{table.timestep[r]:.0f}", f"{table.alpha[r]:.3f}", f"{table.sigma[r]:.3f}") for r in rows]
    axis.imshow(np.array(coefs), cmap="RdBu", vmin=-2.5, vmax=2.5, aspect="auto")
    for y, row in enumerate(coefs):
        for x, value in enumerate(row):
            shade = "white" if abs(value) > 1.9 else "black"
            axis.text(x, y, f"{value:.3f}" if value else "·", ha="center", va="center", fontsize=8, color=shade)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(
        range(len(levels)), [f"{r}:  t {t}  α {a}  σ {s}" for r, (t, a, s) in zip(rows, levels, strict=True)]
    )
    axis.tick_params(length=0, labelsize=8)
    axis.xaxis.tick_top()
    axis.set_title(title, fontsize=10, pad=18)
    for spine in axis.spines.values():
        spine.set_visible(False)


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    dpm = compile_table("dpmpp_2m_karras", SD, 8)
    draw(axes[0], dpm, "dpmpp_2m_karras, 8 steps")
    draw(axes[1], dpm, "the same, started at row 3 (row 3 is its warm-up)", 3)
    draw(axes[2], compile_table("euler_a", SD, 8), "euler_a, 8 steps")
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
