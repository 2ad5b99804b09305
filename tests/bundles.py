"""A small whole bundle of plain bytes (no runtime would open its files): what tests of the format start from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from edgesd import bundle
from edgesd.manifest import Manifest, parse

FILES = {
    "unet/unet.onnx": b"graph" * 100,
    "unet/unet.onnx.data": bytes(range(256)) * 40,
    "decoder.onnx": b"decoder" * 50,
    "tokenizer.json": b"{}",
    "samplers.safetensors": b"tables" * 9,
    "golden/golden.json": b"[]",
}
TOKENIZER = {
    "file": "tokenizer.json",
    "component": "text_encoder",
    "max_length": 77,
    "bos_id": 0,
    "eos_id": 1,
    "pad_id": 1,
}
MODEL: dict[str, Any] = {
    "name": "small",
    "family": "sd1",
    "prediction_type": "epsilon",
    "unet_in_channels": 4,
    "latent": {"channels": 4, "downscale": 8, "scaling_factor": 0.18215},
    "tokenizers": [TOKENIZER],
    "defaults": {"sampler": "ddim", "steps": 4, "size_px": [16, 16]},
}


def _tensor(name: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": list(shape), "meaning": "for tests"}


def fill(folder: Path, salt: bytes = b"") -> None:
    """Writes the files of a bundle, all but the manifest. salt makes them other files of other sizes."""
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data + salt)


def document(folder: Path) -> dict[str, Any]:
    """The manifest of a filled folder as plain JSON values, to be sealed or spoiled."""
    axes = {"size_px": [16, 16]}
    unet = {
        "axes": axes,
        "files": ["unet/unet.onnx", "unet/unet.onnx.data"],
        "inputs": [_tensor("sample", 1, 4, 2, 2), _tensor("timestep", 1)],
        "outputs": [_tensor("model_output", 1, 4, 2, 2)],
        "snr_db": 120.5,
    }
    decoder = {
        "axes": axes,
        "files": ["decoder.onnx"],
        "inputs": [_tensor("latents", 1, 4, 2, 2)],
        "outputs": [_tensor("image", 1, 3, 16, 16)],
    }
    return {
        "format": "1.0",
        "target": "onnx-web",
        "model": copy.deepcopy(MODEL),
        "components": [{"name": "unet", "variants": [unet]}, {"name": "vae_decoder", "variants": [decoder]}],
        "samplers": [{"name": "ddim", "file": "samplers.safetensors", "steps": [1, 4]}],
        "golden": "golden/golden.json",
        "provenance": {"source": "tests", "sha256": "0" * 64},
        "files": [entry.model_dump() for entry in bundle.entries(folder)],
    }


def manifest(folder: Path) -> Manifest:
    return parse(json.dumps(document(folder)).encode())


def make(destination: Path, salt: bytes = b"", force: bool = False) -> Path:
    """A whole bundle at `destination`, by the way every bundle is made."""
    with bundle.writing(destination, force=force) as folder:
        fill(folder, salt)
        bundle.seal(folder, manifest(folder))
    return destination
