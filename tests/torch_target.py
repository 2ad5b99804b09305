"""A target for tests that converts nothing: the export form itself runs, behind the session that real targets use."""

from __future__ import annotations

from pathlib import Path

import torch

from edgesd.targets import Capabilities, Lowered
from edgesd.targets._session import ComponentSession

name, extra = "torch", "package"
modules = lower_modules = ("torch",)
capabilities = Capabilities(precisions=("fp32",))


def runtime_version() -> str:
    return f"torch {torch.__version__}"


def lower(component, axes, directory, **options):
    torch.save(component.module, directory / "module.pt")
    return Lowered((Path("module.pt"),), component.inputs, component.outputs)


def open(directory, manifest, **options):
    def open_variant(variant, files):
        module = torch.load(files[0], weights_only=False)  # a test's own file

        def call(inputs):
            with torch.inference_mode():
                made = module(*(torch.from_numpy(inputs[spec.name]) for spec in variant.inputs))
            made = made if isinstance(made, tuple) else (made,)
            return {spec.name: tensor.numpy() for spec, tensor in zip(variant.outputs, made, strict=True)}

        return call

    return ComponentSession(directory, manifest, open_variant, **options)
