"""A bundle's components for the JVM test, over stdin and stdout: frames of safetensors, each behind its length.

    python android_demo/serve.py BUNDLE

A request with the metadata `file` holds inputs of the component whose artefact that is; the answer holds its outputs.
One with `draw` (settings as JSON) is answered with the picture that edgesd's own runtime draws.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors.numpy import load, save

from edgesd.runtime.generate import Picture, sample
from edgesd.runtime.settings import Settings
from edgesd.sources import open_pipeline


def main() -> None:
    pipeline, answers = open_pipeline(sys.argv[1], threads=1), sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints must not end up between two frames
    manifest = json.loads(Path(sys.argv[1], "manifest.json").read_text(encoding="utf-8"))
    component_of = {v["files"][0]: c["name"] for c in manifest["components"] for v in c["variants"]}
    while (data := frame(sys.stdin.buffer)) is not None:
        told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if "draw" in told:
            settings = Settings.from_json(json.loads(told["draw"]))
            picture = next(event for event in sample(pipeline, settings) if isinstance(event, Picture))
            made = {"image": picture.image, "latents": picture.latents, "calls": np.array([picture.calls])}
        else:
            made = pipeline.session.run(component_of[told["file"]], load(data))
        packed = save({name: np.ascontiguousarray(value) for name, value in made.items()})
        answers.write(len(packed).to_bytes(4, "little") + packed)
        answers.flush()


def frame(stream: BinaryIO) -> bytes | None:
    size = stream.read(4)
    return stream.read(int.from_bytes(size, "little")) if size else None


if __name__ == "__main__":
    main()
