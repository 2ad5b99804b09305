"""Checkpoints in: a diffusers folder or hub id becomes a `LoadedModel` of float32 modules and plain facts.

Everything a runtime needs (token length, channels, latent scale, prediction type) is read from the checkpoint's
configs here, once, into a `ModelSpec`; no other room guesses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
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
PARTS = ("text_encoder", "unet", "vae")
_TALKATIVE = ("diffusers", "transformers", "torchao", "torch.utils._pytree", "huggingface_hub")
TINY_VAE = "madebyollin/taesd"  # MIT; for checkpoints whose own VAE is an AutoencoderKL


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its facts and where its parts lie; no weights in memory. Travels between processes.

    source, revision, sha256, licence: provenance for the manifest; source is an id or folder name, never a path.
    parts: folder of text_encoder, unet, vae. tokenizers: folder per spec.tokenizers.
    """

    spec: ModelSpec
    parts: dict[str, Path]
    tokenizers: tuple[Path, ...]
    source: str
    revision: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class LoadedModel(Checkpoint):
    """A checkpoint in memory. modules: by part name, float32, eval, no gradients."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)


def embedded_folder() -> Path:
    """Where the embedded model lies (package data)."""
    return Path(str(resources.files("edgesd.models"))) / EMBEDDED


def load(source: str | None = None, revision: str | None = None, vae: str | None = None) -> LoadedModel:
    """Loads a whole checkpoint: `open_checkpoint`, then every part's weights."""
    return load_parts(open_checkpoint(source, revision, vae))


def open_checkpoint(source: str | None = None, revision: str | None = None, vae: str | None = None) -> Checkpoint:
    """Reads a checkpoint's configs and hashes its files.

    source: None or "shapes" for the embedded model, a diffusers folder, or a hub id.
    vae: None = the checkpoint's own, "full" = its own and it must be AutoencoderKL, "tiny" = its own if it is an
    AutoencoderTiny, else the public tiny VAE of Stable Diffusion, or a folder that holds a VAE.
    Raises RequestError (not a pipeline, unsupported denoiser), DataError (parts missing), SetupError (no hub).
    """
    folder, name, commit = resolve(source, revision)
    check(folder, name)
    sidecar = _json(folder / SIDECAR) if (folder / SIDECAR).exists() else {}
    parts = {"text_encoder": folder / "text_encoder", "unet": folder / "unet", "vae": _vae_folder(folder, vae)}
    with quiet():
        return Checkpoint(
            spec=read_spec(folder, parts["vae"], name, sidecar),
            parts=parts,
            tokenizers=(folder / "tokenizer",),
            source=name,
            revision=commit,
            sha256=source_hash(folder, parts["vae"]),
            licence=str(sidecar.get("licence", _licence(folder))),
        )


def load_parts(checkpoint: Checkpoint, only: Iterable[str] | None = None) -> LoadedModel:
    """The checkpoint with the weights of `only` (all parts if None). Raises DataError for missing or broken weights."""
    chosen = checkpoint.parts if only is None else {part: checkpoint.parts[part] for part in only}
    with quiet():
        modules = {part: _load_module(folder, part) for part, folder in chosen.items()}
    return LoadedModel(**{f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}, modules=modules)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the model libraries' notices and progress bars off the terminal; their errors still come through."""
    import diffusers.utils.logging as diffusers_logging  # importing them sets their loggers' levels, so it comes first
    import transformers.utils.logging as transformers_logging

    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in _TALKATIVE]
    bars = transformers_logging.is_progress_bar_enabled(), diffusers_logging.is_progress_bar_enabled()
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)
        for library, enabled in zip((transformers_logging, diffusers_logging), bars, strict=True):
            if enabled:
                library.enable_progress_bar()


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
            "Convert it where you trust it: diffusers' from_single_file, then save_pretrained; pass that folder",
        )
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")) or "\\" in source:
        raise RequestError(f"no model at {source!r}", f"{SUPPORTED}; {EMBEDDED!r} is embedded", "Check the path or id")
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
        raise RequestError(
            f"{name} has no model_index.json, so it is not a diffusers pipeline",
            SUPPORTED,
            "Pass the pipeline's top folder",
        )
    index = _json(folder / "model_index.json")
    if "unet" not in index:
        denoiser = next(
            (f"{index[k][-1]} ({k})" for k in ("transformer", "prior") if isinstance(index.get(k), list)), "no UNet"
        )
        raise RequestError(
            f"{name} is a {index.get('_class_name')} with {denoiser}", SUPPORTED, "Choose a model with a UNet"
        )
    if "text_encoder_2" in index and index["text_encoder_2"] != [None, None]:
        raise RequestError(
            f"{name} has two text encoders (SDXL)", SUPPORTED, "Use an SD 1.x or 2.x model; SDXL is not supported yet"
        )
    config = _json(folder / "unet" / "config.json")
    if config.get("_class_name") != "UNet2DConditionModel":
        raise RequestError(
            f"{name} has the denoiser {config.get('_class_name')}", SUPPORTED, "Choose a model with that denoiser"
        )
    for part in PARTS:
        if not any((folder / part).glob("*.safetensors")):
            raise DataError(
                f"{name}/{part} has no .safetensors weights",
                "safetensors weights for every component",
                f"Download {part} again; pickled .bin weights are refused, resave them with safe_serialization=True",
            )


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent.name}/{path.name} is missing", "a whole diffusers folder", "Download the model again"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path.parent.name}/{path.name} is not JSON ({error})",
            "a whole diffusers folder",
            "Download the model again",
        ) from None
    if not isinstance(loaded, dict):
        raise DataError(
            f"{path.parent.name}/{path.name} holds no object", "a whole diffusers folder", "Download the model again"
        )
    return loaded


