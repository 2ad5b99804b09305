"""Checkpoints out: a diffusers folder that differs from another one in some parts, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from edgesd.errors import RequestError
from edgesd.files import copy_tree, disk_errors, locked, replacing
from edgesd.models.load import LoadedModel
from edgesd.models.weights import SIDECAR

NESTED = "nested_widths"  # of the sidecar: what the UNet was trained at, see edgesd/training/nested.py
ORDERED = "ordered"  # of the sidecar: the UNet's units have kept their places since it was trained at narrow widths


def weights_name(part: str) -> str:
    """What diffusers and transformers call the weights of a part."""
    return "model.safetensors" if part.startswith("text") else "diffusion_pytorch_model.safetensors"


def sidecar_of(model: LoadedModel) -> dict[str, Any]:
    """What edgesd noted beside a checkpoint; for one of another make, its licence."""
    path = source_folder(model) / SIDECAR
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"licence": model.licence}


def trained_at(told: Mapping[str, Any], widths: Sequence[float]) -> dict[str, Any]:
    """The sidecar of a UNet that has just been trained at these widths; of others that it had, only the order stays."""
    ordered = min((*told.get(NESTED, ()), *widths)) < 1 or told.get(ORDERED, False)
    return {**told, ORDERED: ordered, NESTED: sorted(widths, reverse=True)}


def source_folder(model: LoadedModel) -> Path:
    """The folder with the pipeline's index."""
    return next(p.parent for p in model.parts.values() if (p.parent / "model_index.json").is_file())


def save_checkpoint(
    model: LoadedModel, changed: Mapping[str, nn.Module], out: Path, told: Mapping[str, Any],
    also: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Writes `model` to `out` with the weights of some parts replaced; configs and other parts are copied.

    told: the sidecar's contents. also: what else goes into the new folder. A checkpoint already there is replaced when
    the new one is whole; anything else there is refused (RequestError).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "model_index.json").is_file())):
        raise RequestError(
            f"{out} exists and is no checkpoint", "a new folder, or a checkpoint to replace", "Name another"
        )
    source = source_folder(model)
    with locked(out), disk_errors(out, "Free some space"), replacing(out) as new:
        for name in ("model_index.json", "README.md"):
            if (source / name).is_file():
                shutil.copyfile(source / name, new / name)
        for folder in (source / "scheduler", *model.tokenizers):
            copy_tree(folder, new / folder.name)
        for part, folder in model.parts.items():
            if part in changed:
                save_part(part, folder, changed[part], new)
            else:
                copy_tree(folder, new / part)
        (new / SIDECAR).write_text(json.dumps(told, indent=1), encoding="utf-8")
        also(new)


def save_part(part: str, source: Path, module: nn.Module, folder: Path) -> None:
    """Writes `folder/part`: the configs of `source` with a module's weights."""
    copy_tree(source, folder / part, skip=(".safetensors", ".safetensors.index.json", ".bin"))
    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, folder / part / weights_name(part), metadata={"format": "pt"})
