"""How far an artefact is from the float32 truth: dB on recorded calls, and the checks that hold them to a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesd.errors import DataError, RequestError
from edgesd.golden import GATES, Gate, Golden
from edgesd.manifest import Axes, Manifest, Variant
from edgesd.runtime import image as images
from edgesd.runtime import noise
from edgesd.runtime.generate import Picture, sample
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.session import Session
from edgesd.timing import Spread, spread, timed

if TYPE_CHECKING:
    from edgesd.targets import Target

CAP_DB = 200.0  # of identical arrays: JSON has no infinity
_AGAIN = "Package the model again"


@dataclass(frozen=True)
class Measured:
    """One variant on the recorded calls. axes: its own, chunk (0, n) standing for all n. The dB are the worst of any
    output of any call; seconds of one call, the first left out. status: how this machine ran it. gate_db: of snr_db."""

    component: str
    axes: Axes
    snr_db: float
    psnr_db: float
    seconds: Spread
    status: str = "executed"
    gate_db: float = 0.0

    def to_json(self) -> dict[str, Any]:
        figures = {"snr_db": round(self.snr_db, 3), "psnr_db": round(self.psnr_db, 3), "status": self.status}
        return {"component": self.component, "axes": self.axes.model_dump(mode="json"), **figures,
                "seconds": self.seconds.to_json()}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One figure and what it has to reach. `ceiling`: the figure must not be above the gate, else not below it."""

    what: str
    figure: float
    gate: float
    unit: str
    ceiling: bool = False

    @property
    def passed(self) -> bool:
        return self.figure <= self.gate if self.ceiling else self.figure >= self.gate

    @property
    def wanted(self) -> str:
        return f"{'at most' if self.ceiling else 'at least'} {self.gate:.4g} {self.unit}"

    @property
    def measured(self) -> str:
        return f"{self.figure:.4g} {self.unit}"


def describe(axes: Axes) -> str:
    """A variant in a few words: "fp16 webgpu 2 rows"."""
    words = [axes.precision, axes.form]
    words += [f"{axes.batch} rows"] if axes.batch > 1 else []
    words += [f"{axes.chunk[1]} pieces"] if axes.chunk[1] > 1 else []
    words += [f"width {axes.width:g}"] if axes.width != 1 else []
    return " ".join(word for word in words if word)


def snr_db(truth: np.ndarray, got: np.ndarray) -> float:
    """10 log10(mean truth² / mean (got - truth)²), within ±200 dB; -200 where shapes differ or `got` is not finite."""
    return _decibels(float(np.square(truth.astype(np.float64)).mean()), truth, got)


def psnr_db(truth: np.ndarray, got: np.ndarray) -> float:
    """10 log10(peak² / mean (got - truth)²), bounded alike. peak: the range of `truth`."""
    return _decibels(float(np.ptp(truth)) ** 2, truth, got)


def _decibels(power: float, truth: np.ndarray, got: np.ndarray) -> float:
    if truth.shape != got.shape or not np.isfinite(got).all():
        return -CAP_DB
    error = float(np.square(got.astype(np.float64) - truth.astype(np.float64)).mean())
    if error == 0 or power == 0:
        return CAP_DB if error == 0 else -CAP_DB
    return float(np.clip(10 * np.log10(power / error), -CAP_DB, CAP_DB))


# ---- variants -----------------------------------------------------------------------------------------------------


def measure_variants(
    manifest: Manifest,
    stored: Golden,
    open_session: Callable[[Manifest], Session],
    status: Callable[[str], str] = lambda form: "executed",
) -> tuple[Measured, ...]:
    """Every variant that the recorded calls are the truth for, each opened alone and closed again.

    open_session: opens a manifest that lists one component with one variant (or the chunks of one). status: of a form,
    as `run_status` says.
    """
    found = []
    for name, axes, part in artefacts(manifest):
        if stored.fits(axes):
            session = open_session(part)
            snr, psnr, seconds = run_calls(session, stored, name, axes.batch, axes.width)
            gate = gate_db(part.component(name).variants[0])
            found.append(Measured(name, axes, snr, psnr, seconds, status(axes.form), gate))
            session.unload(name)
    return tuple(found)


