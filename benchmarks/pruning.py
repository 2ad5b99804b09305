"""What pruning costs in quality: the embedded model's alignment against the MACs taken off, by criterion.

python benchmarks/pruning.py draw WORK [--captions N] [--only NAME …]   prunes, then draws N captions with every variant
python benchmarks/pruning.py check WORK                                 OpenVINO's pictures against torch's, once
python benchmarks/pruning.py report WORK                                docs/pruning.json, docs/pruning.png, a table

WORK keeps what was made (pruned checkpoints, graphs, verdicts): a stopped run goes on, and captions are drawn in blocks
of 64 over all variants, so that a report over what is there is valid at any time. Every variant draws the captions,
noise, sampler, steps and guidance of the float model, in float32 on OpenVINO, 8 pictures a call.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgesd.evaluate import bootstrap_interval
from edgesd.files import write_whole
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.generate import sample_batch
from edgesd.runtime.image import psnr_db
from edgesd.runtime.session import Watched
from edgesd.runtime.settings import resolve
from edgesd.shapes.oracle import judge
from edgesd.shapes.world import held_out_captions

DOCS = Path(__file__).parents[1] / "docs"
SETTINGS = {"sampler": "dpmpp_2m_karras", "num_inference_steps": 20, "guidance_scale": 4.0}
CAPTIONS, BLOCK, TOGETHER = 2048, 64, 8
CALLS, HELD_OUT_CALLS = 480, 64
STOPPED = 75  # exit code: the minutes are over, the same command goes on
CAPPED = 256  # captions that points of the curve alone are drawn for
FAR = 256  # and those of criteria so far below the float model that more captions would change no ordering

NOTHING = {"restoration": "none", "allocation": "uniform"}
CRITERIA: dict[str, dict[str, Any]] = {
    "random": {"importance": "random", **NOTHING},
    "l1": {"importance": "l1", **NOTHING},
    "wanda, bias": {"importance": "wanda", "restoration": "bias", "allocation": "uniform"},
    "l1, ls": {"importance": "l1", "allocation": "uniform"},
    "obs, ls": {"importance": "obs", "allocation": "uniform"},
    "obs, ls, global": {},
}
LINES = ("random", "l1", "wanda, bias", "obs, ls", "obs, ls, global")  # of the curve
VARIANTS: dict[str, dict[str, Any]] = {
    "float": {},
    **{f"{name} {r:.0%}": {"ratio": r, **how} for r in (0.25, 0.4) for name, how in CRITERIA.items()},
    "obs, ls, global 40% of parameters": {"ratio": 0.4, "budget": "params"},
    **{f"{name} {r:.0%}": {"ratio": r, **CRITERIA[name]} for r in (0.125, 0.5) for name in LINES},
}
MAIN = [name for name, how in VARIANTS.items() if how.get("ratio") not in (0.125, 0.5)]


def limit(name: str) -> int:
    """Captions that a variant is drawn for at most."""
    if name not in MAIN:
        return CAPPED
    return FAR if VARIANTS[name].get("restoration") in ("none", "bias") else CAPTIONS


class Fast(Watched):
    """The torch session with the UNet on OpenVINO: float32, a fixed number of rows a call."""

    def __init__(self, session: Any, graph: Path, threads: int) -> None:
        super().__init__(session)
        import openvino as ov

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self._request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()

    def run(self, component: str, inputs: Any) -> dict[str, np.ndarray]:
        if component != "unet":
            return self._session.run(component, inputs)
        return {"model_output": np.array(self._request.infer(dict(inputs))[0])}

    def batches(self, component: str) -> tuple[int, ...] | None:
        return (2 * TOGETHER,) if component == "unet" else self._session.batches(component)


@lru_cache(maxsize=1)
def embedded() -> Any:
    from edgesd.models.load import load

    return load()


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_").replace("%", "")


@lru_cache(maxsize=1)
def surveyed(work: Path) -> dict[str, Any]:
    """What all criteria judge by: moments and gradients of the dense model, collected once."""
    import torch

    from edgesd.compress.calls import batches
    from edgesd.compress.evidence import collect
    from edgesd.compress.groups import find_groups

    file, unet = work / "survey.pt", embedded().modules["unet"]
    if not file.is_file():
        calls = calibration(work).calls("unet")
        found = collect(unet, find_groups(unet), batches("unet", calls, embedded().spec), "obs")
        torch.save(found, file.with_suffix(".half"))
        file.with_suffix(".half").rename(file)
    return torch.load(file, weights_only=False)  # made by this very script


def made(work: Path, name: str) -> Path:
    """The folder of a variant: its graph and facts, pruned now if it is not there."""
    folder = work / "variants" / slug(name)
    if (folder / "facts.json").is_file():
        return folder
    from unittest.mock import patch

    from edgesd.compress.prune import prune
    from edgesd.manifest import Axes
    from edgesd.models.modules import build
    from edgesd.targets import openvino

    model, how = embedded(), VARIANTS[name]
    began = time.perf_counter()
    modules, facts = model.modules, {"how": how, "macs_off": 0.0, "params_off": 0.0, "snr_db": None}
    if how:
        with patch("edgesd.compress.prune.collect", lambda *_: dict(surveyed(work))):
            pruned = prune(model, calls=calibration(work).calls("unet"), **how)
        modules, plan = {**modules, "unet": pruned.module}, pruned.plan
        off = {f"{kind}_off": share for kind, share in plan.off().items()}
        facts |= {**off, "snr_db": one_step_snr_db(work, pruned.module), "kinds": plan.by_kind()}
    facts["seconds"] = round(time.perf_counter() - began, 1)
    axes = Axes(size_px=model.spec.defaults.size_px, batch=2 * TOGETHER, precision="fp32")
    folder.mkdir(parents=True, exist_ok=True)
    openvino.lower(build("unet", modules, model.spec, axes), axes, folder)
    write_whole(folder / "facts.json", json.dumps(facts, indent=1).encode())
    print(f"{name}: {facts}", flush=True)
    return folder


def calibration(work: Path) -> Any:
    from edgesd.calibration.capture import calibrate

    return calibrate(embedded(), work / "calibration", calls=CALLS)


@lru_cache(maxsize=1)
def held_out(work: Path) -> list:
    """Batches of recorded calls that no pruning saw: other captions, other noise."""
    from edgesd.calibration.capture import calibrate
    from edgesd.compress.calls import batches

    prompts = work / "held_out.txt"
    prompts.write_text("\n".join(held_out_captions(HELD_OUT_CALLS, seed=1)), encoding="utf-8")
    recorded = calibrate(embedded(), work / "held_out", calls=HELD_OUT_CALLS, prompts=str(prompts), seed=1_000_000)
    return batches("unet", recorded.calls("unet"), embedded().spec)


def one_step_snr_db(work: Path, module: Any) -> float:
    """Of the UNet's output on held-out calls, both halves of guidance, all noise levels alike."""
    import torch

    signal = noise = 0.0
    with torch.no_grad():
        for batch in held_out(work):
            wanted = batch.forward(embedded().modules["unet"])
            signal += float(wanted.square().sum())
            noise += float((batch.forward(module) - wanted).square().sum())
    return round(float(10 * np.log10(signal / noise)), 2)


