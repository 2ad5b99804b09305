"""Any linear diffusers scheduler as a table: run it once on one-hot latents and read its coefficients off.

`scheduler.step` is linear in the sample it is given, the model output, the noise and what it remembers of them. Fed a
fresh one-hot vector as the sample and as the output of every row ("open loop"), what it returns *is* the row of the
recurrence over UNet inputs, exactly, with no system to solve. A scheduler with a corrector (UniPC, SA) remembers its
own corrected sample, which reaches back to the start; one multiple of the row before cancels that memory (`_cut`).
`dense` closes the loop instead, on one-hot latents, and is the oracle that tests compare the recurrence with.

Public: compile_table(name, config, steps) -> SamplerTable, compile_tables(name, config, step_counts),
dense(scheduler, steps), output_gains(name, config, steps), banded(scheduler, steps).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from edgesd.errors import RequestError
from edgesd.runtime.table import MAX_INPUTS, MAX_OUTPUTS, MAX_STEPS, Rows, SamplerTable, possible_starts
from edgesd.sampling.schedules import make_scheduler

TOLERANCE = 1e-6  # relative to a row's largest coefficient; schedulers compute their factors in float32
_patching = threading.Lock()


@dataclass(frozen=True)
class Band:
    """The recurrence in float64. coef [R,P+Q+1]: inputs, outputs, noise; draws [R]; scale [R]: UNet input / latents."""

    inputs: int
    outputs: int
    coef: np.ndarray
    draws: np.ndarray
    scale: np.ndarray


def compile_table(name: str, config: Mapping[str, Any], steps: int) -> SamplerTable:
    """The table of sampler `name` ("default": the checkpoint's own) on a checkpoint's scheduler config, in float32.

    Raises RequestError for a name, step count or setting that no table can hold, with what to use instead.
    """
    return compile_tables(name, config, (steps,))[0]


def compile_tables(name: str, config: Mapping[str, Any], step_counts: Iterable[int]) -> list[SamplerTable]:
    """The tables of several step counts, as `compile_table` would make them one by one."""
    scheduler = make_scheduler(name, config)
    return [_compile(name, _prepare(scheduler, steps)) for steps in step_counts]


def _compile(name: str, prepared: Any) -> SamplerTable:
    steps, order = prepared.num_inference_steps, prepared.order
    with _Probe(prepared) as probe:
        band = _banded(probe)
        possible = possible_starts(len(band.coef), steps, order)
        starts = {start: _rounded(band, _warm_up(probe, start, band)) for start in possible}
    alpha, sigma = _levels(prepared, band.scale)
    whole = _rounded(band, band.coef)
    return SamplerTable(
        name=name, steps=steps, prediction_type=_prediction_type(prepared), order=order, starts=starts,
        timestep=np.asarray(prepared.timesteps.double(), np.float32), alpha=alpha, sigma=sigma, draws=band.draws,
        input_coef=whole.input_coef, output_coef=whole.output_coef, noise_coef=whole.noise_coef,
        init_scale=float(np.float32(float(getattr(prepared, "init_noise_sigma", 1.0)) * band.scale[0])),
    )  # fmt: skip


def dense(scheduler: Any, steps: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(inputs [n+1, 1+2n] f64, scale [n]) of a diffusers scheduler instance from row `start`, n rows, loop closed.

    inputs[i] holds UNet input start+i (the last: the finished latents) over the basis (UNet input at the start, outputs
    e and noises z of the n rows). scale: UNet input / latents at each row.
    """
    with _Probe(_prepare(scheduler, steps)) as probe:
        rows, _, scale = probe.replay(start, len(probe.timesteps) - start, closed=True)
    count = len(rows)
    first = np.zeros((1, 3 * count))
    first[0, 0] = 1
    inputs = np.concatenate([first, rows])
    return inputs[:, [0, *range(count, 3 * count)]], scale


def output_gains(name: str, config: Mapping[str, Any], steps: int) -> np.ndarray:
    """[R] f64: how much of each row's model output the finished latents hold, all else as it is."""
    inputs, _ = dense(make_scheduler(name, config), steps)
    count = len(inputs) - 1
    return inputs[-1, 1 : 1 + count]


def banded(scheduler: Any, steps: int) -> Band:
    """The recurrence of a diffusers scheduler instance in float64, before rounding, from row 0."""
    with _Probe(_prepare(scheduler, steps)) as probe:
        return _banded(probe)


def check_steps(steps: int) -> None:
    """RequestError unless steps is an integer of 1 .. MAX_STEPS."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"{steps!r} steps", f"1 to {MAX_STEPS}", "Choose a step count in that range")


def _prepare(scheduler: Any, steps: int) -> Any:
    """A copy with its timesteps set; refuses by name what cannot be a table."""
    check_steps(steps)
    kind, config = type(scheduler).__name__, scheduler.config
    for wrong, what, instead in (
        (config.get("clip_sample"), "clips its prediction (clip_sample)", "clip_sample false"),
        (config.get("thresholding"), "thresholds its prediction", "thresholding false"),
        (config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon",
         "has zero terminal SNR with epsilon prediction, which says nothing at pure noise", "v_prediction"),
        (config.get("variance_type") in ("learned", "learned_range"), "expects a learned variance", "fixed_small"),
        (config.get("use_dynamic_shifting"), "shifts its steps by picture size", "use_dynamic_shifting false"),
        (kind.startswith("EDM") and config.get("prediction_type") != "epsilon", "flips its outputs", "epsilon"),
    ):  # fmt: skip
        if wrong:
            raise RequestError(f"{kind} {what}", "schedulers linear in latents, outputs and noise", f"Use {instead}")
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError, AssertionError, RuntimeError) as error:
        raise RequestError(f"{steps} steps of {kind} ({_first_line(error)})", "what the scheduler can run",
                           "Choose another step count or sampler") from None  # fmt: skip
    if hasattr(scheduler, "get_lms_coefficient"):  # an integral of the timesteps alone, asked for again by every start
        scheduler.get_lms_coefficient = cache(scheduler.get_lms_coefficient)
    return scheduler


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Probe:
    """A prepared scheduler, run on one-hots as often as needed. While it is entered, its module's noise is ours."""

    def __init__(self, prepared: Any) -> None:
        self.prepared = prepared
        self.timesteps = prepared.timesteps
        self._module = sys.modules[type(prepared).__module__]
        self._noise: list[Any] = []

    def __enter__(self) -> _Probe:
        _patching.acquire()
        self._original = getattr(self._module, "randn_tensor", None)
        self._module.randn_tensor = lambda *args, **kwargs: self._noise.pop()  # type: ignore[attr-defined]
        return self

    def __exit__(self, *error: object) -> None:
        self._module.randn_tensor = self._original  # type: ignore[attr-defined]
        _patching.release()

    def replay(self, start: int, count: int, closed: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs `count` rows from row `start` on one-hots; all in UNet-input scaling, except after the very last row.

        Returns rows [count, 3*count] (what each row makes, over inputs, outputs and noises of these rows),
        draws [count] and scale [count]. closed: the sample of a row is what the row before made, else a fresh one-hot.
        """
        import torch

        scheduler = self._fresh(start)
        # [1,1,1,width]: the probe's coordinates lie along the width, which no linear scheduler mixes.
        one_hot = torch.eye(3 * count, dtype=torch.float64).reshape(3 * count, 1, 1, 1, 3 * count)
        rows, draws, scale, sample = [], np.zeros(count, bool), np.ones(count + 1), one_hot[0]
        for k in range(count):
            t = self.timesteps[start + k]
            scale[k] = _input_scale(scheduler, t)
            self._noise[:] = [one_hot[2 * count + k]]
            try:
                sample = scheduler.step(one_hot[count + k], t, sample if closed else one_hot[k], return_dict=False)[0]
            except IndexError:
                raise _unfactored(scheduler, "it draws noise twice in one step") from None
            except (NotImplementedError, ValueError) as error:
                raise RequestError(f"{type(scheduler).__name__} ({_first_line(error)})", "what the scheduler can run",
                                   "Choose another sampler or prediction type") from None  # fmt: skip
            draws[k] = not self._noise
            rows.append(sample.double().reshape(-1).numpy())
        if start + count < len(self.timesteps):
            scale[count] = _input_scale(scheduler, self.timesteps[start + count])
        table = np.array(rows) * scale[1:, None]
        table[:, :count] /= scale[:1] if closed else scale[:count]
        if not np.isfinite(table).all():
            raise _unfactored(scheduler, "its coefficients are not finite")
        return table, draws, scale[:count]

    def _fresh(self, start: int) -> Any:
        scheduler = copy.copy(self.prepared)
        for key, value in vars(scheduler).items():
            if isinstance(value, list):
                setattr(scheduler, key, list(value))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        return scheduler


def _input_scale(scheduler: Any, t: Any) -> float:
    """UNet input / latents at timestep t, 1 for the schedulers that have no `scale_model_input`."""
    import torch

    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    return float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t))


def _unfactored(scheduler: Any, why: str) -> RequestError:
    return RequestError(f"{type(scheduler).__name__} makes no table: {why}",
                        f"at most {MAX_INPUTS} past inputs, {MAX_OUTPUTS} past outputs and one noise per row",
                        "Choose another sampler (edgesd samplers lists them)")  # fmt: skip


def _banded(probe: _Probe) -> Band:
    """Factors the whole run: the shortest band as it stands, else the shortest with the row before cancelled.

    As it stands comes first even where cancelling were shorter (Heun, PNDM): only then does a row do what the scheduler
    does when something else (inpainting) has changed the latents in between.
    """
    rows, draws, scale = probe.replay(0, len(probe.timesteps))
    for cancel in (False, True):
        for p, q in sorted(((p, q) for p in range(1, MAX_INPUTS + 1) for q in range(1, MAX_OUTPUTS + 1)), key=sum):
            coef = _cut(rows, p, q, cancel)
            if coef is not None:
                return Band(p, q, coef, draws, scale)
    raise _unfactored(probe.prepared, "its memory reaches further back")


def _cut(rows: np.ndarray, p: int, q: int, cancel: bool) -> np.ndarray | None:
    """coef [count, p+q+1] of rows over (inputs, outputs, noises), or None where they do not fit a band of p, q.

    With cancel, row i may subtract a multiple of row i-1 and add as much of input i, which is what that row made.
    """
    count = len(rows)
    coef = np.zeros((count, p + q + 1))
    for i in range(count):
        far = np.ones(3 * count, bool)
        far[max(0, i - p + 1) : i + 1] = far[count + max(0, i - q + 1) : count + i + 1] = far[2 * count + i] = False
        row, limit = rows[i], TOLERANCE * np.abs(rows[i]).max()
        if cancel and i and np.abs(row[far]).max(initial=0) > limit:
            before = rows[i - 1]
            size = before[far] @ before[far]
            if size:
                multiple = (before[far] @ row[far]) / size
                row = row - multiple * before
                row[i] += multiple
        if np.abs(row[far]).max(initial=0) > limit:
            return None
        row = np.where(np.abs(row) < 1e-12 * np.abs(row).max(), 0, row)
        coef[i, : min(p, i + 1)] = row[i::-1][:p]
        coef[i, p : p + min(q, i + 1)] = row[count : count + i + 1][::-1][:q]
        coef[i, -1] = row[2 * count + i]
    return coef


def _warm_up(probe: _Probe, start: int, band: Band) -> np.ndarray:
    """The rows of a run from `start` that differ from the whole table's."""
    whole, room = band.coef[start:], len(band.coef) - start
    for count in dict.fromkeys((min(max(band.inputs, band.outputs) + 2, room), room)):
        rows, _, _ = probe.replay(start, count)
        coef = _cut(rows, band.inputs, band.outputs, False)
        if coef is None:
            coef = _cut(rows, band.inputs, band.outputs, True)
        if coef is None:
            raise _unfactored(probe.prepared, f"a start at row {start} reaches further back")
        same = np.abs(coef - whole[:count]).max(axis=1) <= TOLERANCE * np.abs(whole[:count]).max(axis=1)
        differing = int(np.flatnonzero(~same)[-1]) + 1 if not same.all() else 0
        if count == room or differing <= count - 2:
            return coef[:differing]
    raise AssertionError("unreachable: the last count is the whole run")


def _rounded(band: Band, coef: np.ndarray) -> Rows:
    p, q = band.inputs, band.outputs
    single = coef.astype(np.float32)
    return Rows(single[:, :p].copy(), single[:, p : p + q].copy(), single[:, -1].copy())


def _levels(scheduler: Any, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha, sigma [R] f32 with u = alpha x0 + sigma eps at every row's UNet input."""
    rows, kind, config = len(scale), type(scheduler).__name__, scheduler.config
    if kind == "IPNDMScheduler":
        alpha, sigma = (np.asarray(part, np.float64)[:rows] for part in (scheduler.alphas, scheduler.betas))
        return alpha.astype(np.float32), sigma.astype(np.float32)
    sigmas = np.asarray(getattr(scheduler, "sigmas", np.empty(0)), np.float64)[:rows]
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        alpha, sigma = 1 - sigmas, sigmas
    elif kind.startswith("EDM"):
        alpha = 1 / np.sqrt(sigmas**2 + config.sigma_data**2)
        sigma = alpha * sigmas
    elif len(sigmas):
        if (between := getattr(scheduler, "sigmas_interpol", None)) is not None:  # KDPM2 calls the UNet between sigmas
            sigmas = _nearest(sigmas, np.asarray(between, np.float64), scale)
        alpha = 1 / np.sqrt(1 + sigmas**2)
        sigma = alpha * sigmas
    else:
        alpha2 = np.asarray(scheduler.alphas_cumprod, np.float64)[np.asarray(scheduler.timesteps)]
        alpha, sigma = np.sqrt(alpha2), np.sqrt(1 - alpha2)
    return alpha.astype(np.float32), sigma.astype(np.float32)


def _nearest(sigmas: np.ndarray, between: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Per row the sigma, of a step or between two, that its input was scaled by."""
    rows = len(scale)
    choices = np.stack([sigmas, between[:rows], np.r_[between[:1], between[: rows - 1]]])
    off = np.abs(1 / np.sqrt(1 + choices**2) - scale)
    return choices[np.nan_to_num(off, nan=np.inf).argmin(axis=0), np.arange(rows)]  # KDPM2 pads its levels with NaN


def _prediction_type(scheduler: Any) -> str:
    kind, config = type(scheduler).__name__, scheduler.config
    if kind == "IPNDMScheduler":  # its eps is beta u + alpha e, whatever the config says
        return "v_prediction"
    if kind.startswith(("FlowMatch", "EDM")):
        return "flow" if kind.startswith("Flow") else "edm"
    name = config.get("prediction_type", "epsilon")
    return "flow" if name == "flow_prediction" else name
