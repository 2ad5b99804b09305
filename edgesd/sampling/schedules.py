"""The names users know -> diffusers schedulers and their options. To add a sampler, add a line to SAMPLERS.

`make_scheduler` loads the scheduler class with the checkpoint's own noise schedule (betas, prediction type, spacing)
and the named options on top, as `SomeScheduler.from_config(pipe.scheduler.config, **options)` does in diffusers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgesd.errors import RequestError

# Options that from_config would carry over from the checkpoint's sampler into another: every name states its own.
_PLAIN: dict[str, Any] = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
    "thresholding": False, "clip_sample": False,
}  # fmt: skip
_DPM: dict[str, Any] = {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero",
    "euler_at_final": False, "lower_order_final": True, "use_flow_sigmas": False, "variance_type": None,
}  # fmt: skip
_SDE = {**_DPM, "algorithm_type": "sde-dpmsolver++"}

# name -> (scheduler, options). Names of the schedulers in _RESPACED may also end in one of SIGMAS: euler_karras.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"variance_type": "fixed_small"}),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "zero"}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", _DPM),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 3}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
    "dpm_single": ("DPMSolverSinglestepScheduler", _DPM),
    "dpm_single_sde": ("DPMSolverSinglestepScheduler", _SDE),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero", "use_flow_sigmas": False}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "zero", "use_flow_sigmas": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ipndm": ("IPNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho", "use_flow_sigmas": False}),
    "sa": ("SASolverScheduler", {"algorithm_type": "data_prediction", "use_flow_sigmas": False}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_lcm": ("FlowMatchLCMScheduler", {}),
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler", {"solver_order": 2}),
    "edm_dpmpp_3m": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
}
SIGMAS = ("karras", "exponential", "beta")
_RESPACED = {f"{kind}Scheduler" for kind in (
    "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete", "DPMSolverMultistep",
    "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver",
)}  # fmt: skip


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of sampler `name` on a checkpoint's scheduler config; "default" is the config's own.

    Raises RequestError for an unknown name, or a config whose scheduler diffusers does not have.
    """
    import diffusers

    if name == "default":
        kind, options = str(config.get("_class_name", "")), {}
    else:
        base, sigmas = _split(name)
        kind, options = SAMPLERS[base][0], {**_PLAIN, **SAMPLERS[base][1]}
        options |= {f"use_{sigmas}_sigmas": True} if sigmas else {}
    if kind == "DPMSolverSDEScheduler":
        raise RequestError(f"{kind} draws its noise from torchsde", "noise drawn row by row", "Use dpmpp_2m_sde")
    scheduler = getattr(diffusers, kind, None) if kind.endswith("Scheduler") else None
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        raise RequestError(f"scheduler {kind!r} of the checkpoint", "a scheduler of diffusers", "Pass --sampler")
    known = set(scheduler._get_init_keys(scheduler))
    if name != "default":
        options = _for_family(name, kind, options, known, config)
    settings = {key: value for key, value in {**config, **options}.items() if key in known}
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        return scheduler(**settings)
    except (ValueError, NotImplementedError, TypeError, ImportError) as error:
        raise RequestError(f"{kind} ({error})", "settings that diffusers accepts", "Pass --sampler") from None


def _split(name: str) -> tuple[str, str]:
    """(sampler, sigma spacing or "") of a name; RequestError for a name there is not."""
    base, _, sigmas = name.rpartition("_")
    if name in SAMPLERS:
        return name, ""
    if base in SAMPLERS and sigmas in SIGMAS and SAMPLERS[base][0] in _RESPACED:
        return base, sigmas
    raise RequestError(f"sampler {name[:64]!r}", f"{', '.join(SAMPLERS)}, default", "Choose one of these")


def _for_family(
    name: str, kind: str, options: dict[str, Any], known: set[str], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The options with what the checkpoint's kind of noise asks for; refuses a sampler made for another kind."""
    sampler, model = _family(kind, {}), _family(str(config.get("_class_name", "")), config)
    if model == "flow" and "use_flow_sigmas" in known:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return {**options, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    if sampler != model:
        fit = ", ".join(n for n, (k, _) in SAMPLERS.items() if _family(k, {}) == model)
        raise RequestError(f"sampler {name} on a checkpoint with {model} noise", fit, "Choose one of these")
    return options


def _family(kind: str, config: Mapping[str, Any]) -> str:
    """Kinds of noise that one model knows: "flow" (straight lines), "edm", "ipndm" (its own cosine), "diffusion"."""
    if kind.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    return "edm" if kind.startswith("EDM") else "ipndm" if kind.startswith("IPNDM") else "diffusion"


def names() -> tuple[str, ...]:
    """Every sampler name, those with a sigma spacing after their plain form."""
    return tuple(
        f"{base}_{sigmas}" if sigmas else base
        for base, (kind, _) in SAMPLERS.items()
        for sigmas in ("", *(SIGMAS if kind in _RESPACED else ()))
    )


@dataclass(frozen=True)
class SamplerInfo:
    """A line of `edgesd samplers`. calls: UNet calls per picture for `steps` steps, guidance apart; None: too many."""

    name: str
    scheduler: str
    stochastic: bool
    family: str
    steps: int
    calls: int | None


def describe(steps: int = 20) -> tuple[SamplerInfo, ...]:
    """Every sampler at a step count, in the order of `names()`. RequestError for steps out of range."""
    from edgesd.sampling.compile import banded, check_steps

    check_steps(steps)
    found: dict[str, tuple[bool, int | None]] = {}
    for base, (kind, _) in SAMPLERS.items():
        scheduler = make_scheduler(base, {"_class_name": kind, "timestep_spacing": "leading"})
        noisy = bool(banded(scheduler, 4).coef[:, -1].any())
        try:
            scheduler.set_timesteps(steps)
            found[base] = noisy, len(scheduler.timesteps)
        except ValueError:  # LCM and TCD run at most the steps they were distilled for
            found[base] = noisy, None
    return tuple(
        SamplerInfo(name, (kind := SAMPLERS[base][0]), found[base][0], _family(kind, {}), steps, found[base][1])
        for name in names()
        for base in (_split(name)[0],)  # a spacing changes neither noise nor calls
    )


def default_sampler(config: Mapping[str, Any]) -> str:
    """The friendly name of a checkpoint's own scheduler config, or "default" where none says the same."""
    for name in names():
        base, sigmas = _split(name)
        kind, options = SAMPLERS[base]
        if config.get("_class_name") != kind:
            continue
        stated = {**_PLAIN, **options, **({f"use_{sigmas}_sigmas": True} if sigmas else {})}
        own = {**_defaults(kind), **config}
        if all(own[key] == value for key, value in stated.items() if key in own):
            return name
    return "default"


def _defaults(kind: str) -> dict[str, Any]:
    """What diffusers takes where a config is silent; not clipping, which its Stable Diffusion pipelines turn off."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {k: p.default for k, p in parameters.items() if p.default is not p.empty and k != "clip_sample"}
