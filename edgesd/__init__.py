"""edgesd: Stable-Diffusion-family models onto phones, browsers and laptops.

    pipeline = edgesd.open_pipeline("model.edgesd")        # or a diffusers folder, a hub id, None = the embedded model
    picture = edgesd.generate(pipeline, "a red circle on a white background", seed=3)[0]

Names load when they are used: importing edgesd costs next to nothing.
"""

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "open_pipeline": "edgesd.sources",
    "generate": "edgesd.runtime.generate",
    "sample": "edgesd.runtime.generate",
    "Picture": "edgesd.runtime.generate",
    "Pipeline": "edgesd.runtime.pipeline",
    "Settings": "edgesd.runtime.settings",
    "package_all": "edgesd.packager",
    "EdgesdError": "edgesd.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgesd' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
