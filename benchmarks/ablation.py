"""What each optimisation gains and costs on top of the ones before it: the embedded model, drawn on this machine.

    python benchmarks/ablation.py measure WORK [--captions 256] [--minutes 60]   packages, then draws in blocks
    python benchmarks/ablation.py report WORK [-o FOLDER]                        ablation.json (into docs/) and a table

Every line draws the same held-out captions from the same noise, one picture at a time. A block of 32 captions is a
process of its own, and the lines take turns block by block, so a machine that slows down slows all of them. One JSON
file a block: a stopped run goes on, and a report over what is there is valid at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tables
from bench import STOPPED, machine
from measure import folder_bytes
from paired import DOCS, difference

from edgesd.child import Watch
from edgesd.errors import SetupError
from edgesd.files import write_whole
from edgesd.sheet import size

BLOCK, WARM = 32, 2  # captions of a process, and pictures before its first timed one
GUIDANCE = 4.0


@dataclass(frozen=True)
class Line:
    """One line of the table. flags: of `edgesd package` for openvino; None is diffusers' own pipeline.

    after: the line that it is held against. settings: of each picture.
    """

    about: str
    flags: tuple[str, ...] | None = None
    after: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


PNDM = {"sampler": "pndm", "num_inference_steps": 50}
FEWER = {"sampler": "dpmpp_2m_karras", "num_inference_steps": 20}
CUT = FEWER | {"guidance_until": 0.8}
FLOAT, INT8 = ("--profile", "quality"), ("--precision", "int8")
LINES = {
    "peer": Line("diffusers on torch, float32, PNDM, 50 steps", settings=PNDM),
    "bundle": Line("edgesd openvino float16, the same sampler and steps", FLOAT, "peer", PNDM),
    "sampler": Line("+ DPM++ 2M Karras, 20 steps", FLOAT, "bundle", FEWER),
    "early": Line("beside it: early stop at 5 % of movement", FLOAT, "sampler", FEWER | {"early_stop": 0.05}),
    "guidance": Line("+ guidance ends after 80 % of the run", FLOAT, "sampler", CUT),
    "int8": Line("+ int8", INT8, "guidance", CUT),
    "pruned": Line("+ 25 % of the UNet's MACs pruned", (*INT8, "--prune", "0.25"), "int8", CUT),
    "width": Line(
        "in place of pruning: width 0.75 of three", (*INT8, "--widths", "1,0.75,0.5"), "int8", CUT | {"width": 0.75}
    ),
}


# ---- making and drawing ----------------------------------------------------------------------------------------


def bundle_folder(work: Path, line: Line) -> Path:
    assert line.flags is not None
    return work / "bundles" / "-".join(flag.lstrip("-").replace(",", "_") for flag in line.flags)


def package(work: Path, line: Line) -> None:
    """The line's bundle, unless it is there."""
    if line.flags is None or (folder := bundle_folder(work, line)).exists():
        return
    samplers = [word for name in (PNDM, FEWER) for word in ("--sampler", name["sampler"])]
    half = folder.with_suffix(".half")
    command = [sys.executable, "-m", "edgesd", "package", "--target", "openvino", *samplers, *line.flags, "-o", half]
    subprocess.run([str(word) for word in (*command, "--force")], check=True, stdout=subprocess.DEVNULL)
    half.rename(folder)


def block_file(work: Path, name: str, block: int) -> Path:
    return work / "blocks" / f"{name}-{block:03d}.json"


