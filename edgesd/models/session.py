"""The torch session: a loaded checkpoint behind the runtime's protocol, and the truth that bundles are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgesd.errors import RequestError
from edgesd.manifest import ModelSpec
from edgesd.runtime.session import Arrays, no_width

if TYPE_CHECKING:
    import torch

    from edgesd.models.load import Checkpoint, LoadedModel

# Component -> the part of a checkpoint that it is made from, in the order of a run.
PART_OF = {
    "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "unet": "unet", "vae_decoder": "vae",
    "vae_encoder": "vae",
}  # fmt: skip


class TorchSession:
    """Runs diffusers' own modules with scaled-dot-product attention, any batch, on CPU or an accelerator.

    dtype: "float32" (the reference) or "bfloat16" (faster where the processor has it, about 40 dB off).
    Inputs and outputs are float32 numpy arrays whatever the dtype, named as in `edgesd.runtime.session`.
    narrow: what makes the UNets of widths below 1 (edgesd/compress/widths.py), each when it is first asked for.
    """

    def __init__(
        self, model: LoadedModel, dtype: str = "float32", device: str = "cpu",
        narrow: Mapping[float, Callable[[], torch.nn.Module]] | None = None,
    ) -> None:  # fmt: skip
        import torch

        from edgesd.models.load import quiet

        if dtype not in ("float32", "bfloat16"):
            raise RequestError(f"dtype {dtype!r}", "float32, bfloat16", "Choose one of these")
        self._dtype, self._device = getattr(torch, dtype), device
        with quiet():
            self._modules = {k: m.to(device, self._dtype) for k, m in model.modules.items()}
        self._forward = forward(model.spec)
        self._narrow = dict(narrow) if narrow is not None else {}
        self._unets = {1.0: self._placed(self._modules["unet"])} if "unet" in self._modules else {}

    def _placed(self, unet: torch.nn.Module) -> torch.nn.Module:
        """Convolutions run in oneDNN's own layout; channels-last spares the reorders between them."""
        import torch

        return unet.to(self._device, self._dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def has(self, component: str) -> bool:
        return component in ("vae_decoder", "vae_encoder") or component in self._modules

    def load(self, component: str) -> None:
        self._require(component)

    def unload(self, component: str) -> None:
        """Keeps the weights: this session shares them with the loaded model."""
        self._require(component)

    def batches(self, component: str) -> tuple[int, ...] | None:
        """None: any number of rows a call."""
        self._require(component)
        return None

    def widths(self, component: str) -> tuple[float, ...]:
        self._require(component)
        return (1.0, *sorted(self._narrow, reverse=True)) if component == "unet" else (1.0,)

    def use_width(self, component: str, width: float) -> None:
        if width not in self.widths(component):
            raise no_width(component, width, self.widths(component))
        if component == "unet":
            if width not in self._unets:
                self._unets[width] = self._placed(self._narrow[width]())
            self._modules["unet"] = self._unets[width]

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]:
        import torch

        self._require(component)
        with torch.inference_mode():
            tensors = {k: self._tensor(v) for k, v in inputs.items()}
            try:
                outputs = self._forward[component](self._modules, tensors)
            except KeyError as error:
                raise RequestError(
                    f"{component} was called without {error}", "the inputs its docstring names", "Pass it"
                ) from None
        return {k: v.float().cpu().numpy() for k, v in outputs.items()}

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor.long()

    def _require(self, component: str) -> None:
        if not self.has(component):
            raise RequestError(f"component {component!r}", ", ".join(FORWARD), "Choose one of these")


class PartsSession:
    """The reference of a checkpoint on disk with one of its parts in memory at a time; that of the last call stays.

    For machines that hold the UNet and not all of the model (`edgesd package --max-ram`).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._part = checkpoint, ""
        self._session: TorchSession | None = None

    def has(self, component: str) -> bool:
        return PART_OF.get(component) in self._checkpoint.parts

    def load(self, component: str) -> None:
        self._opened(component)

    def unload(self, component: str) -> None:
        if self._part == PART_OF.get(component):
            self._part, self._session = "", None

    def batches(self, component: str) -> tuple[int, ...] | None:
        """None: any number of rows a call."""
        return None

    def widths(self, component: str) -> tuple[float, ...]:
        return (1.0,)

    def use_width(self, component: str, width: float) -> None:
        if width != 1.0:
            raise no_width(component, width, (1.0,))

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]:
        return self._opened(component).run(component, inputs)

    def _opened(self, component: str) -> TorchSession:
        from edgesd.models.load import load_parts

        if not self.has(component):
            raise RequestError(f"component {component!r}", ", ".join(FORWARD), "Choose one of these")
        part = PART_OF[component]
        if self._session is None or part != self._part:
            self._part, self._session = part, None  # let go before the next is read
            self._session = TorchSession(load_parts(self._checkpoint, [part]))
        return self._session


Tensors = dict[str, "torch.Tensor"]


def _text_encoder(part: str, skipped: int, normed: bool, modules: dict, x: Tensors) -> Tensors:
    """States after all layers but the last `skipped`, with the final norm or without; the pooled text if there is."""
    model = modules[part]
    made = model(x["input_ids"], output_hidden_states=skipped > 0 or not normed)
    states = made.last_hidden_state
    if skipped > 0 or not normed:
        states = made.hidden_states[-1 - skipped]
        states = getattr(model, "text_model", model).final_layer_norm(states) if normed else states
    pooled = getattr(made, "text_embeds", None)
    return {"encoder_hidden_states": states} | ({} if pooled is None else {"text_embeds": pooled})


def _unet(modules: dict, x: Tensors) -> Tensors:
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x} or None
    sample = modules["unet"](
        x["sample"],
        x["timestep"].expand(len(x["sample"])),
        x["encoder_hidden_states"],
        timestep_cond=x.get("timestep_cond"),
        added_cond_kwargs=added,
    ).sample
    return {"model_output": sample}


def _vae_decoder(modules: dict, x: Tensors) -> Tensors:
    return {"image": modules["vae"].decode(x["latents"]).sample}


def _vae_encoder(modules: dict, x: Tensors) -> Tensors:
    encoded = modules["vae"].encode(x["image"])
    if hasattr(encoded, "latents"):
        return {"mean": encoded.latents}
    return {"mean": encoded.latent_dist.mean, "std": encoded.latent_dist.std}


def forward(spec: ModelSpec | None = None) -> dict[str, Callable[[dict, Tensors], Tensors]]:
    """What each component computes, from modules by part name and tensors by input name.

    SDXL's UNet attends to the penultimate layer without the final norm, SD's to the last with it; `clip_skip` counts
    from there, as in diffusers. spec: None stands for SD 1.x as it is.
    """
    sdxl, skip = (spec.family.startswith("sdxl"), spec.clip_skip) if spec is not None else (False, 0)
    text = {part: partial(_text_encoder, part, skip + sdxl, not sdxl) for part in ("text_encoder", "text_encoder_2")}
    return text | {"unet": _unet, "vae_decoder": _vae_decoder, "vae_encoder": _vae_encoder}


FORWARD = forward()
