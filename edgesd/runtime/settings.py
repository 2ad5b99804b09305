"""What decides a picture: one frozen record, checked, that travels in the PNG and can be drawn again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from edgesd.errors import DataError, RequestError
from edgesd.manifest import ModelSpec
from edgesd.runtime.governed import MAX_CHANGES, Change
from edgesd.runtime.noise import check_seed
from edgesd.runtime.plan import SCHEDULES

MAX_IMAGES = 1000
MAX_GUIDANCE = 100.0
MAX_SIZE = 1 << 16
_PAIRS = ("original_size", "crops_coords_top_left", "target_size")


@dataclass(frozen=True)
class Settings:
    """What decides a picture, to the pixel. It travels in the PNG, and `edgesd generate --from` reads it back.

    index: which picture of its seed this is (it keys the noise). strength: above 0 to 1, the share of the run that a
    start image goes through; 1.0 without one. guidance_scale: 1 and below mean none, as in diffusers. guidance_until:
    share of the run with guidance. early_stop: relative change of x0 below which the run ends, None = never.
    original_size, target_size (height, width; None = the picture's), crops_coords_top_left (top, left): what SDXL is
    told of its picture, in px; aesthetic_score, negative_aesthetic_score: what its refiner is told. refiner_start:
    share of the noise range after which a refiner takes over (diffusers' denoising_end), None = no refiner. width: of
    the UNet, 1 = the widest; switch (share of the rows, width): from there on that width. changes: what a policy
    changed on the way, which repeats without it.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    index: int = 0
    num_inference_steps: int = 20
    sampler: str = "dpmpp_2m_karras"
    guidance_scale: float = 7.5
    guidance_schedule: str = "constant"
    guidance_until: float = 1.0
    guidance_rescale: float = 0.0
    early_stop: float | None = None
    strength: float = 1.0
    rng: str = "philox"
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    refiner_start: float | None = None
    width: float = 1.0
    switch: tuple[float, float] | None = None
    changes: tuple[Change, ...] = ()

    @classmethod
    def from_json(cls, data: Any) -> Settings:
        """Settings as a PNG carries them; unknown keys (a newer edgesd) and wrong types are a DataError."""
        kinds = {f.name: f for f in fields(cls)}
        good = isinstance(data, dict) and set(data) <= set(kinds) and isinstance(data.get("prompt"), str)
        for key, value in data.items() if good else ():
            default = kinds[key].default
            if isinstance(default, float):
                good = good and isinstance(value, int | float) and not isinstance(value, bool)
            elif isinstance(default, int | str):
                good = good and type(value) is type(default)
            elif key in _PAIRS:
                good = good and (_is_pair(value) or (value is None and default is None))
            elif key == "switch":
                good = good and (value is None or _is_switch(value))
            elif default is None:  # numbers that may be left open
                good = good and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
        if not good:
            raise DataError("the picture's settings do not parse", "what edgesd writes", "Give the settings as flags")
        pairs = {name: tuple(data[name]) for name in (*_PAIRS, "switch") if data.get(name) is not None}
        listed = data.get("changes", ())
        if not isinstance(listed, list | tuple) or len(listed) > MAX_CHANGES:
            raise DataError("the picture's log of changes does not parse", "what edgesd writes", "Draw it anew")
        return cls(**{**data, **pairs, "changes": tuple(map(Change.from_json, listed))})


def resolve(spec: ModelSpec, prompt: str, **given: Any) -> Settings:
    """Settings with the model's defaults where `given` holds None. Raises RequestError for what cannot be drawn."""
    defaults: dict[str, Any] = {
        "num_inference_steps": spec.defaults.steps, "sampler": spec.defaults.sampler,
        "guidance_scale": spec.defaults.guidance, "seed": 0,
    }  # fmt: skip
    chosen = defaults | {key: value for key, value in given.items() if value is not None}
    return check(Settings(prompt=prompt, **chosen))


def check(settings: Settings) -> Settings:
    """The settings, or a RequestError that names the one that cannot be."""
    s = settings
    rules = [
        (bool(s.prompt.strip()), "an empty prompt", "at least one word", "Say what to draw"),
        (1 <= s.num_inference_steps <= 1000, f"{s.num_inference_steps} steps", "1 to 1000", "Change --steps"),
        (0 <= s.guidance_scale <= MAX_GUIDANCE, f"guidance {s.guidance_scale}", f"0 to {MAX_GUIDANCE:g}", "Change it"),
        (0 < s.strength <= 1, f"strength {s.strength}", "above 0, at most 1", "Change --strength"),
        (0 <= s.guidance_until <= 1, f"guidance until {s.guidance_until}", "0 to 1", "Change --guidance-until"),
        (0 <= s.guidance_rescale <= 1, f"guidance rescale {s.guidance_rescale}", "0 to 1", "Change it"),
        (s.guidance_schedule in SCHEDULES, f"schedule {s.guidance_schedule!r}", ", ".join(SCHEDULES), "Choose one"),
        (s.early_stop is None or 0 < s.early_stop < 1, f"early stop {s.early_stop}", "above 0, below 1", "Change it"),
        (0 <= s.index < MAX_IMAGES, f"picture {s.index}", f"0 to {MAX_IMAGES - 1}", "Change --count"),
        *((getattr(s, name) is None or _is_pair(getattr(s, name)), f"{name} {getattr(s, name)}",
           f"two whole numbers of px from 0 to {MAX_SIZE}", "Change it") for name in _PAIRS),
        (all(0 <= score <= 10 for score in (s.aesthetic_score, s.negative_aesthetic_score)),
         f"aesthetic score {s.aesthetic_score} or {s.negative_aesthetic_score}", "0 to 10", "Change it"),
        (s.refiner_start is None or 0 < s.refiner_start < 1, f"refiner from {s.refiner_start}",
         "above 0, below 1", "Change --refiner-start"),
        (0 < s.width <= 1, f"width {s.width}", "above 0, at most 1", "Change --width"),
        (s.switch is None or _is_switch(s.switch), f"switch {s.switch}", "a share of the run and a width, each 0 to 1",
         "Change it"),
    ]  # fmt: skip
    for good, came, allowed, do in rules:
        if not good:
            raise RequestError(came, allowed, do)
    check_seed(s.seed)
    return s


def _is_switch(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1 for x in value)
        and value[1] > 0
    )


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_SIZE for n in value)
    )
