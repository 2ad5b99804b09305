"""Recording calibration sets: real calls of every component along real sampling runs.

    calibrate(load("shapes"), Path("shapes.calib"))
    calls = edgesd.calibration.sets.open_set(Path("shapes.calib")).calls("unet")

One run (a prompt, a seed, a step count) makes one shard, so an interrupted capture goes on where it stopped. The rows
to keep are spread over each run and shifted from run to run, so that the set covers every noise level. With guidance a
recorded UNet call has two rows, unconditional first, as sampling makes it. Nothing is random but the seed's noise.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
from safetensors.numpy import save as dump_tensors

from edgesd.calibration.sets import FORMAT, INDEX, MAX_CALLS, CalibrationSet, CaptureInfo, read_shard, shard_name
from edgesd.errors import DataError, RequestError, SetupError
from edgesd.files import disk_errors, locked, write_whole
from edgesd.manifest import ModelSpec
from edgesd.models.load import LoadedModel
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.generate import Picture, sample
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.session import Session, Watched
from edgesd.runtime.settings import Settings, resolve
from edgesd.runtime.table import SamplerTable
from edgesd.sources import torch_pipeline

GENERAL = ("photographs", "art", "products", "people", "icons", "long", "short", "other_languages")


def calibrate(
    model: LoadedModel,
    out: Path,
    *,
    calls: int = 480,
    prompts: str | None = None,
    sampler: str | None = None,
    steps: Sequence[int] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationSet:
    """Records about `calls` UNet calls (rows, guidance counted twice) and those of the other components along the way.

    prompts: names of sets in calibration/prompts joined by "+", or a text file with one prompt a line; None = the
    embedded model's grammar, or all general sets. sampler, steps (one or several counts), guidance: None = the model's.
    An unfinished `out` of the same request is taken up again; progress(runs done, runs in all). Raises RequestError
    (bad request, or `out` holds something else), SetupError (disk), DataError (values that are not finite).
    """
    settings = resolve(model.spec, "calibration", sampler=sampler, guidance_scale=guidance, seed=seed)
    steps = (settings.num_inference_steps,) if steps is None else tuple(steps)
    info = plan(model, settings, calls, prompts_for(prompts, model.spec), steps)
    pipeline = torch_pipeline(model)
    for count in steps:
        pipeline.table(settings.sampler, count)  # refuses what cannot be sampled before anything is written
    _check_disk(out, predicted_bytes(info, model.spec, pipeline))
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out), disk_errors(out, "Free some space, or lower --calls"):
        _begin(out, info)
        for run in range(info.runs):
            if not _whole(out, run):
                shard = dump_tensors(record(pipeline, info, run), {"format": FORMAT})
                write_whole(out / shard_name(run), shard)
            progress(run + 1, info.runs)
    return CalibrationSet(out, info)


def plan(
    model: LoadedModel, settings: Settings, calls: int, prompts: Sequence[str], steps: tuple[int, ...]
) -> CaptureInfo:
    """How many runs give `calls` UNet calls when half the rows of each run are kept."""
    halves = 2 if settings.guidance_scale > 1 and not model.spec.guidance_embedding_dim else 1
    if not (1 <= calls <= MAX_CALLS) or not steps or not all(1 <= count <= 1000 for count in steps):
        raise RequestError(
            f"{calls} calls at {list(steps)} steps",
            f"1 to {MAX_CALLS} calls, 1 to 1000 steps",
            "Change --calls or --steps",
        )
    wanted = math.ceil(calls / halves)
    rows = min(wanted, math.ceil(min(steps) / 2))
    return CaptureInfo(
        model=model.spec.name, sha256=model.sha256, size_px=model.spec.defaults.size_px, sampler=settings.sampler,
        steps=steps, guidance=settings.guidance_scale, seed=settings.seed, runs=math.ceil(wanted / rows), rows=rows,
        prompts=tuple(prompts),
    )  # fmt: skip


def record(pipeline: Pipeline, info: CaptureInfo, run: int) -> dict[str, np.ndarray]:
    """Samples run number `run` and gives its shard's tensors: kept rows of the UNet, every call of the others."""
    steps = info.steps[run % len(info.steps)]
    settings = resolve(
        pipeline.spec, info.prompts[run % len(info.prompts)], sampler=info.sampler, num_inference_steps=steps,
        guidance_scale=info.guidance, seed=info.seed + run,
    )  # fmt: skip
    table = pipeline.table(info.sampler, steps)
    recorder = _Recorder(pipeline.session, spread(table.rows, info.rows, run))
    x0: np.ndarray = np.zeros((1, 0, 0, 0), np.float32)
    for event in sample(replace(pipeline, session=recorder), settings, cache=PromptCache()):
        x0 = event.latents
        if not isinstance(event, Picture) and not np.isfinite(event.model_output).all():
            raise DataError(
                f"the UNet gave values that are not finite at step {event.row + 1} of {table.rows} (run {run})",
                "finite values", "Check the checkpoint: it may be broken, or overflow at this size",
            )  # fmt: skip
    tensors = recorder.tensors()
    kept = tensors["unet.row"]
    noise, signal = table.sigma[kept].astype(np.float64) ** 2, table.alpha[kept].astype(np.float64) ** 2
    tensors["unet.weight"] = (noise / (noise + signal)).astype(np.float32)
    guidance = info.guidance if tensors["unet.sample"].shape[1] == 2 else 1.0
    tensors["unet.target"] = np.concatenate(
        [_answer(table, row, u[:1, : x0.shape[1]], x0) for row, u in zip(kept, tensors["unet.sample"], strict=True)]
    )
    tensors["unet.guidance"] = np.full(len(kept), guidance, np.float32)
    return tensors


