"""One training loop for all that edgesd trains: exact resume, averaged weights, one processor to several GPUs.

What step i draws depends on (seed, i, process) alone, so a run cut anywhere and taken up again ends with the weights of
the run that was never cut (to the bit on one processor with the same thread count).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from edgesd.errors import DataError, RequestError
from edgesd.files import disk_errors, locked

STATE = "state.safetensors"
SAVE_EVERY_S = 60.0
SPEED_STEPS, SPEED_SKIPPED = 12, 4  # what a time limit is turned into steps by; the first ones warm caches
PRECISIONS = ("fp32", "bf16")
Progress = Callable[[str, int, int], None]
Measure = Callable[[], Mapping[str, float]]


class Job(Protocol):
    """What is trained. modules: by name; those without a trainable parameter are moved and left alone.

    loss(rng, device): one step's loss, a scalar; whatever it draws comes from `rng` (on the processor).
    measure(): figures of the modules as they stand, {} for none; called with the averaged weights in place.
    """

    name: str
    modules: dict[str, nn.Module]

    def loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor: ...

    def measure(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Schedule:
    """How a job is optimised: AdamW, linear warm-up to `lr`, then half a cosine down to `floor` of it at the end.

    steps, or minutes: a time from which the steps follow, measured at the start and kept from then on. ema: weight of
    the past in the averaged weights (their early steps are averaged over what there is). measures: how often figures
    are taken over the run. stop_after: minutes after which this call ends, to be taken up again by the next one.
    """

    lr: float
    steps: int | None = None
    minutes: float | None = None
    warmup: int = 100
    floor: float = 0.02
    ema: float = 0.999
    weight_decay: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"
    measures: int = 0
    stop_after: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise RequestError("a run's length", "steps or minutes", "Give one of the two")
        length = self.steps if self.steps is not None else self.minutes
        if length is None or not length > 0:
            raise RequestError(f"a run of length {length}", "more than 0", "Change --steps or --minutes")
        if self.precision not in PRECISIONS:
            raise RequestError(f"precision {self.precision!r}", ", ".join(PRECISIONS), "Change --mixed-precision")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, 0-based."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, total - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, done))) / 2)

    def keep(self, step: int) -> float:
        """The averaged weights' share of the past at a step."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass
class Curve:
    """A run on record. loss: (step, mean since the last entry); figures: (step, what `measure` said).

    total: steps of the whole run; seconds: spent so far, over all calls.
    """

    total: int = 0
    step: int = 0
    seconds: float = 0.0
    loss: list[tuple[int, float]] = field(default_factory=list)
    figures: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.step >= self.total > 0


