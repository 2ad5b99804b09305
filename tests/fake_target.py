"""A target for tests, installed as a plug-in: the embedded model runs, and each artefact says how far it is off.

`{"perturb": 0.01}` scales every weight by up to 1 %, `{"round": "float16"}` rounds the outputs, `{"idle": true}`
computes nothing (and imports no torch), `{}` is the truth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from edgesd import bundle, golden
from edgesd.governing import ship_policies
from edgesd.manifest import Axes, Component, Manifest, Provenance, SamplerFile, TensorSpec, Variant
from edgesd.targets import Capabilities, OpCount

name = "fake"
extra = "onnx"
modules = lower_modules = ("numpy",)
capabilities = Capabilities(precisions=("fp32", "fp16"), forms=("", "other"))
status = "executed"
form_status: dict[str, str] = {}
SIZE_PX = (128, 128)
FP32, FP16 = Axes(size_px=SIZE_PX), Axes(size_px=SIZE_PX, precision="fp16", form="other")
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


def runtime_version() -> str:
    return "fake 1.0"


def count_operations(path: Path) -> OpCount:
    json.loads(path.read_text())
    return OpCount({("Conv", "float32"): 3, ("MatMul", "float32"): 2, ("MatMul", "int8"): 1})


def open(directory: Path, manifest: Manifest, threads: int | None = None) -> Session:
    return Session(directory, manifest)


@lru_cache
def truth(perturb: float = 0.0) -> Any:
    """The embedded model's torch pipeline, every weight scaled by a random 1 ± perturb."""
    import torch

    from edgesd import sources
    from edgesd.models.load import load

    torch.set_num_threads(1)
    model = load()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules.values() if perturb else ():
        for parameter in module.parameters():
            parameter.mul_(1 + perturb * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    return sources.torch_pipeline(model)


class Session:
    """Opens the first flavour listed of every component, like a real target."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._settings: dict[tuple[str, int], dict[str, Any]] = {}
        for component in manifest.components:
            first = component.variants[0].axes
            for variant in component.variants:
                if (variant.axes.precision, variant.axes.form) == (first.precision, first.form):
                    self._settings[component.name, variant.axes.batch] = json.loads(
                        (directory / variant.files[0]).read_text()
                    )

    def has(self, component: str) -> bool:
        return self.batches(component) != ()

    def load(self, component: str) -> None:
        pass

    def unload(self, component: str) -> None:
        pass

    def batches(self, component: str) -> tuple[int, ...]:
        return tuple(batch for name, batch in self._settings if name == component)

    def widths(self, component: str) -> tuple[float, ...]:
        return (1.0,)

    def use_width(self, component: str, width: float) -> None:
        assert width == 1.0

    def run(self, component: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = len(next(iter(inputs.values())))
        settings = self._settings[component, rows]
        if settings.get("idle"):
            return {}
        outputs = truth(settings.get("perturb", 0.0)).session.run(component, inputs)
        dtype = settings.get("round", "float32")
        return {key: value.astype(dtype).astype(np.float32) for key, value in outputs.items()}


@lru_cache
def recorded() -> golden.Golden:
    """Golden vectors of a run of 3 steps."""
    pipeline = truth()
    return golden.record(pipeline, golden.settings_for(pipeline.spec, {"dpmpp_2m_karras": (2, 3)}))


def make(destination: Path, artefacts: Mapping[str, list[tuple[Axes, dict[str, Any]]]] | None = None) -> Path:
    """A whole bundle. artefacts: by component, (axes, what the artefact says) of each; one exact fp32 otherwise."""
    from edgesd.models.load import embedded_folder
    from edgesd.runtime.table import save_tables

    pipeline = truth()
    made = {component: [(FP32, {})] for component in COMPONENTS} | dict(artefacts if artefacts is not None else {})
    with bundle.writing(destination) as folder:
        recorded().save(folder)
        save_tables(folder / "tables.safetensors", [pipeline.table("dpmpp_2m_karras", steps) for steps in (2, 3)])
        (folder / "tokenizer").mkdir()
        tokenizer = (embedded_folder() / "tokenizer/tokenizer.json").read_bytes()
        (folder / pipeline.spec.tokenizers[0].file).write_bytes(tokenizer)
        components = []
        for component, listed in made.items():
            variants = []
            for index, (axes, settings) in enumerate(listed):
                (folder / f"{component}-{index}.fake").write_text(json.dumps(settings))
                variants.append(_variant(component, axes, f"{component}-{index}.fake"))
            components.append(Component(name=component, variants=tuple(variants)))
        manifest = Manifest(
            target=name,
            model=pipeline.spec,
            components=tuple(components),
            samplers=(SamplerFile(name="dpmpp_2m_karras", file="tables.safetensors", steps=(2, 3)),),
            policies=ship_policies(folder),
            provenance=Provenance(source="shapes", sha256="0" * 64, licence="Apache-2.0"),
            files=bundle.entries(folder),
        )
        bundle.seal(folder, golden.attach(manifest))
    return destination


def _variant(component: str, axes: Axes, file: str) -> Variant:
    call = recorded().calls(component, axes.batch)[0]
    sides = [
        tuple(TensorSpec(name=key, dtype=str(value.dtype), shape=value.shape) for key, value in side.items())
        for side in (call.inputs, call.outputs)
    ]
    return Variant(axes=axes, files=(file,), inputs=sides[0], outputs=sides[1], params=12, macs=34)
