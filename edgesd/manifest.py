"""The bundle's schema: frozen pydantic models that write, read and describe `manifest.json`.

One set of types serves every language: `json_schema()` is what the TypeScript, Kotlin and Swift readers
follow. Rules: format is `major.minor`; a reader refuses a newer major and any name in `critical` that it
does not know, and ignores fields it does not know, so a newer minor never breaks a shipped app. Integers stay
below 2**53, there is no NaN or infinity, text is bounded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgesd.errors import DataError

FORMAT_MAJOR, FORMAT_MINOR = 1, 1
FORMAT = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"
KNOWN_CRITICAL: frozenset[str] = frozenset({"chunked-prompts", "expanded-tokens", "prompt-bank"})
MAX_MANIFEST_BYTES = 16 << 20
MAX_VALUES = 1 << 18  # what 65536 files need; each bad value costs an error report, and millions cost minutes
MAX_BUNDLE_BYTES = 1 << 36  # a sparse file costs its sender nothing and its hasher hours
MAX_DIM, MAX_ELEMENTS = 1 << 24, 1 << 31
MAX_INT = 2**53 - 1


# Names that Windows keeps for devices, with any extension: a bundle made here must unpack there.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def _relative_path(path: str) -> str:
    """A plain relative POSIX path: no `..`, no drive or device, no backslash, no control character, no hidden part."""
    parts = path.split("/")
    if any(_DEVICES.fullmatch(part) for part in parts):
        raise ValueError("a path must not hold a name that Windows keeps for a device")
    if any(
        not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}", part) or part.endswith((".", " ")) for part in parts
    ):
        raise ValueError("a path must be relative, of letters, digits, '.', '_', '-', and stay inside the bundle")
    return path


RelPath = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_relative_path)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$")]
Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Dim = Annotated[int, Field(ge=1, le=MAX_DIM)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["executed", "interpreted", "unverified"]
Role = Literal["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, ser_json_inf_nan="strings")


class TensorSpec(Frozen):
    """One input or output of a component. shape is static; meaning is a sentence for people."""

    name: Name
    dtype: Literal["float32", "float16", "int64", "int32"]
    shape: Annotated[tuple[Dim, ...], Field(max_length=8, fail_fast=True)]
    meaning: Text = ""

    @model_validator(mode="after")
    def _bounded(self) -> TensorSpec:
        elements = 1
        for dim in self.shape:
            elements *= dim
        if elements > MAX_ELEMENTS:
            raise ValueError(f"tensor {self.name} has {elements} elements, more than {MAX_ELEMENTS}")
        return self


class FileEntry(Frozen):
    path: RelPath
    bytes: Count
    sha256: Sha256


class Axes(Frozen):
    """What one variant of a component is made for. A reader picks by these, never by a file name.

    width: fraction of the inner channels that stay (0..1]. size_px: picture height, width in pixels.
    batch: rows per call (2 = guidance in one call). precision: of weights (and activations for int8).
    chunk: (index, count) for a component split into pieces that run one after the other.
    form: a target's own flavour, "" for its default (e.g. "wasm", "webgpu", "gpu", "split_einsum").
    """

    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    size_px: tuple[Dim, Dim]
    batch: Annotated[int, Field(ge=1, le=64)] = 1
    precision: Literal["fp32", "fp16", "int8", "hybrid", "w8"] = "fp32"
    chunk: tuple[Annotated[int, Field(ge=0, le=63)], Annotated[int, Field(ge=1, le=64)]] = (0, 1)
    form: Annotated[str, Field(max_length=32)] = ""


class Variant(Frozen):
    """One artefact of a component. files[0] is what a runtime opens; the rest lie beside it (weights).

    status says how it was checked: executed in its own runtime, interpreted (Core ML off a Mac), unverified.
    snr_db is the error against the float32 truth on recorded calls, per output the worst. plan: the quantization as the
    artefact has it (JSON, see docs/quantization.md). gate_db: what snr_db must reach where its own simulation says so.
    """

    axes: Axes
    files: Annotated[tuple[RelPath, ...], Field(min_length=1, max_length=4096, fail_fast=True)]
    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=32, fail_fast=True)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=32, fail_fast=True)]
    params: Count = 0
    macs: Count = 0
    status: Status = "unverified"
    runtime: Text = ""
    snr_db: float | None = None
    gate_db: float | None = None
    plan: RelPath | None = None
    seconds: float | None = None
    compute_units: Annotated[str, Field(max_length=64)] = ""


class Component(Frozen):
    name: Role
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, max_length=256, fail_fast=True)]


class TokenizerSpec(Frozen):
    """One tokenizer.json and how a prompt is laid out for its text encoder.

    max_length: tokens per call, start and end token included. pad_id fills the rest (SD 1.x: the end token;
    the second SDXL encoder: 0). component: the text encoder that takes its ids. chunks: calls of a prompt, each of
    max_length; the UNet attends to their states end to end. expand: (id, count) of tokens that stand for several
    vectors: such an id is read as the ids id .. id+count-1.
    """

    file: RelPath
    component: Role
    max_length: Annotated[int, Field(ge=3, le=4096)]
    chunks: Annotated[int, Field(ge=1, le=16)] = 1
    expand: Annotated[tuple[tuple[Count, Annotated[int, Field(ge=2, le=128)]], ...], Field(max_length=1024)] = ()
    bos_id: Count
    eos_id: Count
    pad_id: Count


LatentRow = Annotated[tuple[float, ...], Field(max_length=64)]  # one factor per latent channel


class LatentSpec(Frozen):
    """Latents `[1, channels, H/downscale, W/downscale]`: decoder input = latents / scaling_factor + shift_factor.

    rgb_factors: least-squares map latent channels -> RGB in 0..1, rows R,G,B; rgb_bias added: cheap previews.
    """

    channels: Annotated[int, Field(ge=1, le=64)]
    downscale: Annotated[int, Field(ge=1, le=64)]
    scaling_factor: float
    shift_factor: float = 0.0
    rgb_factors: Annotated[tuple[LatentRow, ...], Field(max_length=3)] | None = None
    rgb_bias: tuple[float, float, float] | None = None


class Defaults(Frozen):
    """What a runtime uses where the user says nothing."""

    sampler: Name
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance: float = 7.5
    size_px: tuple[Dim, Dim]


class ModelSpec(Frozen):
    """All that a runtime must know of a model besides its files; the torch reference carries the same object.

    family: sd1, sd2, sdxl, sdxl_refiner. unet_in_channels 9 = inpainting by concatenation.
    scheduler: the checkpoint's own diffusers config, for provenance and for compiling further tables.
    clip_skip: text layers left out at the end, already left out of the components. zero_empty_negative: an empty
    negative prompt is zeros in place of an encoding (SDXL).
    """

    name: Name
    family: Annotated[str, Field(max_length=32)]
    prediction_type: PredictionType
    unet_in_channels: Annotated[int, Field(ge=1, le=64)]
    latent: LatentSpec
    tokenizers: Annotated[tuple[TokenizerSpec, ...], Field(max_length=4, fail_fast=True)]
    defaults: Defaults
    zero_empty_negative: bool = False
    guidance_embedding_dim: Annotated[int, Field(ge=0, le=65536)] = 0
    time_ids: bool = False
    clip_skip: Annotated[int, Field(ge=0, le=64)] = 0
    scheduler: dict[str, Any] = {}


class SamplerFile(Frozen):
    """Tables of one sampler inside a safetensors file: `steps` lists the step counts it holds."""

    name: Name
    file: RelPath
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(min_length=1, max_length=1000)]


class PolicyFile(Frozen):
    """A policy that travels with the bundle; the table's own schema is docs/policies.md (edgesd/runtime/policy.py)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    file: RelPath


