"""A target for tests that converts nothing: the export form itself runs, behind the session that real targets use.

It lives as long as its process; a file holds the number under which the module is kept.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edgesd.targets import Capabilities, Lowered
from edgesd.targets._session import ComponentSession

name, extra = "torch", "package"
modules = lower_modules = ("torch",)
capabilities = Capabilities(precisions=("fp32",))
_kept: list = []


def runtime_version() -> str:
    return f"torch {torch.__version__}"


def lower(component, axes, directory, **options):
    _kept.append(component.module)
    (directory / "module.txt").write_text(str(len(_kept) - 1))
    return Lowered((Path("module.txt"),), component.inputs, component.outputs)


def open(directory, manifest, **options):
    def open_variant(variant, files):
        module = _kept[int(files[0].read_text())]

        def call(inputs):
            with torch.inference_mode():
                made = module(*(torch.from_numpy(inputs[spec.name]) for spec in variant.inputs))
            made = made if isinstance(made, tuple) else (made,)
            return {spec.name: tensor.numpy() for spec, tensor in zip(variant.outputs, made, strict=True)}

        return call

    return ComponentSession(directory, manifest, open_variant, **options)
