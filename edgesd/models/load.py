"""Checkpoints in: a diffusers folder or hub id becomes a `LoadedModel` of float32 modules and plain facts.

Everything a runtime needs (token length, channels, latent scale, prediction type) is read from the checkpoint's
configs here, once, into a `ModelSpec`; no other room guesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, RequestError
from edgesd.manifest import Ingredient, ModelSpec
from edgesd.models import ingredients
from edgesd.models.facts import hash_file, licence, read_json, read_spec, source_hash, text_encoders, tokenizer_of
from edgesd.models.library import hub_folder, quiet
from edgesd.models.weights import SIDECAR, load_module, read_sidecar

if TYPE_CHECKING:
    import torch

    from edgesd.models.embedding import Embedding
    from edgesd.models.lora import Lora

EMBEDDED = "shapes"
STUDENT = "shapes-lcm"  # the embedded model for four steps: a LoRA on it, with settings of its own
SUPPORTED = "diffusers folders, .safetensors files and hub ids of Stable Diffusion 1.x, 2.x and XL"
WANTED = ["model_index.json", "*/config.json", "*.safetensors", "scheduler/*", "tokenizer*/*", "README.md", SIDECAR]
# Public tiny VAEs (MIT) for checkpoints whose own VAE is an AutoencoderKL, by the family's latents.
TINY_VAE = {"sd": "madebyollin/taesd", "sdxl": "madebyollin/taesdxl"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its facts and where its parts lie; no weights in memory. Travels between processes.

    source, revision, sha256, licence: provenance for the manifest; source is an id or folder name, never a path.
    parts: folder of text_encoder, text_encoder_2, unet, vae, as far as the model has them. tokenizers: folder per
    spec.tokenizers. loras, embeddings: what `load_parts` adds. ingredients: the record of all that was added.
    finished: parts that hold all of it already.
    """

    spec: ModelSpec
    parts: dict[str, Path]
    tokenizers: tuple[Path, ...]
    source: str
    revision: str
    sha256: str
    licence: str
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    ingredients: tuple[Ingredient, ...] = ()
    finished: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedModel(Checkpoint):
    """A checkpoint in memory. modules: by part name, float32, eval, no gradients."""

    modules: dict[str, torch.nn.Module] = field(default_factory=dict)


def embedded_folder(name: str = EMBEDDED) -> Path:
    """Where the embedded model, or what makes its student, lies (package data)."""
    return Path(str(resources.files("edgesd.models"))) / name


def load(source: str | None = None, revision: str | None = None, vae: str | None = None, **changes: Any) -> LoadedModel:
    """Loads a whole checkpoint: `open_checkpoint`, then every part's weights."""
    return load_parts(open_checkpoint(source, revision, vae, **changes))


def open_checkpoint(
    source: str | None = None,
    revision: str | None = None,
    vae: str | None = None,
    *,
    unet: str | None = None,
    text_encoder: str | None = None,
    tokenizer: str | None = None,
    prediction: str | None = None,
    **added: Any,
) -> Checkpoint:
    """Reads a checkpoint's configs and hashes its files.

    source: None or "shapes" for the embedded model, "shapes-lcm" for its student of four steps, a diffusers folder, a
    .safetensors file, or a hub id.
    vae: None = the checkpoint's own, "full" = its own and it must be AutoencoderKL, "tiny" = its own if it is an
    AutoencoderTiny, else the public tiny VAE of its family, or a folder that holds a VAE.
    unet, text_encoder: folders that hold another one, or pipelines with one. tokenizer, prediction: for a single file
    (see `single_file.convert`); a folder says both itself. added: lora, embedding, clip_skip and chunks, see
    `ingredients.add`.
    Raises RequestError (not a pipeline, unsupported denoiser), DataError (parts missing), SetupError (no hub).
    """
    folder, name, commit = resolve(source, revision, tokenizer, prediction)
    encoders = text_encoders(check(folder, name))
    sidecar = read_sidecar(folder)
    if source == STUDENT:
        sidecar |= read_sidecar(embedded_folder(STUDENT))
        added["lora"] = [str(embedded_folder(STUDENT) / f"{STUDENT}.safetensors"), *(added.get("lora") or ())]
    parts = {part: folder / part for part in (*encoders, "unet")}
    swaps = {"unet": unet, "text_encoder": text_encoder}
    parts |= {part: swapped(part, path) for part, path in swaps.items() if path is not None}
    parts["vae"] = _vae_folder(folder, vae, "sdxl" if "text_encoder_2" in encoders else "sd")
    _check_parts(name, parts)
    tokenizers = {encoder: folder / tokenizer_of(encoder) for encoder in encoders}
    with quiet():
        spec = read_spec(folder, parts, tokenizers, name, sidecar)
    opened = Checkpoint(
        spec=spec,
        parts=parts,
        tokenizers=tuple(tokenizers.values()),
        source=name,
        revision=commit,
        sha256=source_hash(folder, parts.values()),
        licence=str(sidecar.get("licence", licence(folder))),
        ingredients=_record(source, folder, parts),
    )
    with quiet():
        return ingredients.add(opened, **added)