class NoiseSpec(Frozen):
    generator: Literal["philox4x32-10"] = "philox4x32-10"
    transform: Literal["box-muller-f64"] = "box-muller-f64"
    version: Literal[1] = 1  # other noise is another picture: nothing to ignore


class Ingredient(Frozen):
    """One file that went in: its kind (checkpoint, lora, embedding, unet, ...), name without path, hash and scale."""

    kind: Name
    name: Text
    sha256: Sha256
    scale: float | None = None


class Provenance(Frozen):
    """Where the weights came from; never a local path. revision: hub commit or "". sha256: over the source files.

    ingredients: what was added to or swapped in the source, in order.
    """

    source: Text
    revision: Annotated[str, Field(max_length=128)] = ""
    sha256: Sha256
    licence: Text = "unknown"
    edgesd: Text = ""
    libraries: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    ingredients: Annotated[tuple[Ingredient, ...], Field(max_length=256, fail_fast=True)] = ()
    made: Text = ""


class Downgrade(Frozen):
    """A deliberate step down from what was asked: where, what and why. Printed when it is made."""

    component: Text
    what: Text
    why: Text


class Manifest(Frozen):
    """A bundle. prompts: the file of prepared prompts of a bundle without text encoders (critical: prompt-bank).

    policies: what the device's state gets, by name; a runtime takes these before any it has itself.
    """

    format: Annotated[str, Field(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")] = FORMAT
    critical: Annotated[tuple[Name, ...], Field(max_length=64, fail_fast=True)] = ()
    target: Name
    model: ModelSpec
    components: Annotated[tuple[Component, ...], Field(min_length=1, max_length=16, fail_fast=True)]
    samplers: Annotated[tuple[SamplerFile, ...], Field(min_length=1, max_length=64, fail_fast=True)]
    policies: Annotated[tuple[PolicyFile, ...], Field(max_length=64, fail_fast=True)] = ()
    noise: NoiseSpec = NoiseSpec()
    golden: RelPath | None = None
    prompts: RelPath | None = None
    quality: dict[str, Any] = {}
    provenance: Provenance
    downgrades: Annotated[tuple[Downgrade, ...], Field(max_length=4096, fail_fast=True)] = ()
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=65536, fail_fast=True)]

    @model_validator(mode="after")
    def _closed(self) -> Manifest:
        known = [entry.path for entry in self.files]
        if len({path.lower() for path in known}) != len(known):
            raise ValueError("a file is listed twice (upper and lower case count as the same)")
        if "manifest.json" in {path.lower() for path in known}:
            raise ValueError("manifest.json lists itself")
        if (total := sum(entry.bytes for entry in self.files)) > MAX_BUNDLE_BYTES:
            raise ValueError(f"the files have {total} bytes together, more than {MAX_BUNDLE_BYTES}")
        named = {f for c in self.components for v in c.variants for f in v.files}
        named |= {t.file for t in self.model.tokenizers} | {s.file for s in self.samplers}
        named |= {p.file for p in self.policies}
        named |= {path for path in (self.golden, self.prompts) if path is not None}
        named |= {v.plan for c in self.components for v in c.variants if v.plan is not None}
        if missing := sorted(named - set(known)):
            raise ValueError(f"{missing[0]} is used but not listed in files")
        if len({c.name for c in self.components}) != len(self.components):
            raise ValueError("a component is listed twice")
        if len({p.name for p in self.policies}) != len(self.policies):
            raise ValueError("a policy is listed twice")
        return self

    def component(self, name: str) -> Component:
        for component in self.components:
            if component.name == name:
                return component
        have = ", ".join(c.name for c in self.components)
        raise DataError(f"the bundle has no component {name!r}", have, "Package it again with that component")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice[:40]!r} appears twice")
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number a manifest may hold")


