"""What pruning costs in quality: the embedded model's alignment against the MACs taken off, by criterion.

python benchmarks/pruning.py draw WORK [--captions N] [--only NAME …]   prunes, then draws N captions with every variant
python benchmarks/pruning.py check WORK                                 OpenVINO's pictures against torch's, once
python benchmarks/pruning.py report WORK                                docs/pruning.json, docs/pruning.png, a table

WORK keeps what was made (pruned checkpoints, graphs, verdicts): a stopped run goes on (`paired.py`). Every variant runs
in float32 on OpenVINO.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import paired
from paired import BLOCK, CALLS, CAPTIONS, DOCS, FLOAT, SETTINGS, TOGETHER, calibration, embedded

from edgesd.files import write_whole

CAPPED = 256  # captions for points of the curve alone, and for criteria so far below that more change no ordering

FLAGS = {"ratio": "ratio", "importance": "importance", "restoration": "restore", "allocation": "allocation"}
HEADS = {"ratio": 0.0746, "allocation": "uniform", "protect": ["*resnets*", "*.ff"]}  # 8 to 4 in every attention
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
    "half the heads, l1": {**HEADS, "importance": "l1", "restoration": "none"},
    "half the heads, obs, ls": HEADS,
    "obs, ls, global 7%": {"ratio": HEADS["ratio"]},
    **{f"{name} 40%, recovered": {"ratio": 0.4, **CRITERIA[name], "minutes": 10} for name in ("l1", "obs, ls, global")},
}
MAIN = [name for name, how in VARIANTS.items() if how.get("ratio") not in (0.125, 0.5)]


def limit(name: str) -> int:
    """Captions that a variant is drawn for at most."""
    far_below = VARIANTS[name].get("restoration") in ("none", "bias") and "minutes" not in VARIANTS[name]
    return CAPPED if far_below or name not in MAIN else CAPTIONS


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
    return paired.made(work, name, partial(_make, work, name))


def _make(work: Path, name: str, folder: Path) -> dict[str, Any]:
    from unittest.mock import patch

    from edgesd.compress.prune import prune
    from edgesd.manifest import Axes
    from edgesd.models.modules import build
    from edgesd.targets import openvino

    model, how = embedded(), VARIANTS[name]
    began = time.perf_counter()
    modules, facts = model.modules, {"how": how, "macs_off": 0.0, "params_off": 0.0, "snr_db": None}
    if "minutes" in how:
        modules, off = recovered(work, name)
        facts |= off | {"snr_db": one_step_snr_db(work, modules["unet"])}
    elif how:
        with patch("edgesd.compress.prune.collect", lambda *_: dict(surveyed(work))):
            pruned = prune(model, calls=calibration(work).calls("unet"), **how)
        modules, plan = {**modules, "unet": pruned.module}, pruned.plan
        off = {f"{kind}_off": share for kind, share in plan.off().items()}
        facts |= {**off, "snr_db": one_step_snr_db(work, pruned.module), "kinds": plan.by_kind()}
    facts["seconds"] = round(time.perf_counter() - began, 1)
    axes = Axes(size_px=model.spec.defaults.size_px, batch=2 * TOGETHER, precision="fp32")
    openvino.lower(build("unet", modules, model.spec, axes), axes, folder)
    return facts


def recovered(work: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Modules pruned, then trained against the dense ones for so many minutes, by the commands a user gives."""
    from edgesd.compress.plan import PrunePlan
    from edgesd.models.load import embedded_folder, load
    from edgesd.models.saving import sidecar_of

    how, folder = VARIANTS[name], work / "recovery" / paired.slug(name)
    cut, out = folder / "pruned", folder / "recovered"
    edgesd = [sys.executable, "-m", "edgesd"]
    flags = [f"--{flag}={how[key]}" for key, flag in FLAGS.items() if key in how]
    if not cut.exists():
        subprocess.run([*edgesd, "prune", *flags, "-o", str(cut)], check=True)
    if not out.exists():
        teacher = ["--teacher", str(embedded_folder())]
        subprocess.run(
            [*edgesd, "finetune", str(cut), *teacher, f"--minutes={how['minutes']}", "-o", str(out)], check=True
        )
    model = load(str(out))
    plan = PrunePlan.model_validate(sidecar_of(model)["pruned"]["unet"])
    return model.modules, {f"{kind}_off": share for kind, share in plan.off().items()}