def measure(work: Path, captions: int, minutes: float) -> int:
    """Draws what is missing; STOPPED where the minutes are over first."""
    until = time.monotonic() + 60 * minutes
    (work / "blocks").mkdir(parents=True, exist_ok=True)
    for line in LINES.values():
        package(work, line)
    for block in range(-(-captions // BLOCK)):
        for name in LINES:
            if block_file(work, name, block).exists():
                continue
            if time.monotonic() > until:
                return STOPPED
            told = run_block(work, name, block)
            seconds = statistics.median(told["seconds"])
            right = f"{sum(told['right'])} of {BLOCK} right"
            print(f"block {block} {name}: {seconds:.3f} s a picture, {right}", file=sys.stderr, flush=True)
    return 0


def run_block(work: Path, name: str, block: int) -> dict[str, Any]:
    """One block in a process of its own, with the most memory it held; also written to its file."""
    command = [sys.executable, str(Path(__file__).resolve()), "block", str(work), name, str(block)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with Watch(process.pid, None, whole_tree=True) as watch:
        said, _ = process.communicate()
    if process.returncode != 0:
        raise SetupError(f"{name}, block {block}: exit code {process.returncode}", "a block that is drawn", "See above")
    told = json.loads(said.splitlines()[-1]) | {"peak_bytes": watch.peak_bytes}
    write_whole(block_file(work, name, block), json.dumps(told).encode())
    return told


def draw_block(work: Path, name: str, block: int) -> dict[str, Any]:
    """In the process: verdicts and seconds of a block's pictures, one by one."""
    from edgesd.shapes.oracle import judge
    from edgesd.shapes.world import held_out_captions

    first = block * BLOCK
    draw = peer_draws(LINES[name]) if LINES[name].flags is None else bundle_draws(work, LINES[name])
    texts = held_out_captions(first + BLOCK)
    for seed in range(WARM):
        draw(texts[first], seed)
    right, seconds, calls = [], [], []
    for index in range(first, first + BLOCK):
        began = time.perf_counter()
        image, rows = draw(texts[index], index)
        seconds.append(time.perf_counter() - began)
        right.append(bool(judge(image, texts[index]).all))
        calls.append(rows)
    return {"right": right, "seconds": seconds, "calls": calls}


def bundle_draws(work: Path, line: Line) -> Any:
    """(caption, seed) -> picture, and the rows its UNet was asked for: two where guidance is at work."""
    from edgesd.runtime.generate import generate
    from edgesd.sources import open_pipeline

    pipeline = open_pipeline(str(next(bundle_folder(work, line).glob("*.edgesd"))))
    given = {"guidance_scale": GUIDANCE, **line.settings}

    def draw(text: str, seed: int) -> tuple[np.ndarray, int]:
        made = generate(pipeline, text, seed=seed, **given)[0]
        return made.image, made.calls

    return draw


def peer_draws(line: Line) -> Any:
    """diffusers' own pipeline, from the noise that the bundles start from."""
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    from edgesd.models.load import embedded_folder
    from edgesd.runtime.noise import Purpose, make_source

    pipeline = StableDiffusionPipeline.from_pretrained(embedded_folder(), torch_dtype=torch.float32)
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))

    def draw(text: str, seed: int) -> tuple[np.ndarray, int]:
        rows.clear()
        start = make_source("philox", seed).normal(shape, 0, 0, Purpose.START)
        steps = line.settings["num_inference_steps"]
        made = pipeline(text, latents=torch.from_numpy(start)[None], num_inference_steps=steps, guidance_scale=GUIDANCE)
        return np.asarray(made.images[0]), sum(rows)

    return draw


# ---- the report ------------------------------------------------------------------------------------------------


def drawn(work: Path, name: str) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    while (path := block_file(work, name, len(blocks))).exists():
        blocks.append(json.loads(path.read_text(encoding="utf-8")))
    return blocks


def rows(work: Path) -> list[dict[str, Any]]:
    """Figures of every line that was drawn, over the blocks that all of them have."""
    found = {name: blocks for name in LINES if (blocks := drawn(work, name))}
    shared = min((len(blocks) for blocks in found.values()), default=0)
    right = {name: np.array([x for b in blocks[:shared] for x in b["right"]], float) for name, blocks in found.items()}
    told = []
    for name, blocks in found.items():
        line, each = LINES[name], [statistics.median(b["seconds"]) for b in blocks[:shared]]
        row: dict[str, Any] = {
            "name": name, "about": line.about, "after": line.after, "captions": len(right[name]),
            "settings": line.settings, "seconds": tables.spread_of(each),
            "peak_bytes": tables.spread_of([b["peak_bytes"] for b in blocks[:shared]]),
            "calls": round(statistics.mean(x for b in blocks[:shared] for x in b["calls"]), 2),
            "alignment": round(float(right[name].mean()), 4),
            "bytes": 0 if line.flags is None else folder_bytes(bundle_folder(work, line)),
        }  # fmt: skip
        if line.after in right:
            row |= difference(right[name], right[line.after])
        told.append(row)
    return told


def table(found: list[dict[str, Any]]) -> str:
    base = found[0]["seconds"]["median"]
    cells = []
    for r in found:
        change = ""
        if "difference" in r:
            change = f"{r['difference']:+.3f} ({r['interval'][0]:+.3f} to {r['interval'][1]:+.3f})"
        seconds = r["seconds"]
        cells.append([
            r["about"], f"{r['calls']:g}", tables.shown(seconds, lambda s: f"{s:.3f} s"),
            f"{base / seconds['median']:.2f} x", size(int(r["peak_bytes"]["median"])),
            size(r["bytes"]) if r["bytes"] else "", f"{r['alignment']:.3f}", change,
        ])  # fmt: skip
    head = ("", "UNet calls", "a picture", "times faster than the first", "peak memory", "bundle", "alignment",
            "against the line it adds to (95 %)")  # fmt: skip
    return "\n".join(tables.table(head, cells))


def report(work: Path, folder: Path) -> None:
    found = rows(work)
    whole = {
        "what": "cumulative ablation on the embedded model, held-out captions (seed 0), one picture at a time",
        "command": "python benchmarks/ablation.py measure WORK; python benchmarks/ablation.py report WORK",
        "machine": machine(), "lines": found,
    }  # fmt: skip
    write_whole(folder / "ablation.json", json.dumps(whole, indent=1).encode())
    print(table(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = {name: verbs.add_parser(name) for name in ("measure", "report", "block")}
    for each in verb.values():
        each.add_argument("work", type=Path)
    verb["measure"].add_argument("--captions", type=int, default=256)
    verb["measure"].add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    verb["report"].add_argument("-o", "--output", type=Path, default=DOCS)
    verb["block"].add_argument("name", choices=list(LINES))
    verb["block"].add_argument("block", type=int)
    asked = parser.parse_args()
    if asked.verb == "measure":
        return measure(asked.work.resolve(), asked.captions, asked.minutes)
    if asked.verb == "report":
        report(asked.work.resolve(), asked.output)
    else:
        print(json.dumps(draw_block(asked.work, asked.name, asked.block)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