def _whole_number(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INT:
        raise ValueError("an integer beyond 2^53, which not every reader holds")
    return int(text)


def _shown(text: object, limit: int = 200) -> str:
    """Foreign text as it may stand in a message: short, and nothing in it that steers a terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:limit])


def parse(data: bytes) -> Manifest:
    """Parses and checks manifest bytes. Raises DataError for anything malformed, hostile or too new.

    Strict: `true` is no number and "16" no integer, because readers in other languages would not take them so.
    """
    fix = "Get the bundle again from where it came, or package the model again"
    if len(data) > MAX_MANIFEST_BYTES:
        raise DataError(f"manifest.json has {len(data)} bytes", f"up to {MAX_MANIFEST_BYTES}", fix)
    if (values := data.count(b",")) > MAX_VALUES:  # every value but the first of its list or object has one before it
        raise DataError(f"manifest.json has more than {values} values", f"up to {MAX_VALUES}", fix)
    try:
        raw = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_refuse_constant,
            parse_int=_whole_number,
        )
        json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()  # finds 1e999 and halves of surrogate pairs
    except (ValueError, RecursionError) as error:
        raise DataError(f"manifest.json does not parse ({_shown(error)})", "strict UTF-8 JSON", fix) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("format"), str):
        raise DataError("manifest.json has no format", f"an object with format {FORMAT}", fix)
    check_format(raw["format"], raw.get("critical", ()))
    try:
        return Manifest.model_validate_json(data, strict=True)
    except (ValidationError, ValueError, RecursionError) as error:
        first = (
            error.errors(include_url=False, include_input=False)[0]
            if isinstance(error, ValidationError)
            else {"loc": (), "msg": str(error)}
        )
        where = ".".join(str(part) for part in first["loc"]) or "manifest.json"
        came = f"manifest.json: {_shown(where)}: {_shown(first['msg'])}"
        raise DataError(came, "what docs/bundle.md describes", fix) from None


def check_format(version: str, critical: Any) -> None:
    """Refuses a newer major version and critical features this reader does not know (DataError)."""
    matched = re.fullmatch(r"([0-9]{1,4})\.([0-9]{1,4})", version)
    if matched is None or int(matched[1]) != FORMAT_MAJOR:
        do = "Install the edgesd that made it, or package again"
        raise DataError(f"bundle format {_shown(version, 40)!r}", f"{FORMAT_MAJOR}.x", do)
    listed = critical if isinstance(critical, list | tuple) else [critical]
    if unknown := [name if isinstance(name, str) else "(not a name)" for name in listed if not _known(name)]:
        came = f"the bundle needs features this edgesd lacks: {_shown(', '.join(unknown[:8]))}"
        raise DataError(came, ", ".join(sorted(KNOWN_CRITICAL)) or "none yet", "Update edgesd")


def _known(name: Any) -> bool:
    return isinstance(name, str) and name in KNOWN_CRITICAL


def dump(manifest: Manifest) -> bytes:
    """The manifest as the bytes of `manifest.json`: UTF-8, indented, ends in a newline."""
    return (json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `manifest.json`, for readers in other languages."""
    return Manifest.model_json_schema()