def drawn(pipeline: Any, first: int, count: int) -> list[np.ndarray]:
    """Pictures of held-out captions first .. first + count - 1, as `edgesd evaluate` numbers captions and noise."""
    captions, cache, pictures = held_out_captions(first + count), PromptCache(), []
    several = [resolve(pipeline.spec, captions[i], seed=i, **SETTINGS) for i in range(first, first + count)]
    for at in range(0, count, TOGETHER):
        for event in sample_batch(pipeline, several[at : at + TOGETHER], cache=cache):
            pictures += [picture.image for picture in event] if isinstance(event, list) else []
    return pictures


def opened(work: Path, name: str, threads: int) -> Any:
    from edgesd.sources import torch_pipeline

    pipeline = torch_pipeline(embedded())
    return replace(pipeline, session=Fast(pipeline.session, made(work, name) / "unet.xml", threads))


def block_file(work: Path, name: str, block: int) -> Path:
    return work / "variants" / slug(name) / f"block-{block:03d}.npz"


def draw(work: Path, names: list[str], captions: int, threads: int, minutes: float) -> None:
    until = time.monotonic() + 60 * minutes
    for name in names:
        made(work, name)
        if time.monotonic() > until:
            sys.exit(STOPPED)
    pipelines: dict[str, Any] = {}
    for block in range(-(-captions // BLOCK)):
        texts = held_out_captions((block + 1) * BLOCK)[block * BLOCK :]
        for name in names:
            file = block_file(work, name, block)
            if file.is_file() or block * BLOCK >= limit(name):
                continue
            if time.monotonic() > until:
                sys.exit(STOPPED)
            if name not in pipelines:
                pipelines[name] = opened(work, name, threads)
            began = time.perf_counter()
            pictures = drawn(pipelines[name], block * BLOCK, BLOCK)
            right = [judge(picture, text).all for picture, text in zip(pictures, texts, strict=True)]
            arrays = {"right": np.array(right)}
            if name == "float":
                arrays["pictures"] = np.stack(pictures)
            else:
                truth = np.load(block_file(work, "float", block))["pictures"]
                arrays["psnr_db"] = np.array([psnr_db(a, b) for a, b in zip(pictures, truth, strict=True)])
            half = file.with_suffix(".half.npz")
            np.savez_compressed(half, **arrays)
            half.rename(file)
            print(f"block {block} {name}: {np.mean(right):.3f} in {time.perf_counter() - began:.0f} s", flush=True)


def check(work: Path, threads: int) -> None:
    """The float model on OpenVINO against `edgesd evaluate`'s way, torch in batches: the first block."""
    from edgesd.sources import torch_pipeline

    truth = np.load(block_file(work, "float", 0))
    texts = held_out_captions(BLOCK)
    pictures = drawn(torch_pipeline(embedded()), 0, BLOCK)
    right = np.array([judge(picture, text).all for picture, text in zip(pictures, texts, strict=True)])
    distance = [psnr_db(a, b) for a, b in zip(pictures, truth["pictures"], strict=True)]
    told = {
        "captions": BLOCK, "alignment_torch": float(right.mean()), "alignment_openvino": float(truth["right"].mean()),
        "verdicts_that_differ": int((right != truth["right"]).sum()), "psnr_db_min": round(min(distance), 1),
    }  # fmt: skip
    write_whole(work / "check.json", json.dumps(told).encode())
    print(told)


# ---- the report ------------------------------------------------------------------------------------------------


def loaded(work: Path, name: str) -> dict[str, np.ndarray]:
    """right and psnr_db of all captions drawn so far, in order."""
    blocks = []
    while block_file(work, name, len(blocks)).is_file():
        with np.load(block_file(work, name, len(blocks))) as file:
            blocks.append({key: file[key] for key in ("right", "psnr_db") if key in file})
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]} if blocks else {}