def _record(source: str | None, folder: Path, parts: Mapping[str, Path]) -> tuple[Ingredient, ...]:
    file = Path(source).expanduser() if source is not None else None
    made = [ingredients.swapped(part, place) for part, place in parts.items() if place != folder / part]
    if file is not None and file.is_file():
        made.insert(0, Ingredient(kind="checkpoint", name=file.name, sha256=hash_file(file)))
    return tuple(made)


def load_parts(checkpoint: Checkpoint, only: Iterable[str] | None = None) -> LoadedModel:
    """The checkpoint with the weights of `only` (all parts if None). Raises DataError for missing or broken weights."""
    chosen = checkpoint.parts if only is None else {part: checkpoint.parts[part] for part in only}
    with quiet():
        loaded = {part: load_module(folder, part) for part, folder in chosen.items()}
        raw = {part: module for part, module in loaded.items() if part not in checkpoint.finished}
        modules = loaded | ingredients.apply(checkpoint, raw)
    return LoadedModel(**{f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}, modules=modules)


def resolve(
    source: str | None, revision: str | None = None, tokenizer: str | None = None, prediction: str | None = None
) -> tuple[Path, str, str]:
    """(folder, name, revision) of a source; a hub id is downloaded (only what edgesd reads), a file converted."""
    if source is None or source in (EMBEDDED, STUDENT):
        return embedded_folder(), STUDENT if source == STUDENT else EMBEDDED, ""
    path = Path(source).expanduser()
    if path.is_dir():
        return path, path.resolve().name, ""
    if path.is_file() and path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise RequestError(
            f"{path.name} is a pickle, which can run code when opened",
            SUPPORTED,
            "Convert it where you trust it: diffusers' from_single_file, then save_pretrained; pass that folder",
        )
    if path.is_file() and path.suffix == ".safetensors":
        from edgesd.models.single_file import convert

        return convert(path, tokenizer, prediction), path.stem, ""
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")) or "\\" in source:
        raise RequestError(
            f"no model at {source!r}", f"{SUPPORTED}; {EMBEDDED} and {STUDENT} are embedded", "Check the path or id"
        )
    folder = hub_folder(source, revision, WANTED)
    return folder, source, folder.name


def check(folder: Path, name: str) -> dict:
    """The model_index.json of a Stable Diffusion pipeline; refuses what is none, before any weight is read."""
    if not (folder / "model_index.json").exists():
        raise RequestError(
            f"{name} has no model_index.json, so it is not a diffusers pipeline",
            SUPPORTED,
            "Pass the pipeline's top folder",
        )
    index = read_json(folder / "model_index.json")
    if "unet" not in index:
        denoiser = next(
            (f"{index[k][-1]} ({k})" for k in ("transformer", "prior") if isinstance(index.get(k), list)), "no UNet"
        )
        raise RequestError(
            f"{name} is a {index.get('_class_name')} with {denoiser}", SUPPORTED, "Choose a model with a UNet"
        )
    if not text_encoders(index):
        raise RequestError(f"{name} has no text encoder", SUPPORTED, "Choose a model with one")
    return index


def _check_parts(name: str, parts: Mapping[str, Path]) -> None:
    declared = read_json(parts["unet"] / "config.json").get("_class_name")
    if declared != "UNet2DConditionModel":
        raise RequestError(f"{name} has the denoiser {declared}", SUPPORTED, "Choose a model with that denoiser")
    for part, folder in parts.items():
        if not any(folder.glob("*.safetensors")):
            raise DataError(
                f"{name}/{part} has no .safetensors weights",
                "safetensors weights for every component",
                f"Download {part} again; pickled .bin weights are refused, resave them with safe_serialization=True",
            )


def swapped(part: str, path: str) -> Path:
    """The folder of a part that replaces the checkpoint's own: `path` itself, or `path`/part of a pipeline."""
    folder = Path(path).expanduser()
    for candidate in (folder / part, folder):
        if (candidate / "config.json").is_file():
            return candidate
    flag = part.replace("_", "-")
    raise RequestError(
        f"--{flag} {path!r} has no config.json", f"a folder that holds a {part} of diffusers' layout", "Check the path"
    )


def _vae_folder(folder: Path, vae: str | None, family: str) -> Path:
    own = read_json(folder / "vae" / "config.json").get("_class_name")
    if vae is None or (vae == "tiny" and own == "AutoencoderTiny") or (vae == "full" and own == "AutoencoderKL"):
        return folder / "vae"
    if vae == "full":
        raise RequestError(
            f"the checkpoint's VAE is an {own}",
            "a full AutoencoderKL for --vae full",
            "Pass a folder that holds one with --vae",
        )
    chosen = resolve(TINY_VAE[family])[0] if vae == "tiny" else swapped("vae", vae)
    latent, want = (
        read_json(chosen / "config.json").get("latent_channels", 4),
        read_json(folder / "vae" / "config.json").get("latent_channels", 4),
    )
    if latent != want:
        raise RequestError(
            f"--vae {vae!r} has {latent} latent channels", f"{want}, as the UNet's", "Choose a VAE of the same family"
        )
    return chosen
