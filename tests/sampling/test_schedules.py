"""The names users know, and what a checkpoint's config makes of them."""

import pytest
from samplers import SD

from edgesd.errors import RequestError
from edgesd.sampling.compile import compile_table
from edgesd.sampling.schedules import SAMPLERS, default_sampler, describe, make_scheduler, names

REQUIRED = {
    "ddim", "ddpm", "euler", "euler_a", "heun", "kdpm2", "kdpm2_a", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_3m",
    "dpmpp_2m_sde", "dpm_single", "unipc", "pndm", "ipndm", "lms", "deis", "sa", "lcm", "tcd", "flow_euler",
    "flow_heun", "edm_euler", "edm_dpmpp_2m",
}  # fmt: skip


def test_every_promised_name_is_there_once():
    assert set(names()) >= REQUIRED
    assert len(set(names())) == len(names())


def test_describe_counts_the_calls_a_table_makes():
    told = {info.name: info for info in describe(10)}
    assert tuple(told) == names()
    assert told["heun"].calls == 19
    assert told["pndm"].calls == 11
    assert [told[name].stochastic for name in ("euler", "euler_a", "lcm", "dpmpp_2m_sde_karras")] == [
        False,
        True,
        True,
        True,
    ]
    for name in ("ddim", "kdpm2_a_karras", "unipc"):
        table = compile_table(name, SD, 10)
        assert (told[name].calls, told[name].stochastic) == (table.rows, bool(table.noise_coef.any()))


@pytest.mark.parametrize("name", names())
def test_a_checkpoint_that_uses_a_sampler_has_it_as_default(name):
    base = {"_class_name": SAMPLERS[name][0]} if name.startswith(("flow", "edm", "ipndm")) and name in SAMPLERS else SD
    scheduler = make_scheduler(name, base)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    assert default_sampler(config) == name


def test_samplers_that_cannot_run_so_many_steps_say_so():
    told = {info.name: info.calls for info in describe(60)}
    assert told["lcm"] is None
    assert told["euler"] == 60
    with pytest.raises(RequestError, match="steps"):
        describe(0)


@pytest.mark.parametrize(("config", "name"), [
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1,
      "clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "pndm"),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "timestep_spacing": "leading",
      "use_karras_sigmas": False, "clip_sample": False, "skip_prk_steps": True}, "euler"),
    ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, "euler_a"),
    ({"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"}, "ddim"),
    ({"_class_name": "DDIMScheduler"}, "ddim"),
    ({"_class_name": "DPMSolverSinglestepScheduler"}, "default"),  # diffusers' lower_order_final is false there
    ({"_class_name": "PNDMScheduler"}, "default"),  # and so is skip_prk_steps here
])  # fmt: skip
def test_defaults_of_published_checkpoints(config, name):
    assert default_sampler(config) == name


def test_a_config_of_its_own_kind_is_called_default():
    assert default_sampler({**SD, "_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"}) == "default"
    assert default_sampler({**SD, "_class_name": "DDIMScheduler", "clip_sample": True}) == "default"
    assert default_sampler({}) == "default"


def test_a_name_states_its_own_options_whatever_the_checkpoint_had():
    karras = {
        **SD,
        "use_karras_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "clip_sample": True,
    }
    assert not make_scheduler("euler", karras).config.use_karras_sigmas
    plain = make_scheduler("dpmpp_2m", karras).config
    assert (plain.algorithm_type, plain.solver_order, plain.use_karras_sigmas) == ("dpmsolver++", 2, False)
    assert not make_scheduler("ddim", karras).config.clip_sample
    assert make_scheduler("ddim", {**SD, "beta_end": 0.02}).config.beta_end == 0.02


@pytest.mark.parametrize(("name", "config"), [
    ("no_such", SD), ("", SD), ("euler_", SD), ("ddim_karras", SD), ("euler_a_karras", SD), ("_karras", SD),
    ("flow_euler", SD), ("edm_euler", SD), ("ipndm", SD),
    ("euler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    ("dpmpp_2m", {"_class_name": "EDMEulerScheduler"}),
    ("euler", {**SD, "beta_schedule": "no_such"}),
])  # fmt: skip
def test_names_and_checkpoints_that_do_not_fit_are_refused(name, config):
    with pytest.raises(RequestError) as caught:
        make_scheduler(name, config)
    assert caught.value.allowed
