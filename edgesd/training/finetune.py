"""Recovery: a pruned UNet learns from the one it was cut from, by what both say of the same noisy latents.

Loss: the difference of the outputs, of the outputs as guidance combines them, and of what each block hands on, scaled
by the teacher's own (Kim et al., "BK-SDM", arXiv 2305.15798, has output and block losses). Noise levels weigh as
min-SNR has it (Hang et al., arXiv 2303.09556).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgesd.compress.widths import important_first, trained_widths
from edgesd.errors import RequestError
from edgesd.files import remove
from edgesd.manifest import ModelSpec
from edgesd.models.load import LoadedModel, load
from edgesd.models.plain import two_product_attention
from edgesd.models.saving import ORDERED, save_checkpoint, sidecar_of, trained_at
from edgesd.models.session import forward
from edgesd.training import pool as pools
from edgesd.training.loop import Curve, Progress, Schedule, draw_curve, train
from edgesd.training.nested import Nested
from edgesd.training.pool import Pool
from edgesd.training.quantized import on_int8_grids

MIN_SNR = 5.0
FEATURES = 0.2  # what block outputs count beside the outputs
HELD_BACK = 32  # pairs of the pool that measure and never train
TIMESTEPS = 1000
FEW_POSITIONS = 1024  # of latents, up to which attention maps of a batch are little
ORDERING_CALLS = 128  # UNet rows by which the units of a model are put in order, for nested widths
CURVE = "training.png"


def finetune(
    source: str, teacher: str, out: Path, schedule: Schedule, *, data: str | None = None, pictures: int = 512,
    batch: int = 8, widths: Sequence[float] = (1.0,), int8: bool = False, guidance: float | None = None,
    progress: Progress = lambda *_: None,
) -> Curve:  # fmt: skip
    """Trains the UNet of a pruned checkpoint against the one it was cut from; writes the recovered checkpoint to `out`.

    data: a folder of captioned pictures, "shapes" for the embedded model's world, None for the teacher's own pictures
    of its calibration prompts. pictures: how many the teacher draws, or the most that are read. batch: latents a step,
    each with its prompt and without. widths, int8: see `Recovery`. The run's state lies beside `out` until it is whole:
    the same command goes on where it was cut. Raises RequestError (out exists, a teacher that is not the original),
    DataError (see `train`).
    """
    if out.exists():
        raise RequestError(f"{out} exists", "a new folder", "Choose another -o")
    student, original = load(source), load(teacher)
    _check_pair(student, original)
    work = out.with_name(f"{out.name}.training")
    work.mkdir(parents=True, exist_ok=True)
    truth = _pipeline(original)
    key = f"{original.sha256} {data} {pictures} {schedule.seed}"
    made = pools.stored(
        work / "pool.safetensors", key, lambda: _latents(truth, data, pictures, schedule.seed, progress)
    )
    chosen = original.spec.defaults.guidance if guidance is None else guidance
    student = ready_for(widths, student, work, progress)
    job = Recovery(
        student.modules["unet"], original.modules["unet"], pools.make_pool(truth, *made), original.spec, batch=batch,
        guidance=chosen, widths=widths, int8=int8,
    )  # fmt: skip
    curve = train(job, work, schedule, progress)
    if curve.done:
        recovery = {"steps": curve.total, "teacher_sha256": original.sha256, "int8": int8}
        told = trained_at(sidecar_of(student), widths) | {"finetuned": recovery}
        save_checkpoint(
            student, {"unet": student.modules["unet"]}, out, told, lambda new: draw_curve(curve, new / CURVE)
        )
        remove(work)
    return curve


def ready_for(widths: Sequence[float], model: LoadedModel, work: Path, progress: Progress) -> LoadedModel:
    """The model with the important units of its UNet's groups in front, so that narrow widths start from what matters.

    As it is where there are none, or where it was trained at narrow widths before: what it learnt lies in the order
    that its units have. The calls that units are judged by are recorded in `work`, once.
    """
    from edgesd.calibration.capture import calibrate

    if min(widths) == 1 or sidecar_of(model).get(ORDERED) or set(widths) <= set(trained_widths(model)):
        return model
    calls = calibrate(model, work / "calls", calls=ORDERING_CALLS).calls("unet")
    return replace(model, modules=model.modules | {"unet": important_first(model, calls, progress=progress)})


def _check_pair(student: LoadedModel, original: LoadedModel) -> None:
    """The teacher must be what the student was cut from, or share its blocks where it was not cut by edgesd."""
    plan = sidecar_of(student).get("pruned", {}).get("unet")
    if plan is not None and plan.get("source_sha256") != original.sha256:
        raise RequestError(
            f"{original.spec.name} is not what {student.spec.name} was pruned from", "the original checkpoint",
            "Pass that one with --teacher",
        )  # fmt: skip
    if original.spec.unet_in_channels != original.spec.latent.channels:
        raise RequestError("an inpainting UNet", "a text-to-image one", "Recover the model it was made from")


def _pipeline(model: LoadedModel) -> Any:
    from edgesd.sources import torch_pipeline

    return torch_pipeline(model, device="cuda" if torch.cuda.is_available() else "cpu")


def _latents(truth: Any, data: str | None, pictures: int, seed: int, progress: Progress) -> tuple[Any, list[str]]:
    if data is None:
        from edgesd.calibration.capture import prompts_for

        return pools.draw_latents(truth, prompts_for(None, truth.spec), pictures, seed, progress)
    if data == pools.WORLD and not Path(data).exists():
        return pools.encode_pictures(truth, pools.world_scenes(pictures), pictures, progress)
    found = pools.folder_pictures(Path(data), truth.spec.defaults.size_px, pictures)
    return pools.encode_pictures(truth, found, pictures, progress)


@dataclass(frozen=True, eq=False)
class Levels:
    """A model's noise levels. alpha, sigma [1000]; weight [1000]: of a timestep's squared error."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    weight: torch.Tensor

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (x[timestep].view(-1, 1, 1, 1) for x in (self.alpha, self.sigma))
        return alpha * latents + sigma * noise


