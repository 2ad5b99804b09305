"""What common devices let one app hold, and whether a bundle would fit there: predicted, never measured here.

The table's figures and their sources are in docs/devices.md. A component needs its weights as often as its runtime
holds them while it opens, and the largest tensors of one call beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgesd.errors import RequestError

if TYPE_CHECKING:
    from edgesd.buildplan import BuildPlan, Planned

GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class DeviceClass:
    """ram_bytes: of the device. app_bytes: what one app may hold, about. targets: bundles that run there.

    buffer_bytes: the largest single buffer that every such device promises, None = no promise needed.
    """

    name: str
    ram_bytes: int
    app_bytes: int
    targets: tuple[str, ...]
    accelerator: str
    buffer_bytes: int | None = None


DEVICES = {
    device.name: device
    for device in (
        DeviceClass("iphone-4gb", 4 * GIB, 2 * GIB, ("coreml",), "Neural Engine"),
        DeviceClass("iphone-6gb", 6 * GIB, int(2.8 * GIB), ("coreml",), "Neural Engine, GPU"),
        DeviceClass("iphone-8gb", 8 * GIB, 4 * GIB, ("coreml",), "Neural Engine, GPU"),
        DeviceClass("ipad-8gb", 8 * GIB, 5 * GIB, ("coreml",), "Neural Engine, GPU"),
        DeviceClass("mac-8gb", 8 * GIB, 5 * GIB, ("coreml", "openvino", "onnx-web"), "Neural Engine, GPU"),
        DeviceClass("android-4gb", 4 * GIB, int(1.5 * GIB), ("tflite",), "GPU (OpenCL)"),
        DeviceClass("android-8gb", 8 * GIB, 4 * GIB, ("tflite",), "GPU (OpenCL)"),
        DeviceClass("android-12gb", 12 * GIB, 6 * GIB, ("tflite",), "GPU (OpenCL)"),
        DeviceClass("browser-wasm", 8 * GIB, 4 * GIB, ("onnx-web",), "none"),
        DeviceClass("browser-webgpu", 8 * GIB, 4 * GIB, ("onnx-web",), "WebGPU", buffer_bytes=256 * MIB),
        DeviceClass("laptop-8gb", 8 * GIB, 5 * GIB, ("openvino", "onnx-web"), "integrated GPU"),
        DeviceClass("laptop-16gb", 16 * GIB, 12 * GIB, ("openvino", "onnx-web"), "integrated GPU"),
    )
}
# Copies of a component's weights that its runtime holds at once while it opens: the file and what it is turned into.
COPIES = {"onnx-web": 2.0, "openvino": 1.3, "tflite": 1.2, "coreml": 1.2}
BASE_BYTES = 200 * MIB  # the app, its runtime, tables and tokenizer
TENSORS = 4  # feature maps of full width that live at once around the widest layer


@dataclass(frozen=True)
class Fit:
    """A prediction. how: "all at once", "one component at a time" or "no"; needed_bytes at the best of these."""

    device: str
    how: str
    needed_bytes: int
    limit_bytes: int
    why: str

    def to_json(self) -> dict[str, Any]:
        return {"device": self.device, "fits": self.how, "needed_bytes": self.needed_bytes,
                "limit_bytes": self.limit_bytes, "why": self.why, "predicted": True}  # fmt: skip

    def describe(self) -> str:
        need = f"{self.needed_bytes / GIB:.1f} of {self.limit_bytes / GIB:.1f} GiB"
        verdict = "does not fit" if self.how == "no" else f"fits, {self.how}"
        return f"{self.device} (predicted): {verdict}; {self.why}; {need}"


def find(names: Iterable[str]) -> list[DeviceClass]:
    """The classes of these names. Raises RequestError for one there is not."""
    names = list(names)
    if unknown := [name for name in names if name not in DEVICES]:
        raise RequestError(f"device class {unknown[0]!r}", ", ".join(DEVICES), "docs/devices.md lists them")
    return [DEVICES[name] for name in names]


def predict(device: DeviceClass, plan: BuildPlan) -> Fit:
    """Whether and how the plan's default variants would fit on a device."""
    if plan.recipe.target not in device.targets:
        why = f"it runs {', '.join(device.targets)}, not {plan.recipe.target}"
        return Fit(device.name, "no", 0, device.app_bytes, why)
    held = _held(plan)
    largest = max(held, key=lambda name: held[name].whole)
    together = BASE_BYTES + sum(h.weights for h in held.values()) + max(h.tensors for h in held.values())
    alone = BASE_BYTES + held[largest].whole
    buffer = max(h.largest for h in held.values())
    if device.buffer_bytes is not None and buffer > device.buffer_bytes:
        why = f"one tensor of a call takes {buffer >> 20} MiB, every device promises {device.buffer_bytes >> 20} MiB"
        return Fit(device.name, "no", alone, device.app_bytes, f"{why} (many offer more); a smaller --size-px helps")
    if together <= device.app_bytes:
        return Fit(device.name, "all at once", together, device.app_bytes, "all components stay loaded")
    if alone <= device.app_bytes:
        why = f"{largest} is the largest, the others are let go before it"
        return Fit(device.name, "one component at a time", alone, device.app_bytes, why)
    return Fit(device.name, "no", alone, device.app_bytes, f"{largest} alone takes more; try fp16, --chunks or pruning")


@dataclass(frozen=True)
class _Held:
    """Bytes of one component: weights as its runtime holds them, all tensors of a call, the largest of these."""

    weights: int
    tensors: int
    largest: int

    @property
    def whole(self) -> int:
        return self.weights + self.tensors


def _held(plan: BuildPlan) -> dict[str, _Held]:
    copies = COPIES.get(plan.recipe.target, max(COPIES.values()))
    found: dict[str, _Held] = {}
    for planned in plan.artefacts:
        if planned.component not in found:  # the first variant listed is what opens by default
            found[planned.component] = _Held(int(planned.bytes * copies), *_tensors(plan, planned))
    return found


def _tensors(plan: BuildPlan, planned: Planned) -> tuple[int, int]:
    """(all, largest) tensors of one call around its widest layer, float32: full-size feature maps of a VAE, attention
    scores and feature maps of a UNet. Text encoders have none that count."""
    if planned.component.startswith("text_encoder"):
        return 0, 0
    height, width = planned.axes.size_px
    part = "unet" if planned.component == "unet" else "vae"
    config = json.loads((plan.checkpoint.parts[part] / "config.json").read_text(encoding="utf-8"))
    if part == "vae":
        channels = config.get("block_out_channels") or config["decoder_block_out_channels"]
        one = 4 * channels[0] * height * width
        return TENSORS * one, one
    scale = plan.checkpoint.spec.latent.downscale
    cells = (height // scale) * (width // scale)
    heads, attends = config.get("attention_head_dim", 8), "CrossAttn" in config["down_block_types"][0]
    level = cells if attends else cells // 4  # SDXL attends from half resolution on
    first = heads[0 if attends else 1] if isinstance(heads, list) else heads
    scores = 4 * first * level * level * planned.axes.batch
    maps = 4 * config["block_out_channels"][0] * cells * planned.axes.batch
    return scores + TENSORS * maps, max(scores, maps)