def train(job: Job, folder: Path, schedule: Schedule, progress: Progress = lambda *_: None) -> Curve:
    """Trains a job's modules in place and leaves them with the averaged weights; takes up what `folder` holds.

    The state is written whole every minute, at Ctrl-C and at the end; it is safetensors, no pickle. Raises RequestError
    (another process trains here), DataError (a state of other modules, or a loss that is not finite: which step).
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision="bf16" if schedule.precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    with locked(folder / STATE), disk_errors(folder, "Free some space; the run goes on from its last state"):
        run = _Run(job, folder, schedule, accelerator, progress)
        try:
            run.go()
        except KeyboardInterrupt:
            run.save()
            raise
        run.finish()
    return run.curve


class _Step(nn.Module):
    """A job's loss as a forward pass, so that several processes average its gradients."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.parts, self._job = nn.ModuleDict(job.modules), job

    def forward(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        return self._job.loss(rng, device)


class _Run:
    def __init__(self, job: Job, folder: Path, schedule: Schedule, accelerator: Any, progress: Progress) -> None:
        self.job, self.folder, self.schedule = job, folder, schedule
        self.accelerator, self.progress, self.curve = accelerator, progress, Curve()
        self.step_module = _Step(job)
        trained = [(n, p) for n, p in self.step_module.named_parameters() if p.requires_grad]
        if not trained:
            raise RequestError(f"nothing to train in {job.name}", "modules with trainable parameters", "Report this")
        self.names, self.params = [n for n, _ in trained], [p for _, p in trained]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=schedule.lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay,
            fused=accelerator.device.type == "cpu",
        )  # fmt: skip
        self.wrapped, self.optimizer = accelerator.prepare(self.step_module, self.optimizer)
        self.average = [p.detach().clone() for p in self.params]
        self._saved, self._warm_s = time.perf_counter(), 0.0
        self._sum, self._count = torch.zeros((), device=accelerator.device), 0
        if (folder / STATE).is_file():
            self.load()

    def go(self) -> None:
        """Steps until the end, or until this call's time is over."""
        schedule, curve = self.schedule, self.curve
        if curve.total == 0 and schedule.steps is not None:
            curve.total = schedule.steps
        limit = math.inf if schedule.stop_after is None else schedule.stop_after * 60
        opened = time.perf_counter()
        while curve.total == 0 or curve.step < curve.total:
            began = time.perf_counter()
            self.one_step()
            curve.seconds += time.perf_counter() - began
            if curve.total == 0:
                self._settle_length()
            if curve.step % self._every(100) == 0:
                self._note()
                self.progress(self.job.name, curve.step, curve.total)
            if schedule.measures and curve.step % self._every(schedule.measures) == 0:
                self._measure()
            if time.perf_counter() - self._saved > SAVE_EVERY_S:
                self.save()
            if time.perf_counter() - opened > limit:
                return

    def one_step(self) -> None:
        """One optimiser step; raises DataError when the loss is no number."""
        step, schedule = self.curve.step, self.schedule
        total = self.curve.total if self.curve.total else 10**9
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(step, total)
        rng = torch.Generator().manual_seed((schedule.seed * 1_000_003 + step) * 1009 + self.accelerator.process_index)
        with self.accelerator.autocast():
            loss = self.wrapped(rng, self.accelerator.device)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.params, schedule.clip)
        if not torch.isfinite(norm):
            raise DataError(
                f"{self.job.name}: the loss of step {step} is {loss.item()}", "a finite loss",
                "Lower --lr; the last state is kept",
            )  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - schedule.keep(step))
        self._sum += loss.detach()
        self._count += 1
        self.curve.step = step + 1

    def _settle_length(self) -> None:
        """Turns minutes into steps once the speed is known."""
        step, seconds = self.curve.step, self.curve.seconds
        if step == SPEED_SKIPPED:
            self._warm_s = seconds
        if step == SPEED_STEPS:
            each = (seconds - self._warm_s) / (SPEED_STEPS - SPEED_SKIPPED)
            left = (self.schedule.minutes if self.schedule.minutes is not None else 0) * 60 - seconds
            self.curve.total = SPEED_STEPS + max(0, int(left / each))

    def _every(self, times: int) -> int:
        """The steps between so many events of a run; never, while its length is unknown."""
        return max(1, self.curve.total // times) if self.curve.total else 1 << 60

    def _note(self) -> None:
        if self._count:
            self.curve.loss.append((self.curve.step, float(self._sum) / self._count))
            self._sum, self._count = torch.zeros_like(self._sum), 0

    def _measure(self) -> None:
        if not self.accelerator.is_main_process:
            return
        own = [p.detach().clone() for p in self.params]
        self._put(self.average)
        figures = {k: float(v) for k, v in self.job.measure().items()}
        self._put(own)
        if figures:
            self.curve.figures.append((self.curve.step, figures))

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for param, value in zip(self.params, values, strict=True):
                param.copy_(value)

    def finish(self) -> None:
        """Notes and saves what the run ended with; the modules keep the averaged weights."""
        self._note()
        if self.curve.done and self.schedule.measures and self.curve.figures[-1:] == []:
            self._measure()
        self.save()
        self._put(self.average)
        for module in self.job.modules.values():
            module.eval()

    # ---- state -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state whole: weights, averages, moments, and the curve in the header."""
        self._saved = time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, param, mean in zip(self.names, self.params, self.average, strict=True):
            state = self.optimizer.state.get(param, {})
            kept = {"weight": param.detach(), "average": mean, **{k: state[k] for k in MOMENTS if k in state}}
            tensors |= {f"{kind}/{name}": value.detach().cpu().contiguous() for kind, value in kept.items()}
        part = self.folder / f".{STATE}.part"
        told = {"curve": json.dumps(asdict(self.curve)), "job": self.job.name, "seed": str(self.schedule.seed)}
        save_file(tensors, part, metadata=told)
        part.replace(self.folder / STATE)

    def load(self) -> None:
        """Takes up a state of the same job, seed and modules."""
        fix = f"Name another folder, or delete {self.folder / STATE} to start anew"
        try:
            with safe_open(self.folder / STATE, "pt") as file:
                told = file.metadata()
                for name, param, mean in zip(self.names, self.params, self.average, strict=True):
                    found = {kind: file.get_tensor(f"{kind}/{name}") for kind in ("weight", "average", *MOMENTS)}
                    if found["weight"].shape != param.shape:
                        raise RuntimeError(f"{name} has shape {list(found['weight'].shape)}")
                    with torch.no_grad():
                        param.copy_(found["weight"])
                        mean.copy_(found["average"])
                    self.optimizer.state[param] = {
                        kind: found[kind] if kind == "step" else found[kind].to(param.device) for kind in MOMENTS
                    }
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise DataError(
                f"the state of {self.job.name} does not fit ({reason})", "a state of this run", fix
            ) from None
        if (told["job"], told["seed"]) != (self.job.name, str(self.schedule.seed)):
            came, want = f"a state of {told['job']}, seed {told['seed']}", f"{self.job.name}, seed {self.schedule.seed}"
            raise DataError(came, want, fix)
        kept = json.loads(told["curve"])
        self.curve = Curve(
            kept["total"], kept["step"], kept["seconds"], [tuple(x) for x in kept["loss"]],
            [(step, figures) for step, figures in kept["figures"]],
        )  # fmt: skip


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def draw_curve(curve: Curve, path: Path) -> None:
    """Loss and figures over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _ in curve.loss], [loss for _, loss in curve.loss], color="#4a7fb0", label="loss")
    axes.set(xlabel="steps", ylabel="loss", yscale="log", title=f"{curve.step} steps, {curve.seconds / 60:.1f} min")
    right = axes.twinx()
    for index, name in enumerate(sorted({name for _, figures in curve.figures for name in figures})):
        points = [(step, figures[name]) for step, figures in curve.figures if name in figures]
        right.plot(*zip(*points, strict=True), color=f"C{index + 1}", marker=".", label=name)
    right.yaxis.set_visible(bool(curve.figures))
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