def levels(spec: ModelSpec, least: float = 0.0) -> Levels:
    """From the checkpoint's scheduler: its betas and prediction type.

    A clean picture's squared error weighs min(SNR, 5) + `least`: min-SNR alone hardly counts the noisiest levels.
    Raises RequestError for other predictions than epsilon and v.
    """
    from diffusers import DDPMScheduler

    if spec.prediction_type not in ("epsilon", "v_prediction"):
        raise RequestError(f"a model that predicts {spec.prediction_type}", "epsilon, v_prediction", "Train another")
    signal = DDPMScheduler.from_config(spec.scheduler).alphas_cumprod
    snr = signal / (1 - signal)
    weight = (snr.clamp(max=MIN_SNR) + least) / (snr if spec.prediction_type == "epsilon" else snr + 1)
    return Levels(signal.sqrt(), (1 - signal).sqrt(), weight)


class Recovery:
    """A job of `training.loop`: student and teacher are UNets of the same blocks, inner widths apart.

    batch: latents a step, each with its prompt and without. widths: below 1 they train nested too, on the student's own
    output. int8: the student computes on int8 grids, for weights that bear them. guidance: of the pictures to come.
    """

    name = "recovery"

    def __init__(
        self, student: nn.Module, teacher: nn.Module, pool: Pool, spec: ModelSpec, *, batch: int, guidance: float,
        widths: Sequence[float] = (1.0,), int8: bool = False,
    ) -> None:  # fmt: skip
        if len(pool.latents) <= HELD_BACK:
            raise RequestError(f"{len(pool.latents)} pictures", f"more than {HELD_BACK}", "Give more data")
        student.train().requires_grad_(True)
        self.modules: dict[str, nn.Module] = {"unet": student, "teacher": teacher.eval().requires_grad_(False)}
        self._pool, self._spec, self._batch, self._guidance = pool, spec, batch, guidance
        self._levels, self._forward = levels(spec), forward(spec)["unet"]
        if pool.latents[0, 0].numel() <= FEW_POSITIONS:
            two_product_attention(student)
        self._nested = Nested(student, widths) if min(widths) < 1 else None
        self._int8 = [student, *(self._nested.forms.values() if self._nested is not None else ())] if int8 else []

    def loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        with on_int8_grids(*self._int8):
            return self._loss(rng, device)

    def _loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        inputs, timestep = self._draw(rng, device, len(self._pool.latents) - HELD_BACK, self._batch)
        student, teacher = self.modules["unet"], self.modules["teacher"]
        with torch.no_grad(), _outputs(teacher) as wanted:
            answer = self._run(teacher, inputs).float()
        with _outputs(student) as made:
            output = self._run(student, inputs).float()
        weight = self._levels.weight.to(device)[timestep]
        total = self._difference(output, answer, weight) + FEATURES * _features(made, wanted)
        if self._nested is not None:
            target = output.detach()
            for width in self._nested.chosen(rng):
                narrow = self._run(lambda *a, w=width, **k: self._nested.call(w, *a, **k), inputs).float()
                total = total + self._difference(narrow, target, weight)
        return total

    def measure(self) -> Mapping[str, float]:
        """The student's error against the teacher on pictures held back, in dB; on int8 grids where it trains there."""
        device = next(self.modules["unet"].parameters()).device
        rng = torch.Generator().manual_seed(0)
        student = self.modules["unet"].eval()
        with torch.no_grad():
            inputs, _ = self._draw(rng, device, HELD_BACK, HELD_BACK, first=len(self._pool.latents) - HELD_BACK)
            wanted = self._run(self.modules["teacher"], inputs).float()
            with on_int8_grids(*self._int8):
                error = self._run(student, inputs).float() - wanted
        student.train()
        return {"one-step SNR, dB": float(10 * torch.log10(wanted.square().sum() / error.square().sum()))}

    def _draw(
        self, rng: torch.Generator, device: torch.device, among: int, batch: int, first: int = 0
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs of 2 * batch rows, the ones without a prompt first, and the timestep of each pair."""
        pool = self._pool
        index = first + torch.randint(0, among, (batch,), generator=rng)
        timestep = torch.randint(0, TIMESTEPS, (batch,), generator=rng)
        latents = pool.latents[index]
        noisy = self._levels.noisy(latents, torch.randn(latents.shape, generator=rng), timestep)
        inputs = {"sample": torch.cat([noisy, noisy]), "timestep": torch.cat([timestep, timestep])}
        for name, told in pool.told.items():
            inputs[name] = torch.cat([pool.empty[name].expand(batch, *told.shape[1:]), told[pool.caption[index]]])
        return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}, timestep.to(device)

    def _run(self, unet: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._forward({"unet": unet}, inputs)["model_output"]

    def _difference(self, output: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Weighted squared error of both halves and of their guided combination, each brought to the same scale."""
        error, g = output - wanted, self._guidance
        uncond, cond = error.chunk(2)
        guided = (uncond + g * (cond - uncond)).square() / (g**2 + (1 - g) ** 2)
        each = uncond.square() + cond.square() + guided
        return (each.flatten(1).mean(1) * weight).mean()


def _features(made: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
    """Mean over blocks of the squared error of what they hand on, in shares of the teacher's own power."""
    shares = [
        (a.float() - b.float()).square().mean() / b.float().square().mean() for a, b in zip(made, wanted, strict=True)
    ]
    return torch.stack(shares).mean()


@contextmanager
def _outputs(unet: Any) -> Iterator[list[torch.Tensor]]:
    """Collects what each block of a UNet hands on while it runs."""
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    blocks = (*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks)
    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
