"""From recorded calls to a plan: smooth, observe, choose, correct, rank, and step back until the gate holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch

from edgesd.compress.calls import Batch
from edgesd.compress.inherit import Start
from edgesd.compress.layouts import raised_channels
from edgesd.compress.observe import Grids, choose, extents
from edgesd.compress.quantize import adjusted, quantizable, quantized
from edgesd.compress.quantplan import OWN_INTEGERS, OWN_SCALES, LayerPlan, Mode, QuantPlan
from edgesd.compress.sensitivity import Progress, Truth, hold, rank
from edgesd.compress.smooth import smooth
from edgesd.models.count import count
from edgesd.models.modules import Component

# Layers that int8 activations hurt most for the least gain, by NVIDIA's and Q-Diffusion's experience and ours: the path
# of time, mixed skip connections, keys and values of the text. They keep int8 weights.
CAUTIOUS: dict[str, tuple[str, ...]] = {
    "unet": ("*time_emb*", "*add_embedding*", "*conv_shortcut", "*attn2.to_k", "*attn2.to_v"),
    "vae_decoder": ("*conv_shortcut",),
    "vae_encoder": ("*conv_shortcut",),
    "text_encoder_2": ("text_projection",),
}
# The first and the last convolution are next to nothing in size; late in a run an error of theirs is the picture's.
ENDS = {
    "unet": ("*conv_in", "*conv_out"),
    "vae_decoder": ("*conv_in", "*conv_out", "post_quant_conv", "decoder.layers.0"),
    "vae_encoder": ("*conv_in", "*conv_out", "quant_conv", "encoder.layers.0"),
}
RANK_ROWS, RANK_MACS = 8, 1e12  # what one look at a layer's sensitivity may cost: rows of calls, MACs
RANK_PX = 128  # of a VAE's picture: of a larger one a corner, or its backward passes take tens of GB and of minutes


@dataclass(frozen=True, eq=False)
class Quantized:
    """What a component's quantization came to. tensors: smoothed weights, corrected biases and the integers that layers
    were given, by path (`adjusted`).

    levels: dB of the simulated plan by noise level.
    """

    plan: QuantPlan
    tensors: dict[str, torch.Tensor]
    levels: dict[int, float]


def quantize(
    component: Component,
    batches: Sequence[Batch],
    precision: Literal["int8", "hybrid", "w8"],
    *,
    source_sha256: str,
    calibration: str,
    gate_db: float | None = None,
    smoothing: bool = True,
    start: Start | None = None,
    kept: Collection[str] = (),
    progress: Progress = lambda stage, done, total: None,
) -> Quantized:
    """Plans a component on recorded calls. gate_db: what one step must reach at every noise level; None: no gate.

    start: another plan's smoothing and integers (`inherit.from_widest`) in place of its own. kept: layers whose columns
    smoothing leaves alone. Raises DataError (activations that are not finite: names layer and step),
    GateError (a gate out of reach).
    """
    truth = Truth.of(component, batches)
    seen = extents(component, batches)
    if start is None:
        start = Start(*smooth(component, batches, seen, kept)) if smoothing and precision != "w8" else Start()
    smoothed = adjusted(component, start.tensors)
    if start.tensors:
        seen = extents(smoothed, batches)
    progress("ranges", 0, 1)
    grids = choose(smoothed, batches, seen, list(seen))
    plan = QuantPlan(
        component=component.name, precision=precision, source_sha256=source_sha256, calibration=calibration,
        layers=_layers(smoothed, grids, precision, start.modes),
    )  # fmt: skip

    def build(candidate: QuantPlan) -> Component:
        return quantized(adjusted(smoothed, _biases(smoothed, candidate, grids)), candidate, "simulated")

    ranked = rank(smoothed, plan, Truth.of(component, _few(component, batches)), progress)
    plan = plan.model_copy(update={"sensitivities": ranked})
    if gate_db is None:
        levels = truth.snr_db(build(plan))
    else:
        plan, levels = hold(plan, build, truth, gate_db)
    plan = plan.model_copy(update={"snr_db": round(min(levels.values()), 2), "strengths": start.strengths})
    tensors = start.tensors | _biases(smoothed, plan, grids)
    unused = {f"{x.name}.{own}" for x in plan.layers if x.mode == "float" for own in (OWN_INTEGERS, OWN_SCALES)}
    return Quantized(plan, {path: tensor for path, tensor in tensors.items() if path not in unused}, levels)


def _layers(
    component: Component, grids: Mapping[str, Grids], precision: str, given: Mapping[str, Mode]
) -> tuple[LayerPlan, ...]:
    macs = count(component.module, component.example).by_module
    kinds = quantizable(component.module)
    made = []
    for name, chosen in grids.items():
        layer = component.module.get_submodule(name)
        mode, why = _mode(component.name, name, kinds[name], precision)
        if (first := given.get(name, mode)) != mode:
            mode, why = first, f"{first} at the widest"
        made.append(
            LayerPlan(
                name=name, kind=kinds[name], mode=mode, why=why if why else f"range by {chosen.method}",
                input=chosen.input, output=chosen.output, macs=macs.get(name, 0),
                params=sum(p.numel() for p in layer.parameters()),
                raised=raised_channels(layer, chosen.input.scale),
            )
        )  # fmt: skip
    return tuple(made)


def _mode(component: str, name: str, kind: str, precision: str) -> tuple[Mode, str]:
    if any(fnmatchcase(name, pattern) for pattern in ENDS.get(component, ())):
        return "float", "an end of the network: small, and exact for it"
    if any(fnmatchcase(name, pattern) for pattern in CAUTIOUS.get(component, ())):
        return "w8", "cautious: int8 activations cost much here"
    if precision == "w8":
        return "w8", "weights only"
    return ("w8", "hybrid: linears by weight only") if precision == "hybrid" and kind == "linear" else ("int8", "")


def _biases(component: Component, plan: QuantPlan, grids: Mapping[str, Grids]) -> dict[str, torch.Tensor]:
    """Biases that make good each quantized layer's mean output error (Nagel et al. 2019), where there is a bias."""
    made = {}
    for layer in plan.layers:
        bias = component.module.get_submodule(layer.name).bias
        if layer.mode != "float" and isinstance(bias, torch.Tensor):
            shift = grids[layer.name].shift if layer.mode == "int8" else grids[layer.name].weight_shift
            made[f"{layer.name}.bias"] = bias.detach() + shift
    return made