def gate_db(variant: Variant) -> float:
    """What a variant's snr_db must reach: its own figure where it has one, else its precision's."""
    return GATES[variant.axes.precision].snr_db if variant.gate_db is None else variant.gate_db


def with_measurements(manifest: Manifest, measured: Iterable[Measured], runtime: str) -> Manifest:
    """The manifest with snr_db, status, runtime and (where executed) seconds of every measured variant filled in."""
    known = {(m.component, artefact_key(m.axes)): m for m in measured}

    def filled(component: str, variant: Variant) -> Variant:
        one = known.get((component, artefact_key(variant.axes)))
        if one is None:
            return variant
        seconds = round(one.seconds.median, 6) if one.status == "executed" else None
        facts = {"snr_db": round(one.snr_db, 2), "seconds": seconds, "status": one.status, "runtime": runtime}
        return variant.model_copy(update=facts)

    components = tuple(
        c.model_copy(update={"variants": tuple(filled(c.name, v) for v in c.variants)}) for c in manifest.components
    )
    return manifest.model_copy(update={"components": components})


def run_status(target: Target, form: str = "") -> str:
    """How this machine runs a target's form: "executed" in its own runtime unless the target says otherwise.

    A target says so by `status`, and by `form_status` for forms meant for another runtime than the one that opens them
    here (a WebGPU variant run on a processor is `unverified`, though its figures are measured).
    """
    return str(getattr(target, "form_status", {}).get(form, getattr(target, "status", "executed")))


def artefact_key(axes: Axes) -> Axes:
    """The axes without the chunk index: chunks of one artefact run one after the other and are measured together."""
    return axes.model_copy(update={"chunk": (0, axes.chunk[1])})


def artefacts(manifest: Manifest) -> Iterator[tuple[str, Axes, Manifest]]:
    """Component, axes, and a manifest of that artefact alone, in the order they are listed."""
    for component in manifest.components:
        pieces: dict[Axes, set[tuple[str, Axes]]] = {}
        for variant in component.variants:
            pieces.setdefault(artefact_key(variant.axes), set()).add((component.name, variant.axes))
        for axes, keep in pieces.items():
            yield component.name, axes, _only(manifest, keep)


