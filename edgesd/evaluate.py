"""How well pictures show what their captions say: alignment in the embedded model's world, alone or against another.

Captions are held out: seed s draws them from `random.Random(77 + s)`, so seed 0 is what the model card measures.
Caption i is drawn with noise seed s * 100,000 + i: no two evaluations share noise, and two models compared do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesd.errors import RequestError
from edgesd.runtime.image import contact_sheet, psnr_db, save_png, ssim
from edgesd.shapes.oracle import Verdict, judge
from edgesd.shapes.world import held_out_captions

Draw = Callable[[list[str], list[int]], Sequence[np.ndarray]]
PARTS = ("background", "color", "shape", "relation")
MAX_PROMPTS = 10_000  # their pictures are held in memory: half a gigabyte
SEED_STRIDE = 100_000
SHEET_PICTURES = 256
MAX_SEED = 2**32 - 1
RESAMPLES = 2000
RIGHT, WRONG, INK = "#1a7f37", "#c4231c", "#222222"


@dataclass(frozen=True)
class Paired:
    """A model against another on the same captions and noise.

    difference: of alignment, first minus second; interval: its 95 % bootstrap interval over pairs. psnr_db, ssim: the
    first's pictures against the second's, means over pictures (an equal pair counts as 100 dB).
    """

    difference: float
    interval: tuple[float, float]
    psnr_db: float
    ssim: float


@dataclass(frozen=True, eq=False)
class Report:
    """What was measured. verdicts in the order of captions; images [H,W,3] u8; seconds: drawing and judging."""

    captions: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    verdicts: tuple[Verdict, ...]
    seed: int
    seconds: float
    paired: Paired | None = None

    @property
    def alignment(self) -> dict[str, float]:
        """Shares of captions, 0..1: wholly right (`all`), each part right, and the mean of the four parts.

        A caption that names no relation counts as right in `relation`.
        """
        parts = {key: float(np.mean([getattr(v, key) for v in self.verdicts])) for key in PARTS}
        return {"all": float(np.mean(_right(self.verdicts))), **parts, "mean": float(np.mean(list(parts.values())))}

    def to_json(self) -> dict[str, Any]:
        """The report as `edgesd evaluate --json` prints it."""
        told = {
            "alignment": {key: round(value, 4) for key, value in self.alignment.items()},
            "interval": {"all": _rounded(bootstrap_interval(_right(self.verdicts)))},
            "prompts": len(self.captions),
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
        }
        if self.paired is not None:
            plain = {key: round(value, 4) for key, value in asdict(self.paired).items() if key != "interval"}
            told["paired"] = {**plain, "interval": _rounded(self.paired.interval)}
        return told

    def describe(self) -> str:
        """The report for people."""
        low, high = bootstrap_interval(_right(self.verdicts))
        parts = ", ".join(f"{key} {value:.3f}" for key, value in self.alignment.items() if key != "all")
        lines = [
            f"alignment {self.alignment['all']:.3f} (95 % interval {low:.3f} to {high:.3f})",
            f"  {parts}",
            f"  {len(self.captions)} captions, {self.seconds:.1f} s",
        ]
        if self.paired is not None:
            low, high = self.paired.interval
            lines.append(
                f"against the other: alignment {self.paired.difference:+.3f} ({low:+.3f} to {high:+.3f}), "
                f"PSNR {self.paired.psnr_db:.1f} dB, SSIM {self.paired.ssim:.4f}"
            )
        return "\n".join(lines)


def evaluate(
    draw: Draw, *, prompts: int = 128, seed: int = 0, against: Draw | None = None, sheet: Path | None = None
) -> Report:
    """Draws `prompts` held-out captions and judges the pictures; `against` draws the same ones with the same noise.

    draw: (captions, noise seeds) -> one picture [128,128,3] u8 each. sheet: PNG to write, the captions with the first
    model's pictures and verdicts (the first 256). Raises RequestError for numbers out of range, pictures of another
    size, and a sheet that has no folder to lie in, which is found out before anything is drawn.
    """
    rules = [(prompts, 1, MAX_PROMPTS, "prompts"), (seed, 0, MAX_SEED, "seed")]
    for value, low, high, name in rules:
        if not low <= value <= high:
            raise RequestError(f"{name} {value}", f"{low} to {high}", f"Change --{name}")
    if sheet is not None and (sheet.is_dir() or not sheet.parent.is_dir()):
        raise RequestError(f"a sheet at {sheet}", "a file in an existing folder", "Name another file")
    began = time.perf_counter()
    captions = held_out_captions(prompts, seed)
    noise_seeds = [seed * SEED_STRIDE + index for index in range(prompts)]
    images, verdicts = _judged(draw, captions, noise_seeds)
    paired = None
    if against is not None:
        theirs, their_verdicts = _judged(against, captions, noise_seeds)
        paired = _compare(images, verdicts, theirs, their_verdicts)
    report = Report(tuple(captions), images, verdicts, seed, time.perf_counter() - began, paired)
    if sheet is not None:
        save_png(sheet, sheet_image(report))
    return report


def _judged(draw: Draw, captions: list[str], seeds: list[int]) -> tuple[tuple[np.ndarray, ...], tuple[Verdict, ...]]:
    images = tuple(draw(captions, seeds))
    return images, tuple(judge(image, caption) for image, caption in zip(images, captions, strict=True))


def _compare(
    images: Sequence[np.ndarray], verdicts: Sequence[Verdict], theirs: Sequence[np.ndarray], other: Sequence[Verdict]
) -> Paired:
    differences = _right(verdicts) - _right(other)
    pairs = list(zip(images, theirs, strict=True))
    return Paired(
        difference=float(differences.mean()),
        interval=bootstrap_interval(differences),
        psnr_db=float(np.mean([psnr_db(a, b) for a, b in pairs])),
        ssim=float(np.mean([ssim(a, b) for a, b in pairs])),
    )


def _right(verdicts: Sequence[Verdict]) -> np.ndarray:
    return np.array([verdict.all for verdict in verdicts], np.float64)


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in interval]


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979): 2,000 resamples, the same ones every time."""
    rng = np.random.RandomState(0)  # the generator whose stream numpy promises to keep
    means = [values[rng.randint(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def sheet_image(report: Report) -> np.ndarray:
    """The report as a contact sheet [H,W,3] u8: picture, caption and what is wrong, for the first 256 captions."""
    lines = []
    for caption, verdict in list(zip(report.captions, report.verdicts, strict=True))[:SHEET_PICTURES]:
        note = ("right", RIGHT) if verdict.all else (f"wrong: {', '.join(verdict.failed)}", WRONG)
        lines.append([(caption, INK), note])
    return contact_sheet(report.images[:SHEET_PICTURES], lines)