def rounded(interval: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in interval]


def rows(work: Path) -> list[dict[str, Any]]:
    """Per variant: figures, and the paired difference to the float model over the captions it drew."""
    base, found = loaded(work, "float")["right"].astype(float), []
    for name, how in VARIANTS.items():
        measured = loaded(work, name)
        if not measured:
            continue
        facts = json.loads((work / "variants" / slug(name) / "facts.json").read_text(encoding="utf-8"))
        right = measured["right"].astype(float)
        n = min(len(right), len(base))
        row = {"name": name, "captions": n, "macs_off": round(facts["macs_off"], 4), "settings": how}
        row |= {"params_off": round(facts["params_off"], 4), "alignment": round(float(right[:n].mean()), 4)}
        if how:
            row |= {
                "keeps": round(float(right[:n].mean() / base[:n].mean()), 4),
                "difference": round(float((right[:n] - base[:n]).mean()), 4),
                "interval": rounded(bootstrap_interval(right[:n] - base[:n])),
                "snr_db": facts["snr_db"],
                "psnr_db": round(float(measured["psnr_db"][:n].mean()), 2),
                "seconds": facts["seconds"],
            }  # fmt: skip
        found.append(row)
    return found


def orderings(work: Path) -> list[dict[str, Any]]:
    """Paired differences of alignment between variants of the same MACs, with their 95 % intervals."""
    pairs = [("l1, ls", "l1"), ("obs, ls", "l1"), ("obs, ls", "wanda, bias"), ("l1", "random"), ("wanda, bias", "l1"),
             ("obs, ls", "l1, ls"), ("obs, ls, global", "obs, ls")]  # fmt: skip
    found = []
    for share in ("25%", "40%"):
        for better, worse in pairs:
            one, other = (loaded(work, f"{name} {share}") for name in (better, worse))
            if not one or not other:
                continue
            n = min(len(one["right"]), len(other["right"]))
            gain = one["right"][:n].astype(float) - other["right"][:n]
            found.append({
                "at": share, "first": better, "second": worse, "captions": n,
                "difference": round(float(gain.mean()), 4),
                "interval": rounded(bootstrap_interval(gain)),
            })  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| criterion, restoration | MACs off | parameters off | captions | alignment | kept | paired difference (95 %) "
        "| one-step SNR | picture PSNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        facts = f"| {r['name'].rsplit(' ', 1)[0] if r['settings'] else 'float'} | {r['macs_off']:.1%} "
        facts += f"| {r['params_off']:.1%} | {r['captions']:,} | {r['alignment']:.3f} "
        if r["settings"]:
            low, high = r["interval"]
            facts += f"| {r['keeps']:.1%} | {r['difference']:+.3f} ({low:+.3f} to {high:+.3f}) | {r['snr_db']:.1f} dB "
            lines.append(facts + f"| {r['psnr_db']:.1f} dB |")
        else:
            lines.append(facts + "| | | | |")
    return "\n".join(lines)


