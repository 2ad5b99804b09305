"""Static int8 as a plan: one set of scales for every target.

Weights: int8, symmetric, one scale per output channel. Activations: int8 per tensor, static, with a zero point. Norms,
activations, softmax and attention's products stay float. A plan says for each convolution and linear layer whether it
computes in int8 (`int8`), only stores its weight so (`w8`) or stays as it is (`float`), and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError, model_validator

from edgesd.compress.frozen import Frozen, unreadable
from edgesd.manifest import Downgrade

if TYPE_CHECKING:
    from edgesd.targets import Capabilities

LOW, HIGH = -128, 127  # activations
# Buffers of a layer that brings its integers, as a narrow width's does (edgesd/compress/inherit.py).
OWN_INTEGERS, OWN_SCALES = "weight_int8", "weight_scale"
QUANTIZED = ("int8", "hybrid", "w8")  # precisions that come with a plan
Mode = Literal["int8", "w8", "float"]
Kind = Literal["conv", "linear"]


class Scale(Frozen):
    """A tensor's int8 grid: real = scale * (integer - zero_point), integers -128..127."""

    scale: float = Field(gt=0)
    zero_point: int = Field(ge=LOW, le=HIGH)


class LayerPlan(Frozen):
    """One convolution or linear layer. name: its path within `Component.module` as `build` makes it.

    mode: what is done with it; why: the reason, for people. input, output: grids of its activations; an int8 layer has
    both, whether a target uses the second is its own affair. macs: of one call; params: weight and bias.
    raised: output channels whose weight scale grew so that the bias fits an int32.
    """

    name: str
    kind: Kind
    mode: Mode
    why: str
    input: Scale | None = None
    output: Scale | None = None
    macs: int = Field(default=0, ge=0)
    params: int = Field(default=0, ge=0)
    raised: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> LayerPlan:
        if self.mode == "int8" and (self.input is None or self.output is None):
            raise ValueError(f"{self.name} is int8 without scales")
        return self


class Sensitivity(Frozen):
    """What one step's output loses when only this layer is quantized, in dB against float (higher is better)."""

    name: str
    snr_db: float


class QuantPlan(Frozen):
    """How a component is quantized. layers: every convolution and linear, in order of execution.

    precision: what was asked for. source_sha256: of the checkpoint; calibration: what the ranges were seen on.
    sensitivities: the worst first. snr_db: of the simulated plan against float on calls, at the worst noise level.
    latents_snr_db: of finished latents, a UNet's. strengths: of smoothing, by source; 0 where it did not help.
    """

    component: str
    precision: Literal["int8", "hybrid", "w8"]
    source_sha256: str
    calibration: str
    layers: tuple[LayerPlan, ...]
    sensitivities: tuple[Sensitivity, ...] = ()
    snr_db: float | None = None
    latents_snr_db: float | None = None
    strengths: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _distinct(self) -> QuantPlan:
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise ValueError("a layer is planned twice")
        return self

    @classmethod
    def parse(cls, data: str | bytes) -> QuantPlan:
        """From JSON, which may come from anywhere. Raises DataError."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise unreadable(error, "quantization plan", "package", "Package the model again") from None

    def share_int8(self) -> float:
        """The share of MACs of convolutions and linears that the plan computes in int8, 0..1."""
        return self.shares()["int8"]

    def shares(self) -> dict[str, float]:
        """Mode -> its share of the MACs of convolutions and linears."""
        whole = max(sum(layer.macs for layer in self.layers), 1)
        modes = ("int8", "w8", "float")
        return {mode: sum(layer.macs for layer in self.layers if layer.mode == mode) / whole for mode in modes}

    def weight_bytes(self) -> int:
        """What the planned layers' weights come to: one byte a number where int8, four where float."""
        return sum(layer.params * (4 if layer.mode == "float" else 1) for layer in self.layers)

    def with_mode(self, name: str, mode: Mode, why: str) -> QuantPlan:
        """The same plan with one layer changed."""
        layers = tuple(
            layer.model_copy(update={"mode": mode, "why": why}) if layer.name == name else layer
            for layer in self.layers
        )
        return self.model_copy(update={"layers": layers})

    def for_target(self, capabilities: Capabilities) -> tuple[QuantPlan, tuple[Downgrade, ...]]:
        """The plan as a target can honour it, and each difference.

        A kind of layer that the target has no integer kernel for becomes weight-only, and weight-only becomes float
        where it cannot hold that.
        """
        layers, lost = [], []
        for layer in self.layers:
            mode: Mode = layer.mode
            if mode == "int8" and layer.kind not in capabilities.int8_kinds:
                mode = "w8"
            if mode == "w8" and not capabilities.w8:
                mode = "float"
            if mode != layer.mode:
                why = f"this target has no {layer.mode} {layer.kind}"
                lost.append(Downgrade(component=self.component, what=f"{layer.name}: {layer.mode} -> {mode}", why=why))
                layer = layer.model_copy(update={"mode": mode, "why": why})
            layers.append(layer)
        return self.model_copy(update={"layers": tuple(layers)}), tuple(lost)