def _answer(table: SamplerTable, row: int, sample: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """The model output that `SamplerTable.x0_coefficients` turns into x0: what a perfect denoiser of this run says."""
    skip, out = table.x0_coefficients(row)
    return ((x0 - skip * sample) / out).astype(np.float32)


def spread(rows: int, kept: int, run: int) -> list[int]:
    """`kept` of `rows` rows, one from each equal part, where in its part changing from run to run.

    Golden-ratio steps (Weyl's sequence) fill each part evenly whatever the number of runs.
    """
    kept = min(kept, rows)
    phase = (run * 0.6180339887498949) % 1.0
    return [int((part + phase) * rows / kept) for part in range(kept)]


class _Recorder(Watched):
    """A session that keeps what it is asked: every component's inputs, of the UNet only the chosen rows."""

    def __init__(self, session: Session, rows: Sequence[int]) -> None:
        super().__init__(session)
        self._rows, self._row = set(rows), 0
        self._seen: dict[str, list[tuple[int, dict[str, np.ndarray]]]] = {}

    def run(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._session.run(component, inputs)
        if component != "unet" or self._row in self._rows:
            copied = {name: np.array(array) for name, array in inputs.items()}
            self._seen.setdefault(component, []).append((self._row if component == "unet" else 0, copied))
        if component == "unet":
            self._row += 1
        if component == "vae_decoder":  # the picture is just what image-to-image would encode
            self._seen.setdefault("vae_encoder", []).append((0, {"image": np.array(outputs["image"])}))
        return outputs

    def tensors(self) -> dict[str, np.ndarray]:
        """component.input -> [calls, rows of a call, ...]; the text, alike in all calls of a run, only once."""
        made = {}
        for component, calls in self._seen.items():
            for name in calls[0][1]:
                stacked = np.stack([inputs[name] for _, inputs in calls])
                made[f"{component}.{name}"] = stacked[:1] if name == "encoder_hidden_states" else stacked
            made[f"{component}.row"] = np.array([row for row, _ in calls], np.int32)
        return made


def predicted_bytes(info: CaptureInfo, spec: ModelSpec, pipeline: Pipeline) -> int:
    """Bytes on disk of the whole set: latents, text states, tokens and pictures in float32."""
    height, width = info.size_px
    latent = spec.unet_in_channels * (height // spec.latent.downscale) * (width // spec.latent.downscale)
    tokens = pipeline.tokenizers[0].spec
    states = pipeline.session.run(tokens.component, {"input_ids": np.full((1, tokens.max_length), tokens.eos_id)})
    text = states["encoder_hidden_states"].size
    return info.runs * (
        4 * (3 * latent * (info.rows + 1) + 2 * text + 4 * tokens.max_length + 3 * height * width) + 4096
    )


def _check_disk(out: Path, needed: int) -> None:
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > 0.9 * free:
        raise SetupError(
            f"a calibration set of {needed >> 20} MiB with {free >> 20} MiB free",
            "room for the whole set and a tenth to spare", "Lower --calls, or choose another disk",
        )  # fmt: skip


def _begin(out: Path, info: CaptureInfo) -> None:
    """Writes the index, or checks that what is there was begun by the same request."""
    wanted = info.model_dump_json(indent=1).encode()
    if not out.exists():
        out.mkdir()
        write_whole(out / INDEX, wanted)
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / INDEX).is_file()):
        raise RequestError(
            f"{out} exists and is no calibration set", "a new folder, or one to go on with", "Name another"
        )
    if not (out / INDEX).exists():
        write_whole(out / INDEX, wanted)
    elif (out / INDEX).read_bytes() != wanted:
        raise RequestError(
            f"{out} was recorded from another model or with other settings", "a new folder, or the same request",
            "Delete it, or name another folder",
        )  # fmt: skip


def _whole(folder: Path, run: int) -> bool:
    if not (folder / shard_name(run)).is_file():
        return False
    try:
        read_shard(folder, run)
    except DataError:
        return False
    return True


def prompt_sets() -> tuple[str, ...]:
    """Names of the prompt sets that come along."""
    return tuple(sorted(p.name.removesuffix(".txt") for p in _prompt_folder().iterdir() if p.name.endswith(".txt")))


def _prompt_folder():
    return resources.files("edgesd.calibration") / "prompts"


def load_prompts(names: Sequence[str]) -> list[str]:
    """The prompts of these sets, one from each in turn. Raises RequestError for a name there is not."""
    lists = []
    for name in names:
        if name not in prompt_sets():
            raise RequestError(f"prompt set {name!r}", ", ".join(prompt_sets()), "Choose one, or pass a text file")
        lists.append(_lines((_prompt_folder() / f"{name}.txt").read_text(encoding="utf-8")))
    longest = max(len(lines) for lines in lists)
    return [lines[i] for i in range(longest) for lines in lists if i < len(lines)]


def prompts_for(chosen: str | None, spec: ModelSpec) -> list[str]:
    """The prompts that `calibrate` takes: named sets, a text file, or (None) what suits the model. RequestError."""
    if chosen is None:
        return load_prompts(("shapes",) if spec.name.startswith("shapes") else GENERAL)
    if Path(chosen).suffix != ".txt":
        return load_prompts(chosen.split("+"))
    try:
        lines = _lines(Path(chosen).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"prompts {chosen!r} do not read ({error})", "a UTF-8 text file", "Check the path") from None
    if not lines:
        raise RequestError(f"prompts {chosen!r} hold no prompt", "one prompt a line", "Add some")
    return lines


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
