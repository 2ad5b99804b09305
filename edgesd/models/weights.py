"""Weights in: one part's folder becomes a float32 module, whole or not at all."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, RequestError
from edgesd.models.facts import read_json

if TYPE_CHECKING:
    import torch

SIDECAR = "edgesd.json"  # defaults, licence and compression record that diffusers' own configs cannot express
_ALLOWED = {
    "unet": {"UNet2DConditionModel": "diffusers"},
    "vae": {"AutoencoderKL": "diffusers", "AutoencoderTiny": "diffusers"},
    "text_encoder": {"CLIPTextModel": "transformers", "CLIPTextModelWithProjection": "transformers"},
    "text_encoder_2": {"CLIPTextModelWithProjection": "transformers"},
}


def _module_class(folder: Path, part: str) -> Any:
    config = read_json(folder / "config.json")
    declared = config.get("_class_name", (config.get("architectures") or ["?"])[0])
    allowed = _ALLOWED[part]
    if declared not in allowed:
        raise RequestError(f"{part} is a {declared}", ", ".join(allowed), "Choose a model with one of these")
    return getattr(importlib.import_module(allowed[declared]), declared)


def load_module(folder: Path, part: str) -> torch.nn.Module:
    """One component in float32. A missing, misshapen or cut tensor is an error, never a random initialisation."""
    import torch
    from safetensors import SafetensorError

    fix = "Download the model again; if you made it, save it again with save_pretrained"
    kind = _module_class(folder, part)
    if _prune_plan(folder, part) is not None:
        return _load_pruned(folder, part)
    options: dict[str, Any] = {"low_cpu_mem_usage": True} if not part.startswith("text_encoder") else {}
    try:
        module, info = kind.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{part} does not load: {reason}", "whole safetensors weights that match config.json", fix
        ) from None
    missing = [k for k in info.get("missing_keys", ()) if not k.endswith("position_ids")]
    wrong = info.get("mismatched_keys") or ()
    if missing or wrong:
        first = sorted(str(k) for k in missing)[0] if missing else str(sorted(map(str, wrong))[0])
        raise DataError(
            f"{part} lacks {len(missing) + len(wrong)} tensors, the first {first}",
            "weights that match config.json",
            fix,
        )
    return module.eval().requires_grad_(False)


def read_sidecar(folder: Path) -> dict[str, Any]:
    """What edgesd noted in a checkpoint's folder; {} for one of another make. Raises DataError for a broken one."""
    return read_json(folder / SIDECAR) if (folder / SIDECAR).exists() else {}


def _prune_plan(folder: Path, part: str) -> Any | None:
    """The plan by which a part was pruned, from the sidecar beside it; None for a part as its config has it."""
    planned = read_sidecar(folder.parent).get("pruned", {})
    if not isinstance(planned, dict) or part not in planned:
        return None
    from edgesd.compress.plan import PrunePlan

    return PrunePlan.parse(planned[part])


def empty_module(folder: Path, part: str) -> Any:
    """A part as its config and its prune plan have it, on the meta device: shapes and names alone."""
    from accelerate import init_empty_weights

    kind, clip = _module_class(folder, part), part.startswith("text_encoder")
    with init_empty_weights(include_buffers=False):
        config = kind.config_class.from_pretrained(folder) if clip else kind.load_config(folder)
        module = kind(config) if clip else kind.from_config(config)
    if (plan := _prune_plan(folder, part)) is not None:
        from edgesd.compress.plan import resize

        resize(module, plan)
    return module


def _load_pruned(folder: Path, part: str) -> torch.nn.Module:
    """A pruned part: built from its config without weights, cut to the plan's widths, then filled."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    module = empty_module(folder, part)
    fix = "Prune the model again"
    try:
        tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        state = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        module.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"pruned {part} does not load: {reason}", "the weights this plan was saved with", fix) from None
    return module.eval().requires_grad_(False)
