"""A checkpoint's facts, read from its configs alone: what a `ModelSpec` holds, its licence, the hash of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgesd.errors import DataError, RequestError
from edgesd.manifest import Defaults, LatentSpec, ModelSpec, TokenizerSpec

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
MAX_HEADER_BYTES = 100 << 20
HASHED = (".json", ".safetensors", ".txt")
# What each family's pipeline takes where the user says nothing (diffusers' own defaults).
_GUIDANCE = {"sdxl": 5.0, "sdxl_refiner": 5.0}
_LCM_STEPS, _LCM_GUIDANCE = 4, 8.5


def read_json(path: Path) -> dict[str, Any]:
    """A config as an object. Raises DataError for a missing or broken one."""
    name = f"{path.parent.name}/{path.name}"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{name} is missing", "a whole diffusers folder", "Download the model again") from None
    except (ValueError, RecursionError) as error:
        came = f"{name} is not JSON ({str(error)[:160]})"
        raise DataError(came, "a whole diffusers folder", "Download the model again") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{name} holds no object", "a whole diffusers folder", "Download the model again")
    return loaded


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape"} of a safetensors file, no weight read. Raises DataError for a broken one."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size) if size <= MAX_HEADER_BYTES else b"")
        header.pop("__metadata__", None)
        for entry in header.values():
            if not isinstance(entry["dtype"], str) or any(type(side) is not int or side < 0 for side in entry["shape"]):
                raise ValueError("a tensor without dtype or shape")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        came = f"{path.parent.name}/{path.name} has no safetensors header"
        raise DataError(came, "whole weights", "Download it again") from None
    return header


def text_encoders(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The text encoders that a model_index.json lists: one for SD, two for SDXL, the second alone for its refiner."""
    return tuple(name for name in TEXT_ENCODERS if index.get(name) not in (None, [None, None]))


def tokenizer_of(component: str) -> str:
    """Folder of the tokenizer that goes with a text encoder."""
    return component.replace("text_encoder", "tokenizer")


def read_spec(
    folder: Path, parts: Mapping[str, Path], tokenizers: Mapping[str, Path], name: str, sidecar: Mapping[str, Any]
) -> ModelSpec:
    """The model's facts. folder: the pipeline's; parts, tokenizers: folders by part and by text encoder.

    name: the model's id; its last part becomes the name in files.
    """
    unet, vae = read_json(parts["unet"] / "config.json"), read_json(parts["vae"] / "config.json")
    family = family_of(unet, tuple(tokenizers))
    zeros = read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if not family.startswith("sdxl"):
        # diffusers' StableDiffusionPipeline overrides these two of old configs: that is how such models are used.
        scheduler |= {key: value for key, value in (("steps_offset", 1), ("clip_sample", False)) if key in scheduler}
    latent = _latent(vae, sidecar)
    prediction = scheduler.get("prediction_type", "epsilon")
    embedding = unet.get("time_cond_proj_dim")
    return ModelSpec(
        name=re.sub(r"[^A-Za-z0-9_.+-]", "-", name.split("/")[-1]).lstrip(".-+") or "model",
        family=family,
        prediction_type={"flow_prediction": "flow"}.get(prediction, prediction),
        unet_in_channels=unet["in_channels"],
        latent=latent,
        tokenizers=tuple(_tokenizer(path, parts[encoder], encoder) for encoder, path in tokenizers.items()),
        defaults=_defaults(unet, family, latent.downscale, scheduler, sidecar.get("defaults", {})),
        zero_empty_negative=family.startswith("sdxl") and bool(zeros),
        guidance_embedding_dim=embedding if embedding is not None else 0,
        time_ids=family.startswith("sdxl"),
        scheduler={
            k: v
            for k, v in scheduler.items()
            if isinstance(v, str | int | float | bool | list)
            and v == v
            and abs(v if isinstance(v, float) else 0) < 1e300
        },
    )


def family_of(unet: Mapping[str, Any], encoders: tuple[str, ...]) -> str:
    """sd1, sd2, sdxl or sdxl_refiner, from the UNet's config and the text encoders there are."""
    if "text_encoder_2" in encoders:
        return "sdxl" if "text_encoder" in encoders else "sdxl_refiner"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _latent(vae: Mapping[str, Any], sidecar: Mapping[str, Any]) -> LatentSpec:
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise RequestError(
            "a VAE that normalises each latent channel (latents_mean)", "one scaling factor", "Pass another --vae"
        )
    shift = vae.get("shift_factor")
    return LatentSpec(
        channels=vae["latent_channels"],
        downscale=2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1),
        scaling_factor=vae.get("scaling_factor", 0.18215),
        shift_factor=shift if shift is not None else 0.0,
        rgb_factors=sidecar.get("rgb_factors"),
        rgb_bias=sidecar.get("rgb_bias"),
    )


def _defaults(
    unet: Mapping[str, Any], family: str, downscale: int, scheduler: Mapping[str, Any], said: Mapping[str, Any]
) -> Defaults:
    from edgesd.sampling.schedules import default_sampler

    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    lcm = unet.get("time_cond_proj_dim") is not None
    return Defaults(
        sampler=said.get("sampler", default_sampler(scheduler)),
        steps=said.get("steps", _LCM_STEPS if lcm else 20),
        guidance=said.get("guidance", _LCM_GUIDANCE if lcm else _GUIDANCE.get(family, 7.5)),
        size_px=(height * downscale, width * downscale),
    )


def _tokenizer(folder: Path, encoder: Path, component: str) -> TokenizerSpec:
    from transformers import CLIPTokenizer

    part = tokenizer_of(component)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{part} does not load: {str(error).splitlines()[0][:200]}", "a CLIP tokenizer", "Download the model again"
        ) from None
    positions = read_json(encoder / "config.json").get("max_position_embeddings", 77)
    return TokenizerSpec(
        file=f"{part}/tokenizer.json",
        component=component,  # type: ignore[arg-type]
        max_length=min(tokenizer.model_max_length, positions),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def licence(folder: Path) -> str:
    """The licence named in the model card's front matter, or "unknown"."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:40] if card.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("license:", "licence:"))),
        "unknown",
    )


def hash_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def source_hash(folder: Path, others: Iterable[Path] = ()) -> str:
    """sha256 over the relative names and contents of all that `load` reads: the identity of the weights.

    others: folders of swapped parts; those inside `folder` are covered already.
    """
    whole = hashlib.sha256()
    for tree in (folder, *(other for other in others if not other.is_relative_to(folder))):
        for path in sorted(p for p in tree.rglob("*") if p.suffix in HASHED and p.is_file()):
            whole.update(path.relative_to(tree).as_posix().encode() + b"\0" + bytes.fromhex(hash_file(path)))
    return whole.hexdigest()
