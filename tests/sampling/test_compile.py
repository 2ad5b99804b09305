"""Tables against diffusers' own schedulers: same noise, the same function in place of the UNet."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from samplers import SHAPE, START, STEPS, config_for, diffusers_run, model, relative, step_noise, table_run

from edgesd.errors import RequestError
from edgesd.runtime.loop import run
from edgesd.runtime.state import add_noise
from edgesd.sampling.compile import banded, compile_table, compile_tables, dense
from edgesd.sampling.schedules import SAMPLERS, SIGMAS, make_scheduler, names

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
OF_SD = [n for n in SAMPLERS if not n.startswith(("flow", "edm", "ipndm"))]
# These subtract nearly equal numbers (a prediction from a sample of size 80, or over a tiny sigma) in float32:
# compared in float32 the reference's own rounding would be what shows.
WIDE = ("heun", "kdpm2", "kdpm2_a", "edm_euler", "flow_heun")
# What diffusers itself does not implement.
LACKS = {(name, "sample") for name in ("euler_a", "kdpm2", "kdpm2_a", "pndm")}


def check(name, step_counts, wide=False, **changes):
    """Runs every step count on the table and on diffusers; returns the tables."""
    config = config_for(name, **changes)
    scheduler = make_scheduler(name, config)
    tables = compile_tables(name, config, step_counts)
    for table in tables:
        want = diffusers_run(deepcopy(scheduler), table.steps, wide=wide or name in WIDE)
        assert relative(table_run(table)[-1].latents, want) <= 1e-5, (name, table.steps, changes)
    return tables


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_at_every_step_count(name):
    # One step of IPNDM divides by alpha 0: zeros in both, nothing to compare.
    check(name, STEPS[1:] if name == "ipndm" else STEPS)


@pytest.mark.parametrize("name", OF_SD)
def test_prediction_types_and_spacings(name):
    for prediction, spacing in product(PREDICTIONS, SPACINGS):
        changes = {"prediction_type": prediction, "timestep_spacing": spacing}
        if (name, prediction) in LACKS:
            with pytest.raises(RequestError, match="prediction"):
                compile_table(name, config_for(name, **changes), 4)
        else:
            assert check(name, (2, 7), **changes)[0].prediction_type == prediction


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_SD)
def test_the_whole_grid(name):
    for prediction, spacing in product(PREDICTIONS, SPACINGS):
        if (name, prediction) not in LACKS:
            check(name, STEPS, prediction_type=prediction, timestep_spacing=spacing)


@pytest.mark.parametrize("name", [n for n in names() if n.endswith(SIGMAS)])
def test_sigma_spacings(name):
    base, sigmas = name.rsplit("_", 1)
    config = config_for(name)
    want = diffusers_run(make_scheduler(base, config).from_config(
        make_scheduler(base, config).config, **{f"use_{sigmas}_sigmas": True}), 7)  # fmt: skip
    assert relative(table_run(compile_table(name, config, 7))[-1].latents, want) <= 1e-5


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "unipc", "lcm", "tcd"])
def test_zero_terminal_snr_with_v(name):
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    for table in check(name, (1, 4, 20), wide=True, **zero):  # sigma 4096 in the first row
        assert table.alpha[0] == 0 or name not in ("ddim", "lcm", "tcd")


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpm_single", "unipc", "deis", "sa"])
def test_flow_checkpoints_run_on_multistep_samplers(name):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
    table = compile_table(name, config, 7)
    assert table.prediction_type == "flow"
    np.testing.assert_allclose(table.alpha + table.sigma, 1, atol=1e-6)
    scheduler = make_scheduler(name, config)
    assert scheduler.config.flow_shift == 3.0
    assert relative(table_run(table)[-1].latents, diffusers_run(scheduler, 7, wide=True)) <= 1e-5


def unrolled(table, start, count):
    """The recurrence run on vectors over (input at the start, outputs, noises): what `dense` reads off diffusers."""
    basis = np.eye(1 + 2 * count)
    inputs = [basis[0]]
    for k in range(count):
        coef_in, coef_out, coef_noise = table.coefficients(start + k, start)
        made = coef_noise.astype(float) * basis[1 + count + k]
        made = made + sum(c.astype(float) * inputs[k - p] for p, c in enumerate(coef_in) if c)
        made = made + sum(c.astype(float) * basis[1 + k - q] for q, c in enumerate(coef_out) if c)
        inputs.append(made)
    return np.array(inputs)


@pytest.mark.parametrize("name", SAMPLERS)
def test_dense_equals_banded_from_every_kind_of_start(name):
    scheduler = make_scheduler(name, config_for(name))
    for table in compile_tables(name, config_for(name), (7, 20)):
        assert table.input_coef.shape[1] <= 4
        assert table.output_coef.shape[1] <= 5
        for start in (0, *list(table.starts)[:3], *list(table.starts)[-2:]):
            want, _ = dense(scheduler, table.steps, start)
            got = unrolled(table, start, table.rows - start)
            assert relative(got, want) <= 1e-6, (name, table.steps, start)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "ipndm"])  # IPNDM in diffusers cannot noise an image
def test_starting_part_way_is_diffusers_image_to_image(name):
    config = config_for(name)
    picture = np.linspace(-1, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    tables = {table.steps: table for table in compile_tables(name, config, (4, 10, 20))}
    fresh = make_scheduler(name, config)
    for steps, strength in ((4, 0.5), (10, 0.3), (10, 0.75), (10, 1.0), (20, 0.64)):
        table, scheduler = tables[steps], deepcopy(fresh)
        start = table.start_row(strength)
        assert start == (steps - min(int(steps * strength), steps)) * scheduler.order
        want = diffusers_run(scheduler, steps, start, picture, wide=name in WIDE)
        got = table_run(table, add_noise(table, start, picture, START), start=start)[-1].latents
        assert relative(got, want) <= 1e-5, (steps, strength)


@pytest.mark.parametrize("name", [n for n in OF_SD if n not in ("heun", "kdpm2", "kdpm2_a")])
def test_inpainting_is_diffusers_blending(name):
    """Soft masks too, where rows came as they stand; with cancelled memory a pixel is kept or replaced, not mixed.

    Diffusers finds the level of a Heun or KDPM2 row by its timestep, which is there twice: those are not compared.
    """
    soft = [1, 1, 0.3, 0.7, 0, 0] if name not in ("unipc", "unipc_3", "sa") else [1, 1, 1, 0, 0, 0]
    config = config_for(name)
    picture = np.linspace(-1, 1, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    mask = np.array(soft, np.float32)
    table = compile_table(name, config, 10)
    start = table.start_row(0.8)

    def blend(latents, row):
        return (1 - mask) * add_noise(table, row, picture, START) + mask * latents

    steps = table_run(table, add_noise(table, start, picture, START), start=start, adjust=blend)
    want = diffusers_run(make_scheduler(name, config), 10, start, picture, mask=mask)
    assert relative(steps[-1].latents, want) <= 1e-5


def test_a_strength_that_leaves_no_step_is_refused():
    table = compile_table("ddim", config_for("ddim"), 4)
    for strength in (0.2, 0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(RequestError, match="strength"):
            table.start_row(strength)


# PNDM visits a level twice; IPNDM throws x0 away in its first row, where alpha is 0; the others add noise at will.
@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("pndm", "ipndm", "lcm", "tcd", "flow_lcm")])
def test_a_model_that_knows_the_answer_is_right_at_every_row(name):
    """With x0 and eps fixed, the output that says so must give previews of exactly x0, and x0 at the end.

    Only without noise does u stay on the line alpha x0 + sigma eps; the stochastic ones are held to it row by row.
    """
    x0 = model(START, 3.0)
    for prediction in ("epsilon", "v_prediction"):
        if name.startswith(("flow", "edm")) and prediction == "v_prediction":
            continue
        table = compile_table(name, config_for(name, prediction_type=prediction), 7)

        def exact(u, row, table=table):
            skip, out = table.x0_coefficients(row)
            return (x0 - skip * u) / out

        line = add_noise(table, 0, x0, START)
        for step in run(table, exact, line, lambda row: 0 * START):
            np.testing.assert_allclose(step.denoised, x0, atol=2e-4)
            if not table.draws.any() and not step.last:
                np.testing.assert_allclose(step.latents, add_noise(table, step.row + 1, x0, START), atol=2e-4)
        assert relative(step.latents, x0) < 0.15  # DDIM and DEIS end a little above sigma 0


@pytest.mark.parametrize(("config", "match"), [
    ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clips"),
    ({"_class_name": "DDIMScheduler"}, "clips"),  # diffusers' default
    ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, "thresholds"),
    ({"_class_name": "DPMSolverSDEScheduler"}, "torchsde"),
    ({"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "learned"}, "variance"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "picture size"),
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "PNDMScheduler makes no table"),
    ({"_class_name": "NoSuchScheduler"}, "NoSuchScheduler"),
    ({}, "checkpoint"),
])  # fmt: skip
def test_what_cannot_be_a_table_is_refused_by_name(config, match):
    with pytest.raises(RequestError, match=match) as caught:
        compile_table("default", config, 20)
    assert caught.value.do


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, "20"])
def test_step_counts_out_of_range_are_refused(steps):
    with pytest.raises(RequestError, match="steps"):
        compile_table("ddim", config_for("ddim"), steps)


def test_lcm_refuses_more_steps_than_it_was_trained_for():
    with pytest.raises(RequestError, match="51 steps of LCMScheduler"):
        compile_table("lcm", config_for("lcm"), 51)


def test_the_default_sampler_is_the_checkpoints_own():
    config = config_for("", _class_name="EulerDiscreteScheduler", use_karras_sigmas=True)
    own, named = (compile_table(name, config, 6) for name in ("default", "euler_karras"))
    for key in ("timestep", "input_coef", "output_coef", "alpha"):
        np.testing.assert_array_equal(getattr(own, key), getattr(named, key))


def test_compiling_leaves_diffusers_as_it_was():
    from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

    before = module.randn_tensor
    scheduler = make_scheduler("euler_a", config_for("euler_a"))
    first, again = banded(scheduler, 5), banded(scheduler, 5)
    assert module.randn_tensor is before
    assert scheduler.num_inference_steps is None
    np.testing.assert_array_equal(first.coef, again.coef)
    assert step_noise(1).shape == SHAPE


def test_draws_follow_diffusers_even_where_noise_is_not_used():
    """Ancestral Euler draws in its last row too, and multiplies by 0: a torch generator must move on all the same."""
    table = compile_table("euler_a", config_for("euler_a"), 5)
    assert table.draws.all()
    assert table.noise_coef[-1] == 0
    seen = []
    quiet = replace(table, draws=np.zeros(5, bool))
    for each in (table, quiet):
        rows = []
        list(run(each, lambda u, row: u, START, lambda row, rows=rows: rows.append(row) or START))
        seen.append(rows)
    assert seen == [[0, 1, 2, 3, 4], []]