def _vae_folder(folder: Path, vae: str | None) -> Path:
    own = _json(folder / "vae" / "config.json").get("_class_name")
    if vae is None or (vae == "tiny" and own == "AutoencoderTiny") or (vae == "full" and own == "AutoencoderKL"):
        return folder / "vae"
    if vae == "full":
        raise RequestError(
            f"the checkpoint's VAE is an {own}",
            "a full AutoencoderKL for --vae full",
            "Pass a folder that holds one with --vae",
        )
    chosen = resolve(TINY_VAE)[0] if vae == "tiny" else Path(vae)
    if not (chosen / "config.json").exists():
        raise RequestError(
            f"--vae {vae!r} has no config.json", "tiny, full or a folder that holds a VAE", "Check the path"
        )
    latent, want = (
        _json(chosen / "config.json").get("latent_channels", 4),
        _json(folder / "vae" / "config.json").get("latent_channels", 4),
    )
    if latent != want:
        raise RequestError(
            f"--vae {vae!r} has {latent} latent channels", f"{want}, as the UNet's", "Choose a VAE of the same family"
        )
    return chosen


def _module_class(folder: Path, part: str) -> Any:
    import diffusers
    import transformers

    config = _json(folder / "config.json")
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
    """One component in float32. A missing, misshapen or cut tensor is an error, never a random initialisation."""
    import torch
    from safetensors import SafetensorError

    fix = "Download the model again; if you made it, save it again with save_pretrained"
    kind = _module_class(folder, part)
    options: dict[str, Any] = {"low_cpu_mem_usage": True} if part != "text_encoder" else {}
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


def read_spec(folder: Path, vae_folder: Path, name: str, sidecar: dict[str, Any]) -> ModelSpec:
    """The model's facts from its configs. name: the last part of the id, for file names."""
    from edgesd.sampling.schedules import default_sampler

    unet, vae = _json(folder / "unet" / "config.json"), _json(vae_folder / "config.json")
    scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    downscale = 2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1)
    side = unet["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    defaults = sidecar.get("defaults", {})
    prediction = {"flow_prediction": "flow"}.get(
        scheduler.get("prediction_type", "epsilon"), scheduler.get("prediction_type", "epsilon")
    )
    return ModelSpec(
        name=re.sub(r"[^A-Za-z0-9_.+-]", "-", name.split("/")[-1]).lstrip(".-+") or "model",
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
        scheduler={
            k: v
            for k, v in scheduler.items()
            if isinstance(v, str | int | float | bool | list)
            and v == v
            and abs(v if isinstance(v, float) else 0) < 1e300
        },
    )


def _tokenizer_spec(folder: Path, part: str, component: str) -> TokenizerSpec:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / part, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{part} does not load: {str(error).splitlines()[0][:200]}", "a CLIP tokenizer", "Download the model again"
        ) from None
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
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("license:", "licence:"))),
        "unknown",
    )


def source_hash(folder: Path, vae_folder: Path) -> str:
    """sha256 over the relative names and contents of all that `load` reads: the identity of the weights."""
    whole = hashlib.sha256()
    trees = [folder] if vae_folder.is_relative_to(folder) else [folder, vae_folder]
    for tree in trees:
        for path in sorted(p for p in tree.rglob("*") if p.suffix in (".json", ".safetensors", ".txt") and p.is_file()):
            whole.update(path.relative_to(tree).as_posix().encode() + b"\0")
            with path.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
