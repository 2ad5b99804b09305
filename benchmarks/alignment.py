"""Alignment of a bundle at each decision its policies can make: steps, width, guidance; caption by caption, resumable.

    python benchmarks/alignment.py shapes-openvino.edgesd --out alignment.jsonl --captions 128
    python benchmarks/alignment.py --summary alignment.jsonl --write calibration/alignment.json

Every decision draws the same held-out captions with the same noise, so decisions are compared pairwise. One line a
picture goes to the file; a line that is there is not drawn again. The summary takes the captions that are done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgesd import sources
from edgesd.evaluate import bootstrap_interval
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.generate import Picture, sample
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.policy import load_policy, policy_names
from edgesd.runtime.settings import resolve
from edgesd.shapes.oracle import judge
from edgesd.shapes.world import held_out_captions
from edgesd.simulate import FIXED

Decision = tuple[int, float, float]  # steps, width, guidance_until
PARTS = ("all", "background", "color", "shape", "relation")
SAMPLER, GUIDANCE = "dpmpp_2m_karras", 4.0


def decisions() -> list[Decision]:
    """Every (steps, width, guidance_until) of the shipped policies and the fixed settings."""
    rows = [row.then for name in policy_names() for row in load_policy(name).rows]
    found = {(then.steps, then.width, then.guidance_until) for then in rows}
    return sorted(found | {(steps, width, 1.0) for steps, width in FIXED.values()}, reverse=True)


def measure(pipeline: Pipeline, wanted: list[Decision], captions: int, out: Path) -> None:
    """Appends a line for each picture that `out` lacks, caption by caption."""
    done = {(tuple(line["decision"]), line["caption"]) for line in lines(out)}
    cache = PromptCache()
    for index, caption in enumerate(held_out_captions(captions, 0)):
        for decision in wanted:
            if (decision, index) not in done:
                steps, width, until = decision
                settings = resolve(
                    pipeline.spec, caption, seed=index, sampler=SAMPLER, guidance_scale=GUIDANCE,
                    num_inference_steps=steps, width=width, guidance_until=until,
                )  # fmt: skip
                picture = next(e for e in sample(pipeline, settings, cache=cache) if isinstance(e, Picture))
                verdict = asdict(judge(picture.image, caption))
                line = {
                    "decision": decision,
                    "caption": index,
                    **{part: bool(verdict[part]) for part in PARTS if part in verdict},
                }
                line["all"] = all(line[part] for part in PARTS[1:])
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def lines(out: Path) -> Iterator[dict[str, Any]]:
    for text in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        yield json.loads(text)


def summary(out: Path) -> list[dict[str, Any]]:
    """Per decision: shares, their interval, and the difference from 20 steps at width 1 over the captions of both."""
    by: dict[Decision, dict[int, dict[str, Any]]] = {}
    for line in lines(out):
        by.setdefault(tuple(line["decision"]), {})[line["caption"]] = line  # type: ignore[arg-type]
    base = by.get((20, 1.0, 1.0), {})
    told = []
    for (steps, width, until), found in sorted(by.items(), reverse=True):
        right = np.array([found[i]["all"] for i in sorted(found)], float)
        both = sorted(set(found) & set(base))
        paired = np.array([float(found[i]["all"]) - float(base[i]["all"]) for i in both])
        low, high = bootstrap_interval(right)
        told.append({
            "steps": steps, "width": width, "guidance_until": until, "captions": len(found),
            **{part: round(float(np.mean([found[i][part] for i in found])), 4) for part in PARTS},
            "interval": [round(low, 4), round(high, 4)],
            "difference": round(float(paired.mean()), 4) if len(both) else None,
            "difference_interval": [round(x, 4) for x in bootstrap_interval(paired)] if len(both) else None,
        })  # fmt: skip
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--write", type=Path, help="alignment.json to put the summary's figures into")
    given = parser.parse_args()
    if given.summary is None:
        measure(sources.open_pipeline(given.bundle), decisions(), given.captions, given.out)
        return
    told = summary(given.summary)
    for entry in told:
        print(json.dumps(entry))
    if given.write is not None:
        data = json.loads(given.write.read_text(encoding="utf-8"))
        new = {(e["steps"], e["width"], e["guidance_until"]) for e in told}
        kept = [e for e in data["measured"] if (e["steps"], e["width"], e["guidance_until"]) not in new]
        data["measured"] = told + kept
        head = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in data.items() if k != "measured")
        rows = ",\n  ".join(json.dumps(entry) for entry in data["measured"])
        given.write.write_text(f'{{\n {head},\n "measured": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
