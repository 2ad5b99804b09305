"""Who is compared: edgesd's bundles and the tools an engineer would use instead, as data.

A contender is measured by `worker.py` in a process of its own, in edgesd's environment or in that of its peers.
Several may share an artefact (one export, run in float32 and in what the processor is fastest in).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PRUNED = "0.25"
WIDTHS = (1.0, 0.75, 0.5)


@dataclass(frozen=True)
class Artefact:
    """Something to make once. kind: whose `…_make` in worker.py; how: what that reads. peers: in whose environment."""

    kind: str
    how: dict[str, Any]
    peers: bool = False


@dataclass(frozen=True)
class Contender:
    """kind: whose `…_unet`, `…_picture` in worker.py. artefact: a name in ARTEFACTS, "" = the checkpoint itself.

    ours: edgesd's own. peers: runs in the peers' environment. parts: what it can do of unet and picture; without: why
    it cannot do the rest. how: what the worker reads beside the settings.
    """

    kind: str
    about: str
    artefact: str = ""
    ours: bool = False
    peers: bool = False
    how: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("unet", "picture")
    without: str = ""


def _package(target: str, *flags: str) -> Artefact:
    return Artefact("edgesd", {"target": target, "flags": list(flags)})


ARTEFACTS: dict[str, Artefact] = {
    "edgesd-onnx-web-fp32": _package("onnx-web", "--precision", "fp32"),
    "edgesd-onnx-web-int8": _package("onnx-web", "--precision", "int8"),
    "edgesd-openvino-fp16": _package("openvino", "--precision", "fp16"),
    "edgesd-openvino-fp32": _package("openvino", "--precision", "fp32"),
    "edgesd-openvino-tiny": Artefact(
        "edgesd", {"target": "openvino", "flags": ["--precision", "fp16"], "tiny_vae": True}
    ),
    "edgesd-openvino-int8": _package("openvino", "--precision", "int8"),
    "edgesd-openvino-int8-p25": _package("openvino", "--precision", "int8", "--prune", PRUNED),
    "edgesd-openvino-widths": _package(
        "openvino", "--precision", "fp16", "--widths", ",".join(f"{w:g}" for w in WIDTHS)
    ),
    "edgesd-tflite-fp16": _package("tflite", "--precision", "fp16"),
    "edgesd-tflite-int8": _package("tflite", "--precision", "int8"),
    "optimum-fp32": Artefact("optimum", {"weights": "fp32", "hybrid": False}, peers=True),
    "optimum-fp16": Artefact("optimum", {"weights": "fp16", "hybrid": False}, peers=True),
    "optimum-hybrid": Artefact("genai", {"hybrid": True}, peers=True),
    "onnx-plain": Artefact("onnxruntime", {}),
}


def _torch(about: str, dtype: str, channels_last: bool = False, compiled: bool = False) -> Contender:
    return Contender("diffusers", about, how={"dtype": dtype, "channels_last": channels_last, "compile": compiled})


def _openvino(kind: str, about: str, artefact: str, native: bool = True) -> Contender:
    return Contender(kind, about, artefact, peers=True, how={"native": native})


def _edgesd(about: str, artefact: str, native: bool = False, **how: Any) -> Contender:
    target = ARTEFACTS[artefact].how["target"]
    more = {"target": target, "native": native, "one_at_a_time": False, "width": 1.0, **how}
    return Contender("edgesd", about, artefact, ours=True, how=more)


CONTENDERS: dict[str, Contender] = {
    "diffusers-fp32": _torch("diffusers on torch, float32", "float32"),
    "diffusers-bf16": _torch("diffusers on torch, bfloat16", "bfloat16"),
    "diffusers-fp32-nhwc": _torch("diffusers, float32, channels last", "float32", channels_last=True),
    "diffusers-fp32-compile": _torch("diffusers, float32, channels last, torch.compile", "float32", True, True),
    "diffusers-bf16-compile": _torch("diffusers, bfloat16, channels last, torch.compile", "bfloat16", True, True),
    "optimum-f32": _openvino("optimum", "optimum-intel fp32 export, float32 arithmetic", "optimum-fp32", native=False),
    "optimum-native": _openvino("optimum", "optimum-intel fp16 export, its own arithmetic", "optimum-fp16"),
    "optimum-hybrid": _openvino("optimum", "optimum-intel int8 hybrid", "optimum-hybrid"),
    "genai-native": _openvino("genai", "openvino-genai on optimum's fp16 export", "optimum-fp16"),
    "genai-hybrid": _openvino("genai", "openvino-genai on optimum's int8 hybrid", "optimum-hybrid"),
    "onnxruntime": Contender(
        "onnxruntime",
        "onnxruntime on a plain export",
        "onnx-plain",
        parts=("unet",),
        without="the plain export is diffusers' UNet alone, without a pipeline around it",
    ),
    "edgesd-onnx-web-fp32": _edgesd("edgesd onnx-web fp32", "edgesd-onnx-web-fp32"),
    "edgesd-onnx-web-int8": _edgesd("edgesd onnx-web int8", "edgesd-onnx-web-int8"),
    "edgesd-openvino-fp32": _edgesd("edgesd openvino fp32, float32 arithmetic", "edgesd-openvino-fp32"),
    "edgesd-openvino-fp16": _edgesd("edgesd openvino fp16, native arithmetic", "edgesd-openvino-fp16", native=True),
    "edgesd-openvino-tiny": _edgesd("edgesd openvino fp16, tiny VAE", "edgesd-openvino-tiny", native=True),
    "edgesd-openvino-int8": _edgesd("edgesd openvino int8, float32 rest", "edgesd-openvino-int8"),
    "edgesd-openvino-int8-native": _edgesd("edgesd openvino int8, native rest", "edgesd-openvino-int8", native=True),
    "edgesd-openvino-int8-p25": _edgesd(
        "edgesd openvino int8 + 25 % pruned, native rest", "edgesd-openvino-int8-p25", native=True
    ),
    "edgesd-openvino-frugal": _edgesd(
        "edgesd int8 + 25 % pruned, a component at a time", "edgesd-openvino-int8-p25", native=True, one_at_a_time=True
    ),
    "edgesd-tflite-fp16": _edgesd("edgesd tflite fp16 weights", "edgesd-tflite-fp16"),
    "edgesd-tflite-int8": _edgesd("edgesd tflite int8", "edgesd-tflite-int8"),
}

BASE = "diffusers-fp32"  # what ratios are against

# Made anew and timed, next to what the other makes of the same model for the same runtime.
PACKAGED: tuple[tuple[str, str], ...] = (
    ("optimum-fp16", "edgesd-openvino-fp16"),
    ("optimum-hybrid", "edgesd-openvino-int8"),
    ("onnx-plain", "edgesd-onnx-web-fp32"),
)

PROFILED = ("edgesd-openvino-fp16", "edgesd-openvino-int8-native", "edgesd-openvino-int8-p25")
SCALED = ("diffusers-fp32", "edgesd-openvino-fp16", "edgesd-openvino-int8-p25")
WIDE = "edgesd-openvino-widths"  # the contender of the width curve, not one of the others
SCALED_WIDE = _edgesd("edgesd openvino fp16, three widths", WIDE, native=True)
CURVES: dict[str, tuple[Any, ...]] = {
    "size_px": (0.5, 0.75, 1.0),  # of the settings' sides
    "steps": (4, 8, 16),
    "count": (1, 2, 4),
    "width": WIDTHS,
}


def find(name: str) -> Contender:
    """A contender by name, the one of the width curve too."""
    return SCALED_WIDE if name == WIDE else CONTENDERS[name]