def _few(component: Component, batches: Sequence[Batch]) -> list[Batch]:
    """Rows from the whole span of timesteps, both ends among them, as many as a look at each layer may cost.

    8, of a large model's large pictures 2. Of a VAE's large pictures a corner.
    """
    side = None
    if component.name.startswith("vae"):
        side = RANK_PX // max(1, component.outputs[0].shape[-1] // component.inputs[0].shape[-1])
    each = count(component.module, component.example).macs
    wanted = max(2, min(RANK_ROWS, int(RANK_MACS / max(each, 1))))
    rows = [
        (float(time), lot, row)
        for lot, batch in enumerate(batches)
        for row, time in enumerate(batch.inputs.get("timestep", torch.zeros(_length(batch))).tolist())
    ]
    rows.sort()
    chosen = {rows[round(i * (len(rows) - 1) / (wanted - 1))][1:] for i in range(wanted)}
    kept = {lot: [row for at, row in sorted(chosen) if at == lot] for lot, _ in sorted(chosen)}
    return [
        batches[lot].with_inputs(
            {k: x[rows] if side is None else x[rows][..., :side, :side] for k, x in batches[lot].inputs.items()}
        )
        for lot, rows in kept.items()
    ]


def _length(batch: Batch) -> int:
    return len(next(iter(batch.inputs.values())))