def one_step_snr_db(work: Path, module: Any) -> float:
    """Of the UNet's output on held-out calls, both halves of guidance, all noise levels alike."""
    import torch

    signal = noise = 0.0
    with torch.no_grad():
        for batch in paired.held_out(work):
            wanted = batch.forward(embedded().modules["unet"])
            signal += float(wanted.square().sum())
            noise += float((batch.forward(module) - wanted).square().sum())
    return round(float(10 * np.log10(signal / noise)), 2)


def opened(work: Path, threads: int, name: str) -> Any:
    return paired.opened(made(work, name) / "unet.xml", threads)


def check(work: Path) -> None:
    """The float model on OpenVINO against `edgesd evaluate`'s way, torch in batches: the first block."""
    from edgesd.sources import torch_pipeline

    truth = np.load(paired.block_file(work, FLOAT, 0))
    pictures = paired.drawn(torch_pipeline(embedded()), 0, BLOCK)
    right = paired.judged(pictures, 0)
    told = {
        "captions": BLOCK, "alignment_torch": float(right.mean()), "alignment_openvino": float(truth["right"].mean()),
        "verdicts_that_differ": int((right != truth["right"]).sum()),
        "psnr_db_min": round(float(paired.distances(pictures, truth["pictures"]).min()), 1),
    }  # fmt: skip
    write_whole(work / "check.json", json.dumps(told).encode())
    print(told)


# ---- the report ------------------------------------------------------------------------------------------------


def rows(work: Path) -> list[dict[str, Any]]:
    """Per variant: figures, and the paired difference to the float model over the captions it drew."""
    found = []
    for name, row, facts in paired.rows(work, VARIANTS):
        off = {key: round(facts.get(key, 0.0), 4) for key in ("macs_off", "params_off")}
        row |= {"settings": VARIANTS[name], **off}
        found.append(row if name == FLOAT else row | {"snr_db": facts["snr_db"], "seconds": facts["seconds"]})
    return found


def orderings(work: Path) -> list[dict[str, Any]]:
    """Paired differences of alignment between variants of the same MACs, with their 95 % intervals."""
    pairs = [("l1, ls", "l1"), ("obs, ls", "l1"), ("obs, ls", "wanda, bias"), ("l1", "random"), ("wanda, bias", "l1"),
             ("obs, ls", "l1, ls"), ("obs, ls, global", "obs, ls")]  # fmt: skip
    found = []
    for share in ("25%", "40%"):
        for better, worse in pairs:
            one, other = (paired.loaded(work, f"{name} {share}") for name in (better, worse))
            if one and other:
                gain = paired.difference(one["right"], other["right"])
                found.append({"at": share, "first": better, "second": worse, **gain})
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| criterion, restoration | MACs off | parameters off | captions | alignment | kept | paired difference (95 %) "
        "| one-step SNR | picture PSNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        name = r["name"].removesuffix(f" {r['settings'].get('ratio', 0):.0%}")
        facts = f"| {name} | {r['macs_off']:.1%} "
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
        if not points:
            continue
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
    given = paired.asked(__doc__, ("draw", "check", "report"), list(VARIANTS), MAIN)
    work = given.work
    if given.verb == "draw":
        opener = partial(opened, work, given.threads)
        paired.draw(work, given.names, given.captions, given.minutes, partial(made, work), opener, limit=limit)
    elif given.verb == "check":
        check(work)
    else:
        report(work)


if __name__ == "__main__":
    main()
