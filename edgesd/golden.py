"""Golden vectors: one run of the float32 reference, recorded so that a bundle can be held against it anywhere.

Two files in a bundle. `golden/golden.json` holds the facts: prompt, seed, sampler, which tensor is what, the gates.
`golden/golden.safetensors` holds the tensors, each content once, at most 32 MB for pictures up to 2 megapixels
(beyond, the decoder's output alone takes 12 bytes a pixel and is kept all the same):

- `ids/<i>/prompt`, `ids/<i>/negative` [1,L] i64, by tokenizer; `noise` [1,C,h,w] f32, the start normals;
- calls of every component as input and output tensors: the text encoders on both prompts, the UNet with and without
  the prompt at the first, the middle and the last row, the VAE decoder on the finished latents, the VAE encoder on what
  that gave;
- `latents` [R,C,h,w] f32: the UNet's next input after each row (the last: the finished latents);
- `picture` [h,w,3] u8: every `picture_stride`-th pixel of the finished picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular
from edgesd.manifest import Axes, Count, Dim, Frozen, Manifest, ModelSpec, Name, RelPath, Role, Text
from edgesd.runtime import noise
from edgesd.runtime.generate import Picture, Settings, sample
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.session import Arrays, Session, Watched

if TYPE_CHECKING:
    from edgesd.bundle import Bundle

FOLDER, FACTS, TENSORS = "golden", "golden/golden.json", "golden/golden.safetensors"
FORMAT: Literal["edgesd-golden-1"] = "edgesd-golden-1"
STEPS = 8
PICTURE_SIDE = 512  # pixels a side of the recorded picture, at most
MAX_READ_BYTES = 1 << 30
_AGAIN = "Package the model again"
_PROMPTS = dict.fromkeys(("shapes", "shapes-lcm"), "a red circle above a blue square on a white background")
_NEUTRAL = "a photograph of a wooden table with a bowl of fruit beside a window"


class Gate(Frozen):
    """What an artefact must reach against the float32 truth: dB of SNR by component, dB of PSNR and mean absolute
    difference (0..1) of the finished picture, dB of SNR of the latents after every row. None: no gate."""

    snr_db: float
    latents_snr_db: float | None = None
    picture_psnr_db: float | None = None
    picture_mean_abs: float | None = None


# Steps multiply what a component is off by, hence the lower figure for latents.
GATES: Mapping[str, Gate] = {
    "fp32": Gate(snr_db=90, latents_snr_db=50, picture_mean_abs=1 / 255),
    "fp16": Gate(snr_db=45, latents_snr_db=20, picture_psnr_db=35),
    "w8": Gate(snr_db=30),
    "hybrid": Gate(snr_db=20),
    "int8": Gate(snr_db=20),
}


class CallFacts(Frozen):
    """One recorded call. inputs and outputs: the component's tensor names -> keys of golden.safetensors.

    width: of the UNet that answered.
    """

    component: Role
    row: Count = 0
    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    inputs: dict[Name, Text]
    outputs: Annotated[dict[Name, Text], Field(min_length=1)]


class Facts(Frozen):
    """What golden.json holds. rows: of the sampler's table. tokenizers: how many `ids/<i>/…` pairs there are."""

    format: Literal["edgesd-golden-1"] = FORMAT
    prompt: Text
    negative_prompt: Text = ""
    seed: Count = 0
    sampler: Name
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance: float
    size_px: tuple[Dim, Dim]
    tokenizers: Annotated[int, Field(ge=0, le=4)]
    picture_stride: Dim = 1
    calls: Annotated[tuple[CallFacts, ...], Field(min_length=1, max_length=256)]
    # The UNet's calls again, answered by its narrower widths; apart, since older readers take `calls` for one width's.
    narrow_calls: Annotated[tuple[CallFacts, ...], Field(max_length=256)] = ()
    gates: dict[str, Gate] = Field(default_factory=lambda: dict(GATES))

    def settings(self) -> Settings:
        """The run that was recorded, as `sample` takes it."""
        return Settings(
            prompt=self.prompt, negative_prompt=self.negative_prompt, seed=self.seed, sampler=self.sampler,
            num_inference_steps=self.steps, guidance_scale=self.guidance,
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call with its arrays, as a session takes and gives them."""

    component: str
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True, eq=False)
class Golden:
    """Recorded facts and tensors. Tensors are not to be written to."""

    facts: Facts
    tensors: Mapping[str, np.ndarray]

    def components(self) -> tuple[str, ...]:
        """Names of the components with recorded calls, in the order they run."""
        return tuple(dict.fromkeys(call.component for call in self.facts.calls))

    def fits(self, axes: Axes) -> bool:
        """Whether the recorded calls are the truth for a variant: same picture size, a width that was recorded."""
        widths = {1.0, *(call.width for call in self.facts.narrow_calls)}
        return axes.width in widths and axes.size_px == self.facts.size_px

    def calls(self, component: str, batch: int = 1, width: float = 1.0) -> list[Call]:
        """The recorded calls of a component, as calls of `batch` rows.

        With several rows a call, those of one timestep go together, repeated where they are too few.
        """
        by_row: dict[int, list[Call]] = {}
        for facts in (*self.facts.calls, *self.facts.narrow_calls):
            if facts.component == component and facts.width == width:
                sides = [
                    {name: self.tensors[key] for name, key in side.items()} for side in (facts.inputs, facts.outputs)
                ]
                by_row.setdefault(facts.row, []).append(Call(component, *sides))
        return [call for calls in by_row.values() for call in _stacked(calls, batch)]

    def save(self, folder: Path) -> None:
        """Writes both files below a bundle's folder, at `FACTS` and `TENSORS`."""
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / TENSORS).write_bytes(dump_tensors(dict(self.tensors), {"format": FORMAT}))
        (folder / FACTS).write_text(self.facts.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _stacked(calls: list[Call], batch: int) -> Iterator[Call]:
    if batch == 1:
        yield from calls
        return
    for first in range(0, len(calls), batch):
        chosen = [calls[i % len(calls)] for i in range(first, first + batch)]
        inputs = {
            name: value if name == "timestep" else np.concatenate([call.inputs[name] for call in chosen])
            for name, value in chosen[0].inputs.items()
        }
        outputs = {name: np.concatenate([call.outputs[name] for call in chosen]) for name in chosen[0].outputs}
        yield Call(chosen[0].component, inputs, outputs)


# ---- recording -------------------------------------------------------------------------------------------------


def prompt_for(spec: ModelSpec) -> str:
    """Words that the model is known to draw: the recorded prompt, and the one that examples show."""
    return _PROMPTS.get(spec.name, _NEUTRAL)


def settings_for(spec: ModelSpec, steps_of: Mapping[str, Sequence[int]], prompt: str | None = None) -> Settings:
    """The run to record for a bundle. steps_of: the step counts its tables hold, by sampler.

    The model's default sampler if it is there (else the first), the step count nearest to 8, the model's own guidance.
    """
    sampler = spec.defaults.sampler if spec.defaults.sampler in steps_of else next(iter(steps_of))
    steps = min(steps_of[sampler], key=lambda count: (abs(count - STEPS), count))
    prompt = prompt_for(spec) if prompt is None else prompt
    return Settings(prompt=prompt, sampler=sampler, num_inference_steps=steps, guidance_scale=spec.defaults.guidance)


class _Recorder(Watched):
    """A session that notes every call and takes one row a call, so that each half of guidance is seen apart."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.noted: list[Call] = []

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]:
        outputs = self._session.run(component, inputs)
        self.noted.append(Call(component, *({k: np.array(v) for k, v in side.items()} for side in (inputs, outputs))))
        return outputs

    def batches(self, component: str) -> tuple[int, ...] | None:
        return (1,)


class _Tensors(dict[str, np.ndarray]):
    """Tensors by key; the same content twice gets one key."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, str] = {}

    def put(self, key: str, array: np.ndarray) -> str:
        array = np.ascontiguousarray(array)
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        if digest not in self._known:
            self._known[digest], self[key] = key, array
        return self._known[digest]

    def put_call(self, call: Call, row: int, index: int, width: float = 1.0) -> CallFacts:
        sides = (call.inputs, call.outputs)
        keys = [{name: self.put(f"{call.component}/{index}/{name}", side[name]) for name in side} for side in sides]
        return CallFacts(component=call.component, row=row, width=width, inputs=keys[0], outputs=keys[1])  # type: ignore[arg-type]


def record(truth: Pipeline, settings: Settings) -> Golden:
    """Runs the reference once and keeps what the module's docstring lists.

    truth: the float32 torch pipeline of the model. settings: prompts, seed, sampler, steps and guidance (constant).
    """
    recorder = _Recorder(truth.session)
    tensors = _Tensors()
    ids = [
        {"prompt": t.encode(settings.prompt).ids, "negative": t.encode(settings.negative_prompt).ids}
        for t in truth.tokenizers
    ]
    for tokenizer, both in zip(truth.tokenizers, ids, strict=True):
        for ids_of_call in np.concatenate(list(both.values())):
            recorder.run(tokenizer.spec.component, {"input_ids": ids_of_call[None]})
    kept = [(0, call) for call in recorder.noted]
    unet, latents, picture = _run(replace(truth, session=recorder), recorder, settings)
    decoded = next(call for call in reversed(recorder.noted) if call.component == "vae_decoder")
    kept += [*unet, (0, decoded)]
    if recorder.has("vae_encoder"):
        recorder.run("vae_encoder", {"image": decoded.outputs["image"]})
        kept.append((0, recorder.noted[-1]))
    answers = _narrow_calls(truth.session, unet)
    stride = -(-max(picture.image.shape[:2]) // PICTURE_SIDE)
    narrow = tuple(
        tensors.put_call(call, row, len(kept) + index, width) for index, (row, width, call) in enumerate(answers)
    )
    calls = tuple(tensors.put_call(call, row, index) for index, (row, call) in enumerate(kept))
    source = noise.make_source(settings.rng, settings.seed)
    start = source.normal(latents[0].shape[1:], settings.index, 0, noise.Purpose.START)[None]
    whole = {"noise": start, "latents": np.concatenate(latents), "picture": picture.image[::stride, ::stride]}
    whole |= {f"ids/{i}/{side}": value for i, both in enumerate(ids) for side, value in both.items()}
    facts = Facts(
        prompt=settings.prompt, negative_prompt=settings.negative_prompt, seed=settings.seed, calls=calls,
        sampler=settings.sampler, steps=settings.num_inference_steps, guidance=settings.guidance_scale,
        size_px=picture.image.shape[:2], tokenizers=len(ids), picture_stride=stride, narrow_calls=narrow,
    )  # fmt: skip
    return Golden(facts, {**tensors, **{key: np.ascontiguousarray(value) for key, value in whole.items()}})


def _narrow_calls(session: Session, recorded: Sequence[tuple[int, Call]]) -> list[tuple[int, float, Call]]:
    """(row, width, call): the recorded UNet calls as each width below 1 answers them."""
    found = []
    for width in session.widths("unet")[1:]:
        session.use_width("unet", width)
        for row, call in recorded:
            found.append((row, width, Call("unet", call.inputs, session.run("unet", call.inputs))))
    session.use_width("unet", 1.0)
    return found


def _run(
    pipeline: Pipeline, recorder: _Recorder, settings: Settings
) -> tuple[list[tuple[int, Call]], list[np.ndarray], Picture]:
    """UNet calls of the first, middle and last row, the latents after every row, the picture."""
    unet: list[tuple[int, Call]] = []
    latents: list[np.ndarray] = []
    seen = len(recorder.noted)
    for event in sample(pipeline, settings):
        if isinstance(event, Picture):
            return unet, latents, event
        if event.row in {0, event.table.rows // 2, event.table.rows - 1}:
            unet += [(event.row, call) for call in recorder.noted[seen:] if call.component == "unet"]
        del recorder.noted[seen:]
        latents.append(np.array(event.latents))
    raise RequestError("a run that gave no picture", "a run of one picture", "Report this as a bug")


def attach(manifest: Manifest) -> Manifest:
    """The manifest with `golden` set; the files of `Golden.save` must be among its files."""
    return manifest.model_copy(update={"golden": FACTS})


# ---- reading ---------------------------------------------------------------------------------------------------


def read(bundle: Bundle) -> Golden:
    """The golden vectors of a bundle. Raises DataError where they are missing or do not fit together."""
    listed = bundle.manifest.golden
    if listed is None:
        raise DataError(f"{bundle.folder.name} has no golden vectors", "a bundle with them", _AGAIN)
    return load(bundle.path(listed), bundle.path(_tensors_path(listed)))


def load(facts_path: Path, tensors_path: Path) -> Golden:
    """Golden vectors from their two files. Raises DataError where these are missing or do not fit together."""
    try:
        with open_regular(facts_path) as file:
            facts = Facts.model_validate_json(file.read(MAX_READ_BYTES), strict=True)
        with open_regular(tensors_path) as file:
            tensors = load_tensors(file.read(MAX_READ_BYTES))
        _check(facts, tensors)
    except (ValidationError, SafetensorError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise DataError(f"the golden vectors do not read ({reason})", "what edgesd wrote", _AGAIN) from None
    return Golden(facts, tensors)


def _tensors_path(facts_path: RelPath) -> str:
    return str(Path(facts_path).with_suffix(".safetensors").as_posix())


def _check(facts: Facts, tensors: Mapping[str, np.ndarray]) -> None:
    """ValueError or KeyError where facts and tensors differ."""
    named = {
        key
        for call in (*facts.calls, *facts.narrow_calls)
        for side in (call.inputs, call.outputs)
        for key in side.values()
    }
    named |= {f"ids/{i}/{side}" for i in range(facts.tokenizers) for side in ("prompt", "negative")}
    for key in sorted(named | {"noise", "latents", "picture"}):
        if key not in tensors:
            raise ValueError(f"tensor {key} is missing")
        if tensors[key].dtype not in (np.float32, np.int64, np.uint8) or not np.isfinite(tensors[key]).all():
            raise ValueError(f"tensor {key} holds {tensors[key].dtype} or numbers that are not finite")
    if tensors["picture"].ndim != 3 or tensors["latents"].ndim != 4 or tensors["noise"].ndim != 4:
        raise ValueError("picture, latents or noise have the wrong number of dimensions")
