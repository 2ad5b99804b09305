"""Single .safetensors checkpoints, as model sites give them, become diffusers folders in the cache.

The key mapping is diffusers' own (`from_single_file`); the configs of the families ship with edgesd, so that no hub is
asked. CLIP's vocabulary is not edgesd's to ship: it comes from a tokenizer folder, or from the hub.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from edgesd.errors import DataError, RequestError, SetupError
from edgesd.models.facts import hash_file, read_json, safetensors_header
from edgesd.models.library import hub_folder, quiet

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
UNET = "model.diffusion_model."
VAE = "first_stage_model."
# How each family keeps its text encoders; the first that fits counts.
_TOWERS = {
    "sdxl": "conditioner.embedders.0.transformer.",
    "sdxl_refiner": "conditioner.embedders.0.model.",
    "sd2": "cond_stage_model.model.",
    "sd1": "cond_stage_model.transformer.",
}
_OTHERS = {"double_blocks.": "a FLUX model", "joint_blocks.": "a Stable Diffusion 3 model"}
CLIP_VOCABULARY = "openai/clip-vit-large-patch14"
WORDS = ("vocab.json", "merges.txt", "tokenizer.json")
_LAYOUT = {
    "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>", "model_max_length": 77,
}  # fmt: skip
_LIBRARIES = ("diffusers", "transformers", "torch")
_ALLOWED = "Stable Diffusion 1.x, 2.x or XL in the original key layout"


def family_of(header: Mapping[str, Any], name: str) -> str:
    """sd1, sd2, sdxl or sdxl_refiner, from the names of a file's tensors. Raises RequestError that says what it is."""
    for family, prefix in _TOWERS.items():
        if any(key.startswith(prefix) for key in header) and any(key.startswith(UNET) for key in header):
            return family
    raise RequestError(f"{name} is {_kind(header)}", _ALLOWED, _advice(header))


def _kind(header: Mapping[str, Any]) -> str:
    for mark, kind in _OTHERS.items():
        if any(mark in key for key in header):
            return kind
    if is_lora(header):
        return "a LoRA"
    if any(key.startswith(UNET) for key in header):
        return "a UNet without text encoder"
    return "no whole Stable Diffusion checkpoint"


def is_lora(header: Mapping[str, Any]) -> bool:
    """Whether a file holds what is added to weights rather than weights."""
    return any("lora_" in key or ".lora." in key or "hada_" in key or "lokr_" in key for key in header)


def _advice(header: Mapping[str, Any]) -> str:
    return "Pass it with --lora, beside its base model" if is_lora(header) else "Pass a whole checkpoint"


@cache
def configs(family: str) -> dict[str, Any]:
    """The family's configs by part, as a diffusers folder holds them; `tokenizer` parts name their padding alone."""
    text = (resources.files("edgesd.models") / "configs" / f"{family}.json").read_text(encoding="utf-8")
    return json.loads(text)


def convert(file: Path, tokenizer: str | None = None, prediction: str | None = None) -> Path:
    """The diffusers folder of a single file, made once and kept in the stage cache.

    tokenizer: folder with CLIP's vocabulary (or a pipeline that has one); None takes the folder `tokenizer` beside the
    file, else the hub's. prediction: "epsilon" or
    "v_prediction" where the file's family leaves it open; None = the file's own mark, else the family's usual one.
    Raises RequestError (another family, a LoRA), DataError (broken or incomplete), SetupError (no vocabulary).
    """
    from edgesd.child import in_child
    from edgesd.stages import key

    header = safetensors_header(file)
    family = family_of(header, file.name)
    words = vocabulary(tokenizer, file.parent)
    said = prediction if prediction is not None else ("v_prediction" if "v_pred" in header else None)
    hashes = [hash_file(words / name) for name in WORDS if (words / name).is_file()]
    stage = key(f"single-file-{family.replace('_', '-')}", hash_file(file), hashes, said, libraries=_LIBRARIES)
    return _stages().run(stage, lambda folder: _in(in_child, file, family, words, said, folder))


def _in(run: Any, file: Path, family: str, words: Path, prediction: str | None, folder: Path) -> None:
    label = f"convert {file.name}"
    run(write_folder, file, patched(configs(family), safetensors_header(file), prediction), words, folder, label=label)


@cache
def _stages() -> Any:
    """One object for the whole process: what it handed out stays in place as long as the process lives."""
    from edgesd.stages import Stages

    return Stages()


