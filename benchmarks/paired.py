"""What benchmarks of the embedded model's quality share: variants that draw the captions and noise of the float model.

WORK/variants/SLUG holds a variant: its graph, facts.json, and verdicts in blocks of 64 captions. Blocks are drawn over
all variants in turn, so a stopped run goes on, and a report over what is there is valid at any time. Sampler, steps
and guidance are the same for all; 8 pictures a call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
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
FLOAT = "float"  # the variant that all others are held against


# ---- the model, its calls, its variants -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def embedded() -> Any:
    from edgesd.models.load import load

    return load()


def calibration(work: Path) -> Any:
    from edgesd.calibration.capture import calibrate

    return calibrate(embedded(), work / "calibration", calls=CALLS)


@lru_cache(maxsize=1)
def held_out(work: Path) -> list:
    """Batches of recorded calls that no variant was made from: other captions, other noise."""
    from edgesd.calibration.capture import calibrate
    from edgesd.compress.calls import batches

    prompts = work / "held_out.txt"
    prompts.write_text("\n".join(held_out_captions(HELD_OUT_CALLS, seed=1)), encoding="utf-8")
    recorded = calibrate(embedded(), work / "held_out", calls=HELD_OUT_CALLS, prompts=str(prompts), seed=1_000_000)
    return batches("unet", recorded.calls("unet"), embedded().spec)


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_").replace("%", "")


def folder_of(work: Path, name: str) -> Path:
    return work / "variants" / slug(name)


def block_file(work: Path, name: str, block: int) -> Path:
    return folder_of(work, name) / f"block-{block:03d}.npz"


def made(work: Path, name: str, make: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder of a variant, with what `make(folder)` writes there and the facts it returns; made once."""
    folder = folder_of(work, name)
    if not (folder / "facts.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        facts = make(folder)
        write_whole(folder / "facts.json", json.dumps(facts, indent=1).encode())
        print(f"{name}: {facts}", flush=True)
    return folder


def facts_of(work: Path, name: str) -> dict[str, Any]:
    return json.loads((folder_of(work, name) / "facts.json").read_text(encoding="utf-8"))


# ---- drawing ----------------------------------------------------------------------------------------------------


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


def opened(graph: Path, threads: int, session: type[Watched] = Fast) -> Any:
    """The embedded model's pipeline with its UNet from a file, behind a session such as `Fast`."""
    from edgesd.sources import torch_pipeline

    pipeline = torch_pipeline(embedded())
    return replace(pipeline, session=session(pipeline.session, graph, threads))


def drawn(pipeline: Any, first: int, count: int) -> list[np.ndarray]:
    """Pictures of held-out captions first .. first + count - 1, as `edgesd evaluate` numbers captions and noise."""
    captions, cache, pictures = held_out_captions(first + count), PromptCache(), []
    several = [resolve(pipeline.spec, captions[i], seed=i, **SETTINGS) for i in range(first, first + count)]
    for at in range(0, count, TOGETHER):
        for event in sample_batch(pipeline, several[at : at + TOGETHER], cache=cache):
            pictures += [picture.image for picture in event] if isinstance(event, list) else []
    return pictures


def judged(pictures: Sequence[np.ndarray], first: int) -> np.ndarray:
    """Whether each picture shows what its caption says: bool [n]."""
    texts = held_out_captions(first + len(pictures))[first:]
    return np.array([judge(picture, text).all for picture, text in zip(pictures, texts, strict=True)])


def distances(pictures: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> np.ndarray:
    """PSNR in dB of each picture against the float model's: [n]."""
    return np.array([psnr_db(a, b) for a, b in zip(pictures, truth, strict=True)])


def draw(
    work: Path,
    names: Sequence[str],
    captions: int,
    minutes: float,
    make: Callable[[str], Path],
    opener: Callable[[str], Any],
    *,
    limit: Callable[[str], int] = lambda name: sys.maxsize,
    shown: Collection[str] = (),
) -> None:
    """Draws what is missing of `captions` captions, FLOAT first in `names`; exits with STOPPED when minutes are over.

    limit: captions that a variant is drawn for at most. shown: variants whose first block keeps its pictures.
    """
    until = time.monotonic() + 60 * minutes
    for name in names:
        if time.monotonic() > until:
            sys.exit(STOPPED)
        make(name)
    pipelines: dict[str, Any] = {}
    for block in range(-(-captions // BLOCK)):
        for name in names:
            if block_file(work, name, block).is_file() or block * BLOCK >= limit(name):
                continue
            if time.monotonic() > until:
                sys.exit(STOPPED)
            if name not in pipelines:
                pipelines[name] = opener(name)
            _draw_block(work, name, block, pipelines[name], name == FLOAT or (name in shown and block == 0))


def _draw_block(work: Path, name: str, block: int, pipeline: Any, keep_pictures: bool) -> None:
    began = time.perf_counter()
    pictures = drawn(pipeline, block * BLOCK, BLOCK)
    arrays = {"right": judged(pictures, block * BLOCK)}
    if keep_pictures:
        arrays["pictures"] = np.stack(pictures)
    if name != FLOAT:
        arrays["psnr_db"] = distances(pictures, np.load(block_file(work, FLOAT, block))["pictures"])
    file = block_file(work, name, block)
    half = file.with_suffix(".half.npz")
    np.savez_compressed(half, **arrays)
    half.rename(file)
    print(f"block {block} {name}: {np.mean(arrays['right']):.3f} in {time.perf_counter() - began:.0f} s", flush=True)


# ---- reports ----------------------------------------------------------------------------------------------------


def loaded(work: Path, name: str) -> dict[str, np.ndarray]:
    """right and psnr_db of all captions drawn so far, in order; empty where none are."""
    blocks = []
    while block_file(work, name, len(blocks)).is_file():
        with np.load(block_file(work, name, len(blocks))) as file:
            blocks.append({key: file[key] for key in ("right", "psnr_db") if key in file})
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]} if blocks else {}


def difference(right: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Paired difference of alignment over the captions that both drew, with its 95 % interval."""
    n = min(len(right), len(base))
    gain = right[:n].astype(float) - base[:n]
    interval = [round(end, 4) for end in bootstrap_interval(gain)]
    return {"captions": n, "difference": round(float(gain.mean()), 4), "interval": interval}


def row(work: Path, name: str) -> dict[str, Any] | None:
    """A variant's figures, all but FLOAT's with what it keeps of the float model's; None where nothing is drawn."""
    measured, base = loaded(work, name), loaded(work, FLOAT)["right"]
    if not measured:
        return None
    n = min(len(measured["right"]), len(base))
    alignment = measured["right"][:n].mean()
    found = {"name": name, "captions": n, "alignment": round(float(alignment), 4)}
    if name == FLOAT:
        return found
    found["keeps"] = round(float(alignment / base[:n].mean()), 4)
    return found | difference(measured["right"], base) | {"psnr_db": round(float(measured["psnr_db"][:n].mean()), 2)}


def rows(work: Path, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, figures, facts) of the variants that were drawn."""
    for name in names:
        if (found := row(work, name)) is not None:
            yield name, found, facts_of(work, name)


def asked(description: str | None, verbs: Sequence[str], variants: Sequence[str], only: Sequence[str]) -> Any:
    """The command line: verb, work (made if need be), captions, minutes, threads, and names, FLOAT first.

    only: names where none are given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("work", type=Path)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--only", nargs="+", choices=list(variants), default=list(only))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after these")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.names = list(dict.fromkeys((FLOAT, *given.only)))
    return given
