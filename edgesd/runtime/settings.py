"""What decides a picture: one frozen record, checked, that travels in the PNG and can be drawn again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from edgesd.errors import DataError, RequestError
from edgesd.manifest import ModelSpec
from edgesd.runtime.noise import check_seed
from edgesd.runtime.plan import SCHEDULES

MAX_IMAGES = 1000
MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class Settings:
    """What decides a picture, to the pixel. It travels in the PNG, and `edgesd generate --from` reads it back.

    index: which picture of its seed this is (it keys the noise). strength: above 0 to 1, the share of the run that a
    start image goes through; 1.0 without one. guidance_scale: 1 and below mean none, as in diffusers. guidance_until:
    share of the run with guidance. early_stop: relative change of x0 below which the run ends, None = never.
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
        if not good:
            raise DataError("the picture's settings do not parse", "what edgesd writes", "Give the settings as flags")
        return cls(**data)


def resolve(spec: ModelSpec, prompt: str, **given: Any) -> Settings:
    """Settings with the model's defaults where `given` holds None. Raises RequestError for what cannot be drawn."""
    defaults = {
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
    ]  # fmt: skip
    for good, came, allowed, do in rules:
        if not good:
            raise RequestError(came, allowed, do)
    check_seed(s.seed)
    return s
