"""LoRA files fused into weights: W + scale * alpha / rank * up @ down (Hu et al. 2021), before anything else is done.

Key styles: kohya's (`lora_unet_…`, `lora_te1_…`, with diffusers' or the original UNet's block names, LoCon's
convolutions and their middle), diffusers' and peft's (`unet.….lora_A.weight`), and diffusers' older ones. Every key
must find its weight: one that does not is an error, never skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgesd.errors import DataError, RequestError
from edgesd.models.facts import hash_file, safetensors_header

if TYPE_CHECKING:
    import torch

MAX_SCALE = 10.0
PARTS = ("unet", "text_encoder", "text_encoder_2")
_FORMS = "kohya's and diffusers' LoRA, LoCon"
# What a key may end in -> what it holds; the rest of the key names the weight.
_ENDINGS = {
    f"{style}{which}": role
    for role, names in {
        "down": ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight",
                 "lora_linear_layer.down.weight"),
        "up": ("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight",
               "lora_linear_layer.up.weight"),
        "mid": ("lora_mid.weight",),
        "alpha": ("alpha",),
    }.items()
    for which in names
    for style in (".", "_")
}  # fmt: skip
_RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_TOP = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2", "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What a file does to one weight: the keys of its tensors by role; alpha as metadata say, None for rank."""

    part: str
    module: str
    keys: Mapping[str, str]
    alpha: float | None


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how strongly it counts; 1 is as it was trained. changes: filled in by `plan`."""

    path: Path
    scale: float
    sha256: str
    changes: tuple[Change, ...] = ()


def read(text: str) -> Lora:
    """ "FILE" or "FILE:scale". Raises RequestError (no file, a scale out of range, a pickle), DataError (broken)."""
    path, scale = Path(text).expanduser(), 1.0
    if not path.exists() and ":" in text:
        name, _, number = text.rpartition(":")
        try:
            path, scale = Path(name).expanduser(), float(number)
        except ValueError:
            raise RequestError(f"--lora {text!r}", "FILE or FILE:scale, as style.safetensors:0.8", "Check it") from None
    check_file(path, "lora")
    if not 0 < abs(scale) <= MAX_SCALE:
        raise RequestError(f"a LoRA scale of {scale:g}", f"-{MAX_SCALE:g} to {MAX_SCALE:g}, not 0", "Change it")
    return Lora(path, scale, hash_file(path))


def check_file(path: Path, flag: str) -> None:
    """Refuses what is no .safetensors file."""
    if not path.is_file():
        raise RequestError(f"--{flag}: no file {str(path)!r}", "a .safetensors file", "Check the path")
    if path.suffix != ".safetensors":
        raise RequestError(
            f"{path.name} may be a pickle, which can run code when opened", "a .safetensors file",
            "Get it as .safetensors, or convert it where you trust it",
        )  # fmt: skip


def plan(lora: Lora, modules: Mapping[str, torch.nn.Module]) -> Lora:
    """The file with all that it changes in a model's parts (on any device, meta too).

    Raises RequestError naming the keys that fit no weight, or the weight whose shape they do not fit.
    """
    header = safetensors_header(lora.path)
    names = _aliases(modules)
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for part, module in modules.items():
        shapes |= {(part, name): tuple(m.weight.shape) for name, m in _weights(module)}
    found: dict[tuple[str, str], dict[str, str]] = {}
    lost = []
    for key in header:
        base, role = _split(key)
        if role is None or base not in names:
            lost.append(key)
        else:
            found.setdefault(names[base], {})[role] = key
    lost += [key for keys in found.values() if not {"down", "up"} <= set(keys) for key in keys.values()]
    if lost or not found:
        shown = ", ".join(lost[:6]) + (f" and {len(lost) - 6} more" if len(lost) > 6 else "")
        came = (
            f"{lora.path.name} changes what the model does not have: {shown}" if lost else f"{lora.path.name} is empty"
        )
        raise RequestError(came, f"{_FORMS} made for this model's family", "Choose a LoRA of the same family")
    alphas = _metadata_alphas(lora.path)
    changes = tuple(Change(*place, keys, alphas(*place)) for place, keys in found.items())
    for change in changes:
        _check_shape(lora.path.name, change, header, shapes[change.part, change.module])
    return replace(lora, changes=changes)


def _check_shape(name: str, change: Change, header: Mapping[str, Any], weight: tuple[int, ...]) -> None:
    up, down = (header[change.keys[role]]["shape"] for role in ("up", "down"))
    kernel = weight[2:] if "mid" in change.keys else ()
    good = bool(up and down) and down[0] > 0 and up[0] == weight[0] and math.prod(up[1:]) == down[0]
    good = good and math.prod(down[1:]) * math.prod(kernel) == math.prod(weight[1:])
    if good and "mid" in change.keys:
        good = tuple(header[change.keys["mid"]]["shape"]) == (down[0], down[0], *kernel)
    if not good:
        raise RequestError(
            f"{name}: {change.keys['up']} {up} and {change.keys['down']} {down} for a weight of {list(weight)}",
            f"{_FORMS} made for this model's family", "Choose a LoRA of the same family",
        )  # fmt: skip


def fuse(lora: Lora, modules: Mapping[str, torch.nn.Module]) -> None:
    """Adds the file's changes to the weights of `modules`, as far as those parts are here."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora.path, framework="pt") as file, torch.no_grad():
            for change in lora.changes:
                if change.part in modules:
                    tensors = {role: file.get_tensor(key).float() for role, key in change.keys.items()}
                    weight = cast("torch.Tensor", modules[change.part].get_submodule(change.module).weight)
                    weight += _delta(tensors, change.alpha, tuple(weight.shape)).to(weight.dtype) * lora.scale
    except (SafetensorError, OSError, RuntimeError) as error:
        came = f"{lora.path.name} does not read ({str(error).splitlines()[0][:160]})"
        raise DataError(came, "a whole .safetensors file", "Download it again") from None


