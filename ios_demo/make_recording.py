"""Writes the recorded run that the Swift tests draw a picture from. Needs edgesd[package].

    python ios_demo/make_recording.py

A small bundle of target `recorded`: the embedded model's tokenizer and tables, and for every component the calls of one
run in order, inputs and outputs. A policy's changes are part of the run, so it crosses a bridge and an end of guidance.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import edgesd
from edgesd import bundle
from edgesd.manifest import Axes, Component, Manifest, PolicyFile, Provenance, SamplerFile, TensorSpec, Variant
from edgesd.runtime.generate import Picture, sample
from edgesd.runtime.governed import Change
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.policy import FOLDER as POLICIES
from edgesd.runtime.session import Arrays, Watched
from edgesd.runtime.settings import Settings
from edgesd.runtime.table import save_tables

PLACE = Path(__file__).parent / "EdgeSD" / "Tests" / "EdgeSDTests" / "recorded"
TOKENIZER = Path(edgesd.__file__).parent / "models" / "shapes" / "tokenizer" / "tokenizer.json"
SETTINGS = Settings(
    prompt="a red circle above a (blue square:1.2) on a white background", negative_prompt="green", seed=3,
    num_inference_steps=8, guidance_scale=4.0, guidance_rescale=0.3,
    changes=(Change(2, "shorten", 5, 1.0, 1.0, 0.0, "hot"), Change(3, "unguide", 5, 1.0, 0.7, 0.0, "hot")),
)  # fmt: skip


class _Recorder(Watched):
    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline.session)
        self.calls: dict[str, list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]] = {}

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]:
        outputs = super().run(component, inputs)
        self.calls.setdefault(component, []).append(({k: np.array(v) for k, v in inputs.items()}, outputs))
        return outputs

    def batches(self, component: str) -> tuple[int, ...] | None:
        return (1,)


def main() -> None:
    pipeline = edgesd.open_pipeline("shapes")
    recorder = _Recorder(pipeline)
    *_, picture = sample(replace(pipeline, session=recorder), SETTINGS)
    assert isinstance(picture, Picture)
    with bundle.writing(PLACE, force=True) as folder:
        components = tuple(_component(folder, name, calls) for name, calls in recorder.calls.items())
        (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
        (folder / "balanced.json").write_bytes((POLICIES / "balanced.json").read_bytes())
        save_tables(folder / "samplers.safetensors", [pipeline.table(SETTINGS.sampler, steps) for steps in (5, 8)])
        save_file(
            {"image": np.ascontiguousarray(picture.image), "latents": picture.latents}, folder / "picture.safetensors"
        )
        (folder / "settings.json").write_text(json.dumps(asdict(picture.settings)) + "\n")
        tokenizers = tuple(t.model_copy(update={"file": "tokenizer.json"}) for t in pipeline.spec.tokenizers)
        manifest = Manifest(
            target="recorded", model=pipeline.spec.model_copy(update={"tokenizers": tokenizers}), components=components,
            samplers=(SamplerFile(name=SETTINGS.sampler, file="samplers.safetensors", steps=(5, 8)),),
            policies=(PolicyFile(name="balanced", file="balanced.json"),),
            provenance=Provenance(source="shapes", sha256="0" * 64), files=bundle.entries(folder),
        )  # fmt: skip
        bundle.seal(folder, manifest)


def _component(folder: Path, name: str, calls: list) -> Component:
    tensors = {}
    for index, sides in enumerate(calls):
        for side, arrays in zip(("in", "out"), sides, strict=True):
            tensors |= {f"{index}/{side}/{key}": np.ascontiguousarray(value) for key, value in arrays.items()}
    save_file(tensors, folder / f"{name}.safetensors")
    inputs, outputs = (
        tuple(TensorSpec(name=key, dtype=str(value.dtype), shape=value.shape) for key, value in side.items())
        for side in calls[0]
    )
    axes = Axes(size_px=edgesd.open_pipeline("shapes").spec.defaults.size_px)
    return Component(
        name=name, variants=(Variant(axes=axes, files=(f"{name}.safetensors",), inputs=inputs, outputs=outputs),)
    )


if __name__ == "__main__":
    main()
