"""Checkpoints in: a diffusers folder or hub id becomes a `LoadedModel` of float32 modules and plain facts.

Everything a runtime needs (token length, channels, latent scale, prediction type) is read from the checkpoint's
configs here, once, into a `ModelSpec`; no other room guesses.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, RequestError, SetupError
from edgesd.manifest import Defaults, LatentSpec, ModelSpec, TokenizerSpec

if TYPE_CHECKING:
    import torch

EMBEDDED = "shapes"
SIDECAR = "edgesd.json"  # defaults, licence and compression record that diffusers' own configs cannot express
SUPPORTED = "diffusers folders and hub ids of Stable Diffusion 1.x / 2.x with a UNet2DConditionModel"
_MODULES = {"unet", "vae", "text_encoder"}


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory. modules: text_encoder, unet, vae (float32, eval). tokenizers: folder per spec.tokenizers.

    source, revision, sha256, licence: provenance for the manifest; source is an id or folder name, never a path.
    """

    spec: ModelSpec
    modules: dict[str, torch.nn.Module]
    tokenizers: tuple[Path, ...]
    source: str
    revision: str
    sha256: str
    licence: str
    folder: Path = field(compare=False)


def embedded_folder() -> Path:
    """Where the embedded model lies (package data)."""
    return Path(str(resources.files("edgesd.models"))) / EMBEDDED


def load(source: str | None = None, revision: str | None = None) -> LoadedModel:
    """Loads a checkpoint. source: None or "shapes" for the embedded model, a diffusers folder, or a hub id.

    Raises RequestError (not a pipeline, unsupported denoiser), DataError (missing or broken weights), SetupError (hub
    out of reach).
    """
    folder, name, commit = resolve(source, revision)
    check(folder, name)
    modules = {part: _load_module(folder, part) for part in ("text_encoder", "unet", "vae")}
    sidecar = _json(folder / SIDECAR) if (folder / SIDECAR).exists() else {}
    return LoadedModel(
        spec=read_spec(folder, name, sidecar),
        modules=modules,
        tokenizers=(folder / "tokenizer",),
        source=name,
        revision=commit,
        sha256=source_hash(folder),
        licence=str(sidecar.get("licence", _licence(folder))),
        folder=folder,
    )


def resolve(source: str | None, revision: str | None = None) -> tuple[Path, str, str]:
    """(folder, name, revision) of a source; a hub id is downloaded (only what edgesd reads)."""
    if source is None or source == EMBEDDED:
        return embedded_folder(), EMBEDDED, ""
    path = Path(source).expanduser()
    if path.is_dir():
        return path, path.resolve().name, ""
    if path.is_file() and path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise RequestError(
            f"{path.name} is a pickle, which can run code when opened",
            SUPPORTED,
            "Convert it on a machine you trust with diffusers' from_single_file and save_pretrained, then pass that folder",
        )
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")) or "\\" in source:
        raise RequestError(
            f"no model at {source!r}", f"{SUPPORTED}; {EMBEDDED!r} is embedded", "Check the path or id"
        )
    return _download(source, revision)


def _download(source: str, revision: str | None) -> tuple[Path, str, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["model_index.json", "*/config.json", "*.safetensors", "scheduler/*", "tokenizer*/*", "README.md", SIDECAR]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise RequestError(
            f"the hub has no model {source!r}", f"{SUPPORTED}; {EMBEDDED!r} is embedded", "Check the id, or log in"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SetupError(
            f"the model hub cannot be reached for {source!r} ({type(error).__name__})",
            "a reachable hub, a cached model, or a local folder",
            "Check the network, or download the model elsewhere and pass its folder",
        ) from None
    return folder, source, folder.name


def check(folder: Path, name: str) -> None:
    """Refuses what is no Stable Diffusion pipeline, before any weight is read."""
    if not (folder / "model_index.json").exists():
        raise RequestError(f"{name} has no model_index.json, so it is not a diffusers pipeline", SUPPORTED, "Pass the pipeline's top folder")
    index = _json(folder / "model_index.json")
    if "unet" not in index:
        denoiser = next((f"{index[k][-1]} ({k})" for k in ("transformer", "prior") if isinstance(index.get(k), list)), "no UNet")
        raise RequestError(f"{name} is a {index.get('_class_name')} with {denoiser}", SUPPORTED, "Choose a model with a UNet")
    if "text_encoder_2" in index and index["text_encoder_2"] != [None, None]:
        raise RequestError(f"{name} has two text encoders (SDXL)", SUPPORTED, "Use an SD 1.x or 2.x model; SDXL is not supported yet")
    config = _json(folder / "unet" / "config.json")
    if config.get("_class_name") != "UNet2DConditionModel":
        raise RequestError(f"{name} has the denoiser {config.get('_class_name')}", SUPPORTED, "Choose a model with that denoiser")
    for part in sorted(_MODULES):
        if not any((folder / part).glob("*.safetensors")):
            raise DataError(f"{name}/{part} has no .safetensors weights", "safetensors weights for every component",
                            f"Download {part} again; pickled .bin weights are refused, resave them with safe_serialization=True")


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path.parent.name}/{path.name} is missing", "a whole diffusers folder", "Download the model again") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path.parent.name}/{path.name} is not JSON ({error})", "a whole diffusers folder", "Download the model again") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{path.parent.name}/{path.name} holds no object", "a whole diffusers folder", "Download the model again")
    return loaded