def _delta(tensors: Mapping[str, torch.Tensor], alpha: float | None, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    down, up = tensors["down"], tensors["up"].flatten(1)
    rank = len(down)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else alpha
    if alpha is not None and not math.isfinite(alpha):
        raise RuntimeError("an alpha that is no number")
    if "mid" in tensors:
        made = torch.einsum("or,rskl,si->oikl", up, tensors["mid"], down.flatten(1))
    else:
        made = up @ down.flatten(1)
    return made.reshape(shape) * (1.0 if alpha is None else alpha / rank)


def _split(key: str) -> tuple[str, str | None]:
    """(name of the weight, what of it the key holds); None for an ending that edgesd does not know."""
    for ending, role in _ENDINGS.items():
        if key.endswith(ending):
            base = key[: -len(ending)].replace(".processor.", ".")
            return (f"{base}.0" if base.endswith(".to_out") else base), role
    return key, None


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers whose weight is a matrix or a kernel."""
    for name, layer in module.named_modules():
        if getattr(layer, "weight", None) is not None and layer.weight.ndim in (2, 4):
            yield name, layer


def _aliases(modules: Mapping[str, torch.nn.Module]) -> dict[str, tuple[str, str]]:
    """Every name that a LoRA file may give a layer -> (part, the layer's name in its module)."""
    made: dict[str, tuple[str, str]] = {}
    for part, module in modules.items():
        for name, _ in _weights(module):
            made |= dict.fromkeys(
                _unet_names(name, module) if part == "unet" else _text_names(part, name), (part, name)
            )
    return made


def _text_names(part: str, name: str) -> Iterator[str]:
    bare = name.removeprefix("text_model.")  # some versions of transformers wrap the tower, some do not
    whole = bare if bare == "text_projection" else f"text_model.{bare}"
    for prefix in {"text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}[part]:
        yield f"{prefix}_{whole.replace('.', '_')}"
    yield f"{part}.{whole}"


def _unet_names(name: str, unet: Any) -> Iterator[str]:
    flat = name.replace(".", "_")
    yield from (f"lora_unet_{flat}", f"unet.{name}", name)
    if (old := original_name(name, unet)) is not None:
        yield f"lora_unet_{old}"


def original_name(name: str, unet: Any) -> str | None:
    """A UNet layer's name in the original layout, dots as underscores; None for one it does not have."""
    if name in _TOP:
        return _TOP[name]
    head, *rest = name.split(".")
    per = unet.config.layers_per_block + 1
    if head == "mid_block":
        kind, index, *inner = rest
        place = f"middle_block_{1 if kind == 'attentions' else 2 * int(index)}"
    elif head in ("down_blocks", "up_blocks"):
        block, kind, index, *inner = rest
        down, at = head == "down_blocks", int(block) * per + int(index)
        if kind == "downsamplers":
            return f"input_blocks_{(int(block) + 1) * per}_0_op"
        if kind == "upsamplers":
            attends = hasattr(unet.up_blocks[int(block)], "attentions")
            return f"output_blocks_{int(block) * per + per - 1}_{1 + attends}_conv"
        place = f"{'input' if down else 'output'}_blocks_{at + down}_{int(kind == 'attentions')}"
    else:
        return None
    if kind == "attentions":
        return "_".join([place, *inner])
    return f"{place}_{_RESNET[inner[0]]}" if inner and inner[0] in _RESNET else None


def _metadata_alphas(path: Path) -> Any:
    """(part, layer) -> alpha, from what peft notes beside the weights; None where it notes nothing."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    try:
        noted = json.loads(header.get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
        noted = noted if isinstance(noted, dict) else {}
    except (ValueError, AttributeError, TypeError):
        noted = {}

    def alpha(part: str, layer: str) -> float | None:
        special = noted.get(f"{part}.alpha_pattern")
        found = special.get(layer) if isinstance(special, dict) else None
        found = noted.get(f"{part}.lora_alpha") if found is None else found
        return float(found) if isinstance(found, int | float) else None

    return alpha