def draw_curve(found: list[dict[str, Any]], path: Path) -> None:
    """A PNG: alignment, as a share of the float model's, against the MACs taken off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for line, mark in zip(LINES, "xv^os", strict=True):
        names = {f"{line} {share:.0%}" for share in (0.125, 0.25, 0.4, 0.5)}
        points = sorted((r for r in found if r["name"] in names), key=lambda r: r["macs_off"])
        base = {r["name"]: r["alignment"] - r["difference"] for r in points}
        x = [0.0, *(100 * r["macs_off"] for r in points)]
        y = [100.0, *(100 * r["keeps"] for r in points)]
        drawn_line = axis.plot(x, y, marker=mark, label=line)[0]
        for r in points:
            ends = [100 * (1 + end / base[r["name"]]) for end in r["interval"]]
            axis.plot([100 * r["macs_off"]] * 2, ends, color=drawn_line.get_color(), linewidth=1)
    axis.set_xlabel("MACs of the UNet taken off, %")
    axis.set_ylabel("alignment kept, %")
    axis.set_ylim(0, 105)
    axis.grid(alpha=0.3)
    axis.legend(title="criterion, restoration, allocation")
    counts = sorted({r["captions"] for r in found if r["settings"]})
    shown = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    axis.set_title(f"embedded model, {shown} held-out captions a point, bars: 95 % paired intervals", fontsize=10)
    figure.savefig(path, dpi=110)


def report(work: Path) -> None:
    found = rows(work)
    checked = work / "check.json"
    whole = {
        "what": "alignment of the embedded model pruned without training, on held-out captions (seed 0)",
        "command": "python benchmarks/pruning.py draw WORK; python benchmarks/pruning.py report WORK",
        "settings": {**SETTINGS, "calibration_calls": CALLS, "arithmetic": "float32, OpenVINO"},
        "machine": {"processor": platform.machine(), "system": platform.system(), "python": platform.python_version()},
        "libraries": {name: version(name) for name in ("torch", "openvino", "diffusers", "numpy")},
        "openvino_against_torch": json.loads(checked.read_text(encoding="utf-8")) if checked.is_file() else None,
        "variants": found,
        "orderings": orderings(work),
    }
    write_whole(DOCS / "pruning.json", json.dumps(whole, indent=1).encode())
    draw_curve(found, DOCS / "pruning.png")
    print(table(found))
    for pair in whole["orderings"]:
        print(pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("draw", "check", "report"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=MAIN)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.verb == "draw":
        draw(given.work, list(dict.fromkeys(("float", *given.only))), given.captions, given.threads, given.minutes)
    elif given.verb == "check":
        check(given.work, given.threads)
    else:
        report(given.work)


if __name__ == "__main__":
    main()
