"""Plans: what they allow, what they cost, and staged runs through the bridge."""

import numpy as np
import pytest
from samplers import SHAPE, START, model, relative, step_noise

from edgesd.errors import RequestError
from edgesd.runtime.plan import SCHEDULES, RunPlan, Stage, cap_guidance, combine, make_plan, run_stages
from edgesd.runtime.state import init_latents
from edgesd.sampling.compile import compile_table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("rows", [1, 2, 7, 50])
def test_every_schedule_at_every_length(kind, rows):
    plan = make_plan(kind, rows, 7.5)
    assert plan.rows == rows
    assert all(1 <= g <= 14.01 for g in plan.guidance)
    assert plan.uncond == tuple(g != 1 for g in plan.guidance)


def test_shapes_of_the_schedules():
    linear, cosine, interval, three = (
        make_plan(k, 101, 7.0).guidance for k in ("linear", "cosine", "interval", "three_stage")
    )
    assert linear[0] == cosine[0] == 1
    assert linear[-1] == cosine[-1] == 13
    assert np.mean(linear) == pytest.approx(7) == pytest.approx(np.mean(cosine))
    assert (np.diff(linear) > 0).all()
    assert (np.diff(cosine) > 0).all()
    assert interval[0] == interval[-1] == 1
    assert interval[50] == 7
    assert three[0] == three[20] == 3
    assert three[60] == three[-1] == 7
    assert (np.diff(three) >= 0).all()


def test_guidance_until_skips_the_calls_after_it():
    plan = make_plan("constant", 20, 7.5, until=0.75)
    assert plan.uncond == (True,) * 15 + (False,) * 5
    assert plan.guidance[14:16] == (7.5, 1.0)
    assert plan.calls() == 35
    assert plan.calls(10) == 15
    assert make_plan("constant", 20, 7.5, until=0.0).calls() == make_plan("constant", 20, 1.0).calls() == 20
    capped = cap_guidance(make_plan("constant", 20, 7.5), 15)
    assert (capped.guidance, capped.uncond) == (plan.guidance, plan.uncond)


@pytest.mark.parametrize("bad", [
    {"guidance": -1.0}, {"guidance": float("nan")}, {"guidance": 1e4}, {"until": 1.5}, {"until": float("nan")},
    {"rescale": 1.5}, {"rescale": -0.1}, {"width": 0.0}, {"width": 1.5}, {"early_stop": 0.0}, {"early_stop": 2.0},
    {"rows": 0}, {"kind": "no_such"},
])  # fmt: skip
def test_settings_out_of_range_are_refused(bad):
    good = {"kind": "constant", "rows": 4, "guidance": 7.5}
    with pytest.raises(RequestError):
        make_plan(**{**good, **bad})


def test_a_plan_that_cannot_run_cannot_be_made():
    with pytest.raises(RequestError, match="length"):
        RunPlan((1.0,), (1.0, 1.0), (False,))
    with pytest.raises(RequestError, match="unconditional"):
        RunPlan((7.5,), (1.0,), (False,))


def test_combine_is_diffusers_guidance():
    torch = pytest.importorskip("torch")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    rng = np.random.default_rng(0)
    uncond, cond = rng.standard_normal((2, 3, 4, 8, 8)).astype(np.float32)
    guided = uncond + 7.5 * (cond - uncond)
    assert relative(combine(uncond, cond, 7.5), guided) < 1e-6
    want = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(cond), 0.7).numpy()
    assert relative(combine(uncond, cond, 7.5, 0.7), want) < 1e-6


def test_settled_looks_at_every_picture():
    plan = make_plan("constant", 4, 1.0, early_stop=0.01)
    x0 = np.ones((2, 4, 8, 8), np.float32)
    moved = x0.copy()
    moved[1] *= 1.5
    assert plan.settled(x0 * 1.005, x0)
    assert not plan.settled(moved, x0)
    assert not make_plan("constant", 4, 1.0).settled(x0, x0)


def test_stages_run_few_rows_of_one_table_then_the_rest_of_another():
    coarse, fine = compile_table("dpmpp_2m_karras", SD, 6), compile_table("ddim", SD, 20)
    calls = []

    def denoise(table, u, row):
        calls.append((table.name, row))
        return model(u, float(table.timestep[row]))

    stages = [Stage(coarse, 2), Stage(fine)]
    steps = list(run_stages(stages, denoise, init_latents(coarse, START), lambda table, row: step_noise(row)))
    assert [c for c in calls if c[0] == coarse.name] == [(coarse.name, 0), (coarse.name, 1)]
    rest = [row for name, row in calls if name == "ddim"]
    assert rest == list(range(rest[0], 20))
    assert rest[0] > 0
    assert fine.sigma[rest[0]] < coarse.sigma[1] <= fine.sigma[rest[0] - 1]  # the nearest lower level
    assert len(steps) == len(calls)
    assert steps[-1].last
    assert steps[-1].latents.shape == SHAPE
    for rows in (0, 7):
        with pytest.raises(RequestError, match="stage"):
            Stage(coarse, rows)


def test_stages_of_one_table_are_one_ddim_run():
    """The bridge is a DDIM step, so leaving DDIM for itself changes nothing."""
    table = compile_table("ddim", {**SD, "timestep_spacing": "trailing"}, 10)

    def final(stages):
        return list(run_stages(stages, lambda t, u, row: model(u, float(t.timestep[row])), init_latents(table, START),
                               lambda t, row: START))[-1].latents  # fmt: skip

    assert relative(final([Stage(table, 4), Stage(table)]), final([Stage(table)])) < 1e-5
