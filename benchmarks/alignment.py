"""Alignment of a bundle at what its policies can come to: steps, width, guidance, a switch of width; resumable.

    python benchmarks/alignment.py shapes-openvino.edgesd --out first.jsonl --captions 0:128
    python benchmarks/alignment.py shapes-openvino.edgesd --out first.jsonl --rows 15:1 "15:1>0.75@0.5"
    python benchmarks/alignment.py --summary first.jsonl second.jsonl --write calibration/alignment.json

A row is STEPS:WIDTH, then >WIDTH@SHARE for a switch after that share of the run, /UNTIL for guidance that ends early;
without --rows it is every decision of the shipped policies and the fixed settings that the bundle has widths for. The
embedded model was trained at its widths, so that bundles of either --width-mode hold the same slices and draw alike.
Every row draws the same held-out captions with the same noise, so rows are compared pairwise. One line a picture goes
to the file, and a line that is there is not drawn again: stop at any time, and take the captions in blocks (0:32,
32:64). The summary joins files and takes what is done.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgesd import sources
from edgesd.errors import RequestError
from edgesd.evaluate import bootstrap_interval
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.generate import Picture, sample
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.policy import load_policy, policy_names
from edgesd.runtime.settings import resolve
from edgesd.shapes.oracle import judge
from edgesd.shapes.world import held_out_captions
from edgesd.simulate import FIXED

PARTS = ("all", "background", "color", "shape", "relation")
SAMPLER, GUIDANCE = "dpmpp_2m_karras", 4.0
_ROW = re.compile(r"(\d+):([\d.]+)(?:>([\d.]+)@([\d.]+))?(?:/([\d.]+))?")


class Row(NamedTuple):
    """What is measured. switch: as `Settings.switch`."""

    steps: int
    width: float = 1.0
    guidance_until: float = 1.0
    switch: tuple[float, float] | None = None

    def widths(self) -> set[float]:
        return {self.width, *(() if self.switch is None else self.switch[1:])}

    def told(self) -> dict[str, Any]:
        """As calibration/alignment.json and the lines hold it: what is as usual is left out."""
        named = {"steps": self.steps, "width": self.width, "guidance_until": self.guidance_until}
        return named | ({} if self.switch is None else {"switch": list(self.switch)})


def row_of(told: dict[str, Any]) -> Row:
    """Back from `Row.told`."""
    switch = tuple(told["switch"]) if "switch" in told else None
    return Row(told["steps"], told["width"], told["guidance_until"], switch)


def parse_row(text: str) -> Row:
    matched = _ROW.fullmatch(text)
    if matched is None:
        raise RequestError(f"row {text[:40]!r}", "STEPS:WIDTH, STEPS:WIDTH>WIDTH@SHARE", "Change --rows")
    steps, width, second, share, until = matched.groups()
    switch = None if second is None else (float(share), float(second))
    return Row(int(steps), float(width), 1.0 if until is None else float(until), switch)


def parse_block(text: str) -> range:
    """ "128" -> the first 128 captions; "32:64" -> those from the 32nd on."""
    first, _, end = text.rpartition(":")
    return range(int(first) if first else 0, int(end))


def decisions() -> list[Row]:
    """Every (steps, width, guidance_until) of the shipped policies and the fixed settings."""
    then = [row.then for name in policy_names() for row in load_policy(name).rows]
    return [*(Row(t.steps, t.width, t.guidance_until) for t in then), *(Row(*fixed) for fixed in FIXED.values())]


def fitting(rows: Sequence[Row], pipeline: Pipeline) -> list[Row]:
    """The rows that the bundle has widths for, each once, the dearest first."""
    has = set(pipeline.session.widths("unet"))
    able = {row for row in rows if row.widths() <= has}
    return sorted(able, key=lambda row: (-row.steps, -row.width, -row.guidance_until, str(row.switch)))


def measure(pipeline: Pipeline, wanted: Sequence[Row], captions: range, out: Path) -> None:
    """Appends a line for each picture that `out` lacks, row by row: loading a width takes its time."""
    done = {(row_of(line), line["caption"]) for line in lines([out])}
    cache, texts = PromptCache(), held_out_captions(captions.stop, 0)
    for row in wanted:
        for index in captions:
            if (row, index) in done:
                continue
            caption = texts[index]
            settings = resolve(
                pipeline.spec, caption, seed=index, sampler=SAMPLER, guidance_scale=GUIDANCE,
                num_inference_steps=row.steps, width=row.width, guidance_until=row.guidance_until, switch=row.switch,
            )  # fmt: skip
            picture = next(e for e in sample(pipeline, settings, cache=cache) if isinstance(e, Picture))
            verdict = asdict(judge(picture.image, caption))
            line = row.told() | {"caption": index, **{p: bool(verdict[p]) for p in PARTS if p in verdict}}
            line["all"] = all(line[part] for part in PARTS[1:])
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def lines(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            yield json.loads(text)


def summary(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Per row: shares, their interval, and the difference from 20 steps at width 1 over the captions of both."""
    by: dict[Row, dict[int, dict[str, Any]]] = {}
    for line in lines(files):
        by.setdefault(row_of(line), {})[line["caption"]] = line
    base = by.get(Row(20), {})
    told = []
    for row, found in sorted(by.items(), key=lambda item: (-item[0].steps, -item[0].width, str(item[0]))):
        right = np.array([found[i]["all"] for i in sorted(found)], float)
        both = sorted(set(found) & set(base))
        paired = np.array([float(found[i]["all"]) - float(base[i]["all"]) for i in both])
        told.append(row.told() | {
            "captions": len(found),
            **{part: round(float(np.mean([found[i][part] for i in found])), 4) for part in PARTS},
            "interval": [round(x, 4) for x in bootstrap_interval(right)],
            "difference": round(float(paired.mean()), 4) if len(both) else None,
            "difference_interval": [round(x, 4) for x in bootstrap_interval(paired)] if len(both) else None,
        })  # fmt: skip
    return told


def merge(told: Sequence[dict[str, Any]], into: Path) -> None:
    """Puts a summary's rows into alignment.json, in place of what it holds of the same rows, unless that saw more."""
    data = json.loads(into.read_text(encoding="utf-8"))
    held = {row_of(entry): entry for entry in data["measured"]}
    fresh = {row_of(entry): entry for entry in told}
    kept = {row for row in fresh if held.get(row, {}).get("captions", 0) > fresh[row]["captions"]}
    data["measured"] = [e for row, e in fresh.items() if row not in kept] + [
        e for row, e in held.items() if row in kept or row not in fresh
    ]
    head = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in data.items() if k != "measured")
    rows = ",\n  ".join(json.dumps(entry) for entry in data["measured"])
    into.write_text(f'{{\n {head},\n "measured": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--captions", type=parse_block, default=range(128), help="how many, or FIRST:END")
    parser.add_argument("--rows", nargs="*", type=parse_row)
    parser.add_argument("--summary", type=Path, nargs="*")
    parser.add_argument("--write", type=Path, help="alignment.json to put the summary's figures into")
    given = parser.parse_args()
    if given.summary is None:
        pipeline = sources.open_pipeline(given.bundle)
        wanted = fitting(decisions() if given.rows is None else given.rows, pipeline)
        measure(pipeline, wanted, given.captions, given.out)
        return
    told = summary(given.summary)
    for entry in told:
        print(json.dumps(entry))
    if given.write is not None:
        merge(told, given.write)


if __name__ == "__main__":
    main()
