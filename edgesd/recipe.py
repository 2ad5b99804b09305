"""What the user asked `package` for: frozen, checked, from flags or a TOML file, hashed and echoed in the manifest."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edgesd.errors import RequestError

Precision = Literal["fp32", "fp16", "int8", "hybrid", "w8"]
MAX_SIDE_PX = 4096
Profile = Literal["quality", "balanced", "small"]
# What a profile sets where the request says nothing, beside the precision: that comes from the target, as close to
# float as it gets for quality, its int8 otherwise (`edgesd.buildplan.flavours`).
PROFILES: dict[str, dict[str, Any]] = {"quality": {}, "balanced": {}, "small": {"prune": 0.25}}


class Recipe(BaseModel):
    """One packaging request. `None` means: what the checkpoint or the target says.

    source: diffusers folder, hub id, or None for the embedded model. target: one name. profile: sets what is not given.
    precision: None = what the profile means on the target. vae: "tiny", "full" (what the checkpoint holds must match)
    or a VAE folder.
    samplers: names whose tables ship; steps: the range of step counts each holds.
    size_px: (height, width), multiples of the model's downscale. batch2: also a UNet for guidance in one call.
    forms: a target's flavours beside its own. minimum_target, compiled (by Xcode, on a Mac), chunks (UNet in so many
    pieces), palette (bits of a weight, in w8): Core ML alone. unet, text_encoder: folders to swap those parts.
    tokenizer, prediction: for a single file. loras, embeddings: "FILE:scale", "FILE:word". clip_skip: text layers left
    out. long_prompt: tokens a prompt may have. prune: share of the UNet's MACs to take off. widths: shares of the
    UNet's inner channels, among which policies choose; width_mode: how they are stored, None = the target's best.
    prompt_bank: file of the only prompts the bundle will know. max_ram_bytes: what packaging may hold in memory.
    device_classes: devices to predict the fit for (edgesd.devices). calibration: a set of recorded calls for int8,
    recorded anew if None. gate_db: what one call of each int8 component must reach against float; None = by component.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str | None = None
    revision: str | None = None
    target: str
    profile: Profile = "balanced"
    precision: Precision | None = None
    vae: str | None = None
    samplers: tuple[str, ...] = ()
    steps: tuple[Annotated[int, Field(ge=1, le=1000)], Annotated[int, Field(ge=1, le=1000)]] = (1, 50)
    size_px: tuple[int, int] | None = None
    batch2: bool = False
    forms: tuple[str, ...] = ()
    minimum_target: Literal["iOS17", "iOS18", "macOS14", "macOS15"] = "iOS17"
    compiled: bool = False
    palette: Literal[6, 8] | None = None
    chunks: Annotated[int, Field(ge=1, le=8)] = 1
    widths: tuple[float, ...] = (1.0,)
    width_mode: Literal["separate", "shared"] | None = None
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    unet: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    prediction: Literal["epsilon", "v_prediction"] | None = None
    loras: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    clip_skip: Annotated[int, Field(ge=0, le=64)] = 0
    long_prompt: Annotated[int, Field(ge=0, le=4096)] = 0
    prune: Annotated[float, Field(gt=0, lt=0.9)] | None = None
    prompt_bank: str | None = None
    device_classes: tuple[str, ...] = ()
    calibration: str | None = None
    gate_db: Annotated[float, Field(ge=0, le=120)] | None = None
    max_ram_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 50)] | None = None

    @field_validator("steps")
    @classmethod
    def _ordered(cls, steps: tuple[int, int]) -> tuple[int, int]:
        if steps[0] > steps[1]:
            raise ValueError(f"steps {steps[0]}-{steps[1]} run backwards")
        return steps

    @field_validator("widths")
    @classmethod
    def _widest_first(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(widths, reverse=True))

    @field_validator("size_px")
    @classmethod
    def _sane(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size is not None and not all(8 <= side <= MAX_SIDE_PX for side in size):
            raise ValueError(f"sides from 8 to {MAX_SIDE_PX} px")
        return size

    def digest(self) -> str:
        """sha256 of the request, the same for the same request on every machine."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def echo(self) -> dict[str, Any]:
        """The request as the manifest shows it: a local folder appears by its name alone."""
        shown = self.model_dump(mode="json")
        for key in ("source", "vae", "unet", "text_encoder", "tokenizer", "prompt_bank", "calibration"):
            if isinstance(shown[key], str) and (Path(shown[key]).is_absolute() or Path(shown[key]).exists()):
                shown[key] = Path(shown[key]).name
        for key in ("loras", "embeddings"):
            shown[key] = [Path(text).name for text in shown[key]]
        return shown

    def model(self) -> dict[str, Any]:
        """What `open_checkpoint` is asked for, by its own words."""
        names = ("source", "revision", "vae", "unet", "text_encoder", "tokenizer", "prediction", "clip_skip")
        asked = {name: getattr(self, name) for name in names}
        return asked | {"lora": self.loras, "embedding": self.embeddings, "long_prompt": self.long_prompt}


def make_recipe(**fields: Any) -> Recipe:
    """A checked Recipe; its profile's settings stand behind those given. Raises RequestError that names the field."""
    try:
        return Recipe(**{**PROFILES.get(str(fields.get("profile")), {}), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        allowed = first.get("ctx", {}).get("expected", first["msg"])
        raise RequestError(f"{field} = {first['input']!r}", str(allowed), f"Change {field}") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a TOML recipe file; flags given beside it win. Raises RequestError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"no recipe file {str(path)!r}", "a TOML file", "Check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"recipe {path.name} does not parse ({error})", "TOML", "Mend that line") from None


def parse_steps(text: str) -> tuple[int, int]:
    """ "20" -> (20, 20), "1-50" -> (1, 50)."""
    matched = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    if matched is None:
        raise RequestError(f"steps {text!r}", "a count such as 20 or a range such as 1-50", "Change --steps")
    return int(matched[1]), int(matched[2] if matched[2] is not None else matched[1])


def parse_widths(text: str) -> tuple[float, ...]:
    """ "1,0.75,0.5" -> (1.0, 0.75, 0.5). Raises RequestError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"widths {text[:60]!r}", "numbers with commas, such as 1,0.75,0.5", "Change --widths"
        ) from None


def parse_size(text: str, multiple: int = 8) -> tuple[int, int]:
    """ "128" -> (128, 128); "512x768" is width x height as people say it -> (768, 512). Raises RequestError."""
    matched = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    if matched is None:
        raise RequestError(
            f"size {text!r}", "one side such as 512, or WIDTHxHEIGHT such as 512x768", "Change --size-px"
        )
    width = int(matched[1])
    height = int(matched[2]) if matched[2] is not None else width
    if (
        width % multiple
        or height % multiple
        or not (multiple <= min(width, height) and max(width, height) <= MAX_SIDE_PX)
    ):
        raise RequestError(
            f"size {text!r}", f"sides that are multiples of {multiple}, at most {MAX_SIDE_PX}", "Change --size-px"
        )
    return height, width


def parse_bytes(text: str) -> int:
    """ "8GB" -> 8e9, "8GiB" -> 8 * 2^30, "800MB", "4096" (bytes). Raises RequestError."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if matched is None:
        raise RequestError(f"amount {text!r}", "a number with MB, GB, MiB or GiB, such as 8GB", "Change it")
    base = 1024 if matched[3] else 1000
    return int(float(matched[1]) * base ** " KMGT".index(matched[2].upper() or " "))
