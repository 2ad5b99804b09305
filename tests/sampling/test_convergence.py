"""Tables on Gaussian data, where the ideal model is affine and the answer has a closed form."""

import numpy as np
import pytest
from samplers import SD

from edgesd.runtime.loop import run
from edgesd.runtime.noise import Philox, Purpose
from edgesd.runtime.state import init_latents
from edgesd.sampling.compile import compile_table

MEAN, STD = 0.4, 0.6
SHAPE = (1, 4, 64, 64)


def ideal(table):
    """E[eps | u] for data N(MEAN, STD^2): sigma (u - alpha MEAN) / (alpha^2 STD^2 + sigma^2)."""

    def denoise(u, row):
        a, s = float(table.alpha[row]), float(table.sigma[row])
        return (s * (u - a * MEAN) / (a * a * STD * STD + s * s)).astype(np.float32)

    return denoise


def on_the_ode(table, u, row_from, row_to):
    """The exact probability flow: u keeps its place in units of its marginal's spread."""
    (a, s), (b, t) = ((float(table.alpha[r]), float(table.sigma[r])) for r in (row_from, row_to))
    return b * MEAN + np.sqrt((b * STD) ** 2 + t * t) / np.sqrt((a * STD) ** 2 + s * s) * (u - a * MEAN)


@pytest.mark.parametrize(("name", "order"), [("euler_karras", 1), ("heun_karras", 2), ("dpmpp_2m_karras", 2)])
def test_order_of_convergence(name, order):
    """Error at the last row's input (the step to sigma 0 after it has no order) against the step count, log to log."""
    counts, errors = (16, 32, 64, 128), []
    z = np.linspace(-2, 2, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    for steps in counts:
        table = compile_table(name, SD, steps)
        begin = init_latents(table, z)
        last = [s.sample for s in run(table, ideal(table), begin, lambda row: z)][-1]
        errors.append(np.abs(last - on_the_ode(table, begin.astype(float), 0, table.rows - 1)).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize(("name", "steps"), [
    ("ddpm", 100), ("euler_a", 100), ("kdpm2_a", 100), ("dpmpp_2m_sde", 100), ("dpmpp_3m_sde_karras", 100),
    ("dpm_single_sde_karras", 300), ("sa", 100),
])  # fmt: skip
def test_stochastic_samplers_keep_mean_and_variance(name, steps):
    """16,384 samples: standard errors 0.005 of the mean and 0.003 of the spread; the rest is the steps' own error."""
    table = compile_table(name, {**SD, "timestep_spacing": "trailing"}, steps)
    source = Philox(5)
    begin = init_latents(table, source.normal(SHAPE, 0, 0, Purpose.START))
    latents = list(run(table, ideal(table), begin, lambda row: source.normal(SHAPE, 0, row, Purpose.STEP)))[-1].latents
    assert latents.mean() == pytest.approx(MEAN, abs=0.04)
    assert latents.std() == pytest.approx(STD, abs=0.04)