def patched(family: Mapping[str, Any], header: Mapping[str, Any], prediction: str | None) -> dict[str, Any]:
    """The family's configs with what one file says otherwise: input channels (inpainting), prediction type."""
    first = header.get(f"{UNET}input_blocks.0.0.weight")
    channels = first["shape"][1] if first is not None else family["unet"]["in_channels"]
    scheduler = dict(family["scheduler"])
    scheduler |= {"prediction_type": prediction} if prediction is not None else {}
    scheduler |= {"rescale_betas_zero_snr": True} if "ztsnr" in header else {}
    return {**family, "unet": {**family["unet"], "in_channels": channels}, "scheduler": scheduler}


def vocabulary(tokenizer: str | None, beside: Path) -> Path:
    """A folder with CLIP's vocabulary: `tokenizer`, its folder in a pipeline, `beside`/tokenizer, or the hub's copy."""
    if tokenizer is None:
        if _has_words(beside / "tokenizer"):
            return beside / "tokenizer"
        try:
            return hub_folder(CLIP_VOCABULARY, None, ["vocab.json", "merges.txt"])
        except (SetupError, RequestError):
            raise SetupError(
                "a single file holds no tokenizer, and the hub cannot be reached for CLIP's",
                "a folder with vocab.json and merges.txt, or with tokenizer.json",
                "Pass --tokenizer FOLDER, or put that folder beside the file as `tokenizer`: any Stable Diffusion in"
                " diffusers' layout has one",
            ) from None
    folder = Path(tokenizer).expanduser()
    for place in (folder, folder / "tokenizer"):
        if _has_words(place):
            return place
    raise RequestError(f"no tokenizer in {tokenizer!r}", "a folder with vocab.json and merges.txt, or tokenizer.json",
                       "Check --tokenizer")  # fmt: skip


def _has_words(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in WORDS[:2])


def write_folder(file: Path, parts: Mapping[str, Any], words: Path, folder: Path) -> None:
    """Writes a file as a diffusers folder: `parts` as its configs, `words` as its tokenizers. Weights keep their type.

    Raises DataError where tensors are missing, left over or of another shape.
    """
    import diffusers

    for part, config in parts.items():
        if part == "model_index":
            (folder / "model_index.json").write_text(json.dumps(config, indent=1))
        elif part.startswith("tokenizer"):
            _write_tokenizer(folder / part, words, config["pad_token"])
        else:
            (folder / part).mkdir()
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            (folder / part / name).write_text(json.dumps(config, indent=1))
    header, fix = safetensors_header(file), "Download the file again, or convert it where it was made"
    kind = getattr(diffusers, parts["model_index"]["_class_name"])
    try:
        with quiet():
            pipeline = kind.from_single_file(
                str(file), config=str(folder), local_files_only=True, torch_dtype=_dtype(header)
            )
    except Exception as error:  # diffusers raises whatever its mapping runs into
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise DataError(f"{file.name} does not convert ({reason})", _ALLOWED, fix) from None
    _check_whole(file.name, pipeline, header, fix)
    with quiet():
        for part in (name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in parts):
            getattr(pipeline, part).save_pretrained(folder / part, safe_serialization=True)


def _check_whole(name: str, pipeline: Any, header: Mapping[str, Any], fix: str) -> None:
    """Nothing of a module is missing, and nothing of the file's UNet was left out."""
    for part, module in pipeline.components.items():
        missing = [key for key, p in getattr(module, "named_parameters", dict)() if p.is_meta] if module else []
        if missing:
            raise DataError(f"{name} lacks {len(missing)} tensors of {part}, the first {missing[0]}", _ALLOWED, fix)
    held, used = sum(key.startswith(UNET) for key in header), len(pipeline.unet.state_dict())
    if held != used:
        raise DataError(f"{name} has {held} tensors in its UNet", f"{used}, as its family has", fix)


def _dtype(header: Mapping[str, Any]) -> Any:
    """The type that all weights share; float32 where they differ, float16 for 8-bit floats."""
    import torch

    kinds = {entry["dtype"] for key, entry in header.items() if key.startswith((UNET, VAE, "cond"))} - {"I64", "I32"}
    if kinds == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if all(kind == "F16" or kind.startswith("F8") for kind in kinds) else torch.float32


def _write_tokenizer(folder: Path, words: Path, pad: str) -> None:
    """The vocabulary with the layout of one tokenizer. pad: what fills its prompts, if it is in the vocabulary."""
    folder.mkdir()
    whole = all((words / name).is_file() for name in WORDS[:2])
    for name in WORDS[:2] if whole else WORDS[2:]:
        shutil.copyfile(words / name, folder / name)
    known = read_json(folder / "vocab.json") if whole else read_json(folder / "tokenizer.json")["model"]["vocab"]
    own = words / "tokenizer_config.json"
    layout = _LAYOUT | (read_json(own) if own.is_file() else {})
    layout["pad_token"] = pad if pad in known else layout["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(layout, indent=1))