def other_flavours(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """What a runtime may open besides the default: the UNet's other (precision, form) pairs, the rest of the model in
    the same flavour where there is one."""
    unet = manifest.component("unet")
    for flavour in list(dict.fromkeys(map(_flavour, unet.variants)))[1:]:
        keep: set[tuple[str, Axes]] = set()
        for component in manifest.components:
            offered = [_flavour(v) for v in component.variants]
            chosen = flavour if flavour in offered else offered[0]
            keep |= {(component.name, v.axes) for v in component.variants if _flavour(v) == chosen}
        yield " ".join(filter(None, flavour)), _only(manifest, keep)


def _flavour(variant: Variant) -> tuple[str, str]:
    return variant.axes.precision, variant.axes.form


def _only(manifest: Manifest, keep: set[tuple[str, Axes]]) -> Manifest:
    """The manifest with these variants alone, for a target to open."""
    components = tuple(
        c.model_copy(update={"variants": kept})
        for c in manifest.components
        if (kept := tuple(v for v in c.variants if (c.name, v.axes) in keep))
    )
    return manifest.model_copy(update={"components": components})


# ---- the checks ------------------------------------------------------------------------------------------------


def run_calls(
    session: Session, stored: Golden, component: str, batch: int, width: float = 1.0
) -> tuple[float, float, Spread]:
    """(worst SNR, worst PSNR, seconds of a call) over the recorded calls of a component, as that width answered."""
    calls = stored.calls(component, batch, width)
    if not calls:
        raise DataError(f"the golden vectors hold no call of {component}", "calls of every component", _AGAIN)
    figures, seconds = [], []
    for call in calls:
        try:
            got, elapsed = timed(partial(session.run, component, call.inputs))
        except RequestError as error:  # the bundle's own call does not fit its own component
            raise DataError(f"the recorded calls do not fit: {error.came}", error.allowed, _AGAIN) from None
        seconds.append(elapsed)
        for name, expected in call.outputs.items():
            if name not in got:
                raise DataError(f"{component} gives no {name}", "the outputs of its truth", _AGAIN)
            figures.append((snr_db(expected, got[name]), psnr_db(expected, got[name])))
    if len(seconds) == 1:  # the first call allocates and compiles: it is no measure of the next
        seconds.append(timed(partial(session.run, component, calls[0].inputs))[1])
    snr, psnr = (min(column) for column in zip(*figures, strict=True))
    return snr, psnr, spread(seconds[1:])


def check_text(pipeline: Pipeline, stored: Golden) -> Iterator[Check]:
    """Token ids must be equal: the figure is the number that differ."""
    if len(pipeline.tokenizers) != stored.facts.tokenizers:
        raise DataError(f"golden vectors for {stored.facts.tokenizers} tokenizers", f"{len(pipeline.tokenizers)}",
                        _AGAIN)  # fmt: skip
    facts = stored.facts
    for index, tokenizer in enumerate(pipeline.tokenizers):
        wrong = 0
        for side, text in (("prompt", facts.prompt), ("negative", facts.negative_prompt)):
            ids, expected = tokenizer.encode(text).ids, stored.tensors[f"ids/{index}/{side}"]
            wrong += int((ids != expected).sum()) if ids.shape == expected.shape else expected.size
        yield Check(f"token ids of {tokenizer.spec.component}", wrong, 0, "wrong", ceiling=True)


def check_noise(stored: Golden) -> Check:
    """Start noise made here against the recorded one: at most 1 ulp of float32 (libraries differ in cos and ln)."""
    expected = stored.tensors["noise"]
    source = noise.make_source("philox", stored.facts.seed)
    made = source.normal(expected.shape[1:], 0, 0, noise.Purpose.START)[None]
    ulp = np.abs(made.astype(np.float64) - expected) / np.spacing(np.abs(expected))
    return Check("start noise", float(ulp.max()), 1, "ulp", ceiling=True)


def check_picture(
    pipeline: Pipeline, stored: Golden, gate: Gate, what: str = "picture", *, every_row: bool = False
) -> tuple[list[Check], dict[str, float]]:
    """Draws the recorded picture. every_row: also the latents after each row."""
    expected, stride = stored.tensors["latents"], stored.facts.picture_stride
    rows = []
    for event in sample(pipeline, stored.facts.settings()):
        if isinstance(event, Picture):
            drawn = event.image[::stride, ::stride]
        else:
            rows.append(event.latents[0])
    truth = stored.tensors["picture"]
    if drawn.shape != truth.shape or len(rows) != len(expected):
        raise DataError(f"a picture of {drawn.shape} after {len(rows)} rows", f"{truth.shape} after {len(expected)}",
                        _AGAIN)  # fmt: skip
    figures = {
        "psnr_db": images.psnr_db(truth, drawn),
        "mean_abs": float(np.abs(truth.astype(int) - drawn).mean()) / 255,
    }
    checks = []
    if every_row and gate.latents_snr_db is not None:
        worst = min(snr_db(a, b) for a, b in zip(expected, rows, strict=True))
        checks.append(Check("latents of every row", worst, gate.latents_snr_db, "dB SNR"))
    if gate.picture_psnr_db is not None:
        checks.append(Check(what, figures["psnr_db"], gate.picture_psnr_db, "dB PSNR"))
    if gate.picture_mean_abs is not None:
        checks.append(
            Check(f"{what}, mean difference", figures["mean_abs"], gate.picture_mean_abs, "of 1", ceiling=True)
        )
    return checks, figures


def weakest(precisions: Iterable[str]) -> Gate:
    """The gate of a picture that components of these precisions drew together: the coarsest one's."""
    return min((GATES[precision] for precision in precisions), key=lambda gate: gate.snr_db)