def _module_class(folder: Path, part: str) -> Any:
    import diffusers
    import transformers

    config = _json(folder / part / "config.json")
    declared = config.get("_class_name", (config.get("architectures") or ["?"])[0])
    allowed = {
        "unet": {"UNet2DConditionModel": diffusers},
        "vae": {"AutoencoderKL": diffusers, "AutoencoderTiny": diffusers},
        "text_encoder": {"CLIPTextModel": transformers, "CLIPTextModelWithProjection": transformers},
    }[part]
    if declared not in allowed:
        raise RequestError(f"{part} is a {declared}", ", ".join(allowed), "Choose a model with one of these")
    return getattr(allowed[declared], declared)


def _load_module(folder: Path, part: str) -> torch.nn.Module:
    """One component in float32. A missing, extra-shaped or truncated tensor is an error, never a random initialisation."""
    import torch
    from safetensors import SafetensorError

    fix = "Download the model again; if you made it, save it again with save_pretrained"
    kind = _module_class(folder, part)
    options: dict[str, Any] = {"low_cpu_mem_usage": True} if part != "text_encoder" else {}
    try:
        module, info = kind.from_pretrained(
            folder / part, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f"{part} does not load: {reason}", "whole safetensors weights that match config.json", fix) from None
    missing = [k for k in info.get("missing_keys", ()) if not k.endswith("position_ids")]
    wrong = info.get("mismatched_keys") or ()
    if missing or wrong:
        first = sorted(str(k) for k in missing)[0] if missing else str(sorted(map(str, wrong))[0])
        raise DataError(f"{part} lacks {len(missing) + len(wrong)} tensors, the first {first}", "weights that match config.json", fix)
    return module.eval().requires_grad_(False)


def read_spec(folder: Path, name: str, sidecar: dict[str, Any]) -> ModelSpec:
    """The model's facts from its configs. name: the last part of the id, for file names."""
    from edgesd.sampling.schedules import default_sampler

    unet, vae = _json(folder / "unet" / "config.json"), _json(folder / "vae" / "config.json")
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    downscale = 2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1)
    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    defaults = sidecar.get("defaults", {})
    prediction = {"flow_prediction": "flow"}.get(scheduler.get("prediction_type", "epsilon"), scheduler.get("prediction_type", "epsilon"))
    return ModelSpec(
        name=name.split("/")[-1],
        family="sd2" if unet.get("use_linear_projection") else "sd1",
        prediction_type=prediction,
        unet_in_channels=unet["in_channels"],
        latent=LatentSpec(
            channels=vae["latent_channels"],
            downscale=downscale,
            scaling_factor=vae.get("scaling_factor", 0.18215),
            shift_factor=vae.get("shift_factor") if vae.get("shift_factor") is not None else 0.0,
            rgb_factors=sidecar.get("rgb_factors"),
            rgb_bias=sidecar.get("rgb_bias"),
        ),
        tokenizers=(_tokenizer_spec(folder, "tokenizer", "text_encoder"),),
        defaults=Defaults(
            sampler=defaults.get("sampler", default_sampler(scheduler)),
            steps=defaults.get("steps", 20),
            guidance=defaults.get("guidance", 7.5),
            size_px=(height * downscale, width * downscale),
        ),
        guidance_embedding_dim=unet.get("time_cond_proj_dim") if unet.get("time_cond_proj_dim") is not None else 0,
        scheduler={k: v for k, v in scheduler.items() if isinstance(v, str | int | float | bool | list) and v == v and abs(v if isinstance(v, float) else 0) < 1e300},
    )


def _tokenizer_spec(folder: Path, part: str, component: str) -> TokenizerSpec:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / part, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{part} does not load: {str(error).splitlines()[0][:200]}", "a CLIP tokenizer", "Download the model again") from None
    positions = _json(folder / component / "config.json").get("max_position_embeddings", 77)
    return TokenizerSpec(
        file=f"{part}/tokenizer.json",
        component=component,  # type: ignore[arg-type]
        max_length=min(tokenizer.model_max_length, positions),
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def _licence(folder: Path) -> str:
    """The licence named in the model card's front matter, or "unknown"."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:40] if card.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("license:", "licence:"))), "unknown")


def source_hash(folder: Path) -> str:
    """sha256 over the relative names and contents of all that `load` reads: the identity of the weights."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".txt") and p.is_file()):
        whole.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
