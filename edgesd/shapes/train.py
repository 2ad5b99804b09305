"""How the embedded model is made: tiny VAE, then text encoder and UNet at several widths, then a student of few steps.

    edgesd shapes train -o run                      # hours on two cores, minutes on a GPU; cut and taken up at will
    edgesd shapes train -o run --vae-steps 40 …     # the same in a minute, for tests

Everything is drawn from the procedural world by number, so no data is downloaded and every step is repeatable.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgesd.compress.widths import check_widths
from edgesd.errors import RequestError
from edgesd.files import write_whole
from edgesd.models.facts import read_json
from edgesd.models.load import STUDENT, LoadedModel, embedded_folder, load
from edgesd.models.saving import NESTED, sidecar_of, trained_at
from edgesd.models.weights import SIDECAR
from edgesd.shapes.autoencoder import Autoencoder
from edgesd.shapes.consistency import Consistency
from edgesd.shapes.denoiser import Data, Denoiser, make_data
from edgesd.shapes.reading import Reader
from edgesd.sources import torch_pipeline
from edgesd.training.finetune import ready_for
from edgesd.training.loop import Curve, Progress, Schedule, draw_curve, train
from edgesd.training.lowrank import save_lora
from edgesd.training.pool import WORLD, encode_pictures, stored, world_scenes

WIDTHS = (1.0, 0.75, 0.5)


@dataclass(frozen=True)
class Config:
    """One training. Steps of 0 leave a stage out: the weights it would make are those of `start`, or the embedded ones.

    pictures: of the world, encoded once. start: a checkpoint of the embedded model's shapes to go on from, "shapes" for
    the embedded one; None trains from nothing. pairs: how often a caption of two objects is drawn for one of a single
    object. grounding: weight of `grounding_loss`. widths: the UNet trains nested at these. decoder: channels of the
    VAE's decoder where it is made anew. decoder_only: the VAE's encoder stays, and with it the latents a UNet knows.
    """

    vae_steps: int = 4000
    text_steps: int = 900
    steps: int = 30_000
    student_steps: int = 3000
    pictures: int = 60_000
    batch: int = 64
    vae_batch: int = 16
    lr: float = 1e-3
    vae_lr: float = 2e-3
    text_lr: float = 1e-3
    widths: tuple[float, ...] = WIDTHS
    pairs: float = 3.0
    grounding: float = 0.1
    start: str | None = None
    decoder_only: bool = False
    decoder: int = 64
    seed: int = 0
    precision: str = "bf16"
    measures: int = 8
    stop_after: float | None = None

    def __post_init__(self) -> None:
        check_widths(self.widths)
        if self.pictures < 2 * self.batch:
            raise RequestError(f"{self.pictures} pictures", f"at least {2 * self.batch}", "Raise --pictures")
        if self.decoder_only and self.start is None:
            raise RequestError("a decoder for a VAE made from nothing", "a checkpoint's", "Name one with --start")

    def schedule(self, steps: int, lr: float, **changes: Any) -> Schedule:
        given: dict[str, Any] = {"seed": self.seed, "precision": self.precision, "measures": self.measures} | changes
        return Schedule(lr, steps, warmup=min(300, max(1, steps // 10)), stop_after=self.stop_after, **given)


def train_shapes(out: Path, config: Config, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Trains what `config` asks for in the folder `out`; ends with `out/shapes` and `out/shapes-lcm`, whole.

    Returns what was reached: per stage steps, seconds and figures; "done" is False where `stop_after` cut it: the same
    command goes on, and what it wrote is the average so far (nothing of a VAE). Raises RequestError (another
    configuration trained here), and what `training.loop.train` raises.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_config(out, config)
    curves: dict[str, Curve] = {}
    model = _start(config)
    if config.vae_steps:
        vae = _new_vae(config) if config.start is None else model.modules["vae"]
        coder = Autoencoder(vae, config.vae_batch, config.decoder_only)
        curves["vae"] = train(coder, out / "vae", config.schedule(config.vae_steps, config.vae_lr, ema=0.99), progress)
        model = _with_vae(model, coder) if curves["vae"].done else model
    if config.text_steps and _all_done(curves):
        tokenizer = torch_pipeline(replace(model, modules={})).tokenizers[0]
        reader = Reader(model.modules["text_encoder"], tokenizer)
        curves["text"] = train(reader, out / "text", config.schedule(config.text_steps, config.text_lr), progress)
    if config.steps and _all_done(curves):
        if config.start is not None:
            model = ready_for(config.widths, model, out, progress)
        denoiser = Denoiser(
            model, _data(model, out, config, progress), config.batch, config.widths, grounding=config.grounding
        )
        curves["denoiser"] = train(denoiser, out / "denoiser", config.schedule(config.steps, config.lr), progress)
    if curves and ("vae" not in curves or curves["vae"].done):  # of a run that is cut, the average so far
        save(model, out / "shapes", config, curves)
    if config.student_steps and _all_done(curves):
        student = Consistency(model, _data(model, out, config, progress), config.batch, config.seed)
        schedule = config.schedule(config.student_steps, config.lr, ema=0.99)
        curves["student"] = train(student, out / "student", schedule, progress)
        save(student.student_model(), out / STUDENT, config, curves, student=True)
        save_lora(student.modules["unet"], out / f"{STUDENT}.safetensors")
    for name, curve in curves.items():
        draw_curve(curve, out / f"{name}.png")
    told = {n: {"step": c.step, "of": c.total, "seconds": round(c.seconds, 1), "figures": c.figures[-1:]}
            for n, c in curves.items()}  # fmt: skip
    return {"done": _all_done(curves), "stages": told}


def _all_done(curves: Mapping[str, Curve]) -> bool:
    return all(curve.done for curve in curves.values())


def _same_config(out: Path, config: Config) -> None:
    """A folder holds one configuration: what decides the weights may not change under a run."""
    kept = json.dumps(asdict(replace(config, stop_after=None)), indent=1)
    path = out / "config.json"
    if path.is_file() and path.read_text(encoding="utf-8") != kept:
        raise RequestError(
            f"{out} holds a training of another configuration", "the flags it was begun with", "Name another folder"
        )
    write_whole(path, kept.encode())


def _start(config: Config) -> LoadedModel:
    """The checkpoint to start from; the embedded model with UNet and text encoder made anew where there is none."""
    model = load(config.start)
    if (config.steps or config.text_steps) and config.start is None:
        torch.manual_seed(config.seed)
        for part in ("unet", "text_encoder"):
            model.modules[part] = _anew(model.modules[part])
    return model


def _anew(module: Any) -> nn.Module:
    """A module of the same configuration with fresh weights."""
    fresh = type(module).from_config(module.config) if hasattr(module, "from_config") else type(module)(module.config)
    return fresh.float().eval()


def _new_vae(config: Config) -> Any:
    from diffusers import AutoencoderTiny

    torch.manual_seed(config.seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(config.decoder,) * 4,
        num_encoder_blocks=(1, 2, 2, 2), num_decoder_blocks=(2, 2, 2, 1), latent_channels=4,
    )  # fmt: skip


def _with_vae(model: LoadedModel, job: Autoencoder) -> LoadedModel:
    """The model with the new VAE and the scale that brings its latents to unit variance."""
    job.vae.requires_grad_(False)
    if job.decoder_only:
        return model
    scale = job.scale()
    job.vae.register_to_config(scaling_factor=scale)
    latent = model.spec.latent.model_copy(update={"scaling_factor": scale, "rgb_factors": None, "rgb_bias": None})
    return replace(
        model, modules=model.modules | {"vae": job.vae}, spec=model.spec.model_copy(update={"latent": latent})
    )


def _data(model: LoadedModel, out: Path, config: Config, progress: Progress) -> Data:
    dtype = "bfloat16" if config.precision == "bf16" else "float32"  # 49 dB off, in half the time
    pipeline = torch_pipeline(replace(model, modules={"vae": copy.deepcopy(model.modules["vae"])}), dtype=dtype)
    key = f"{WORLD} {config.pictures} {model.spec.latent.scaling_factor}"
    scenes = world_scenes(config.pictures)
    latents, captions = stored(
        out / "pool.safetensors", key, lambda: encode_pictures(pipeline, scenes, config.pictures, progress)
    )
    return make_data(pipeline, latents, captions, config.pairs)


def save(model: LoadedModel, out: Path, trained: Config, curves: Mapping[str, Curve], *, student: bool = False) -> None:
    """Writes a checkpoint in diffusers layout: float16 weights, the embedded model's configs, what was trained."""
    from edgesd.files import copy_tree, disk_errors, locked, replacing

    source = embedded_folder()
    with locked(out), disk_errors(out, "Free some space"), replacing(out) as new:
        for name in ("model_index.json", "README.md"):
            shutil.copyfile(source / name, new / name)
        for name in ("scheduler", "tokenizer"):
            copy_tree(source / name, new / name)
        for part, module in model.modules.items():
            half: Any = copy.deepcopy(module).cpu().half()
            half.save_pretrained(new / part, safe_serialization=True)
            config = read_json(new / part / "config.json")
            config.pop("_name_or_path", None)  # where it lay on the machine that trained it
            (new / part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        told = sidecar_of(model)
        if student or "denoiser" in curves:
            told = trained_at(told, trained.widths) | ({NESTED: [1.0]} if student else {})
        runs = [{"stage": name, "steps": c.step, "seconds": round(c.seconds)} for name, c in curves.items()]
        before = told.get("training", []) if trained.start is not None else []
        told["training"] = [*before, *runs]
        if student:
            from diffusers import LCMScheduler

            told["defaults"] = {"sampler": "lcm", "steps": 4, "guidance": 1.0}
            shutil.rmtree(new / "scheduler")
            LCMScheduler.from_config(model.spec.scheduler, clip_sample=False).save_pretrained(new / "scheduler")
        (new / SIDECAR).write_text(json.dumps(told, indent=1), encoding="utf-8")
