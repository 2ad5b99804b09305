"""Every integer accounted for: what each target makes of a quantization plan, read back from its files and run."""

from dataclasses import replace

import numpy as np
import plans
import pytest
import readback
import tiny
import torch
from torch import nn

from edgesd import targets
from edgesd.compress import quantize
from edgesd.compress.layouts import quantize_weight, weight_scales
from edgesd.errors import GateError, RequestError
from edgesd.manifest import Axes, TensorSpec
from edgesd.models.modules import Component, build

FORMS = {"onnx-web": "wasm", "openvino": "", "tflite": "", "coreml": ""}
ALL = tuple(FORMS)


def axes(name, precision="int8", size_px=tiny.SIZE_PX):
    return Axes(size_px=size_px, precision=precision, form=FORMS[name])


def component(name="unet", family="sd1", vae="tiny"):
    return build(name, tiny.modules(family, vae), tiny.spec(family, vae), Axes(size_px=tiny.SIZE_PX))


def load(name):
    for module in ("onnx", "onnxruntime", "openvino", "litert_torch", "coremltools"):
        if module.startswith({"onnx-web": "onnx", "openvino": "openvino", "tflite": "litert", "coreml": "core"}[name]):
            pytest.importorskip(module)
    return targets.load(name, lowering=True)


def run(target, folder, lowered, component, inputs=None):
    """The artefact's outputs, as arrays, for the component's example."""
    from edgesd import manifest as schema

    facts = tiny.spec()
    files = tuple(path.as_posix() for path in lowered.files)
    variant = schema.Variant(axes=axes(target.name), files=files, inputs=lowered.inputs, outputs=lowered.outputs)
    manifest = schema.Manifest(
        target=target.name, model=facts, components=(schema.Component(name=component.name, variants=(variant,)),),
        samplers=(schema.SamplerFile(name="euler", file="t.safetensors", steps=(1,)),),
        provenance=schema.Provenance(source="tiny", sha256="0" * 64),
        files=tuple(
            schema.FileEntry(path=path, bytes=0, sha256="0" * 64)
            for path in sorted({*files, "t.safetensors", *(t.file for t in facts.tokenizers)})
        ),
    )  # fmt: skip
    given = component.example if inputs is None else inputs
    named = {spec.name: x.numpy() for spec, x in zip(component.inputs, given, strict=True)}
    return target.open(folder, manifest).run(component.name, named)[component.outputs[0].name]


def compute(component):
    with torch.no_grad():
        made = component.module(*component.example)
    return (made[0] if isinstance(made, tuple) else made).numpy()


def energy(x):
    return float(np.square(x.astype(np.float64)).mean())


# ---- single layers ----------------------------------------------------------------------------------------------


class One(nn.Module):
    """A layer between float operations, so that no converter takes the border's type from it."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(5)
        self.kind = kind
        self.layer = nn.Conv2d(16, 24, 3, padding=1) if kind == "conv" else nn.Linear(16, 24)

    def forward(self, sample):
        x = nn.functional.silu(sample)
        if self.kind == "linear":
            x = x.flatten(2).transpose(1, 2)
        made = torch.tanh(self.layer(x))
        return made.transpose(1, 2).reshape(1, 24, 8, 12) if self.kind == "linear" else made


def single(kind):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 16, 8, 12, generator=generator)
    given = TensorSpec(name="sample", dtype="float32", shape=(1, 16, 8, 12))
    made = TensorSpec(name="model_output", dtype="float32", shape=(1, 24, 8, 12))
    return Component("unet", One(kind).eval().requires_grad_(False), (given,), (made,), (x,))


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("name", ALL)
def test_a_layer_gives_the_plan_s_integers(name, kind, tmp_path):
    target, whole = load(name), single(kind)
    plan = plans.simple_plan(whole)
    lowered = target.lower(whole, axes(name), tmp_path, plan=plan)
    got = run(target, tmp_path, lowered, whole)
    wanted = compute(quantize.quantized(whole, plan, "simulated", target.capabilities.int8_outputs))
    step = plan.layers[0].output.scale
    # One integer at the output is the rounding that two orders of summation may differ by; float16 rounds as finely.
    assert np.abs(got - wanted).max() <= step * 1.01
    assert energy(got - wanted) < (0.2 if name == "coreml" else 0.05) * energy(wanted - compute(whole))
    found = target.coverage(tmp_path / lowered.files[0])
    assert (found.int8, found.w8, found.floating) == (plan.layers[0].macs, 0, 0)
    check_scales(name, tmp_path / lowered.files[0], whole, plan)


def check_scales(name, path, whole, plan):
    """Every layer of the plan with int8 weights is in the file once: its integers, its scales, its input's grid."""
    half = name == "coreml"  # whose scales are float16, like its arithmetic
    found = list(readback.READERS[name](path))
    for layer in plan.layers:
        if layer.mode == "float":
            continue
        module = whole.module.get_submodule(layer.name)
        scales = weight_scales(module.weight, module.bias, layer.input.scale if layer.mode == "int8" else None)
        integers = quantize_weight(module.weight, scales).numpy()
        alike = [row for row in found if row[0].size == integers.size]
        off = [np.abs(row[0].ravel().astype(int) - integers.ravel()) for row in alike]
        # A converter that rounds anew may fall the other way where a weight lies between two integers.
        same = [row for row, each in zip(alike, off, strict=True) if each.max() <= 1 and each.mean() < 0.005]
        assert same, f"{layer.name}: no such integers in {path.name}"
        _, stored, given = same[0]
        np.testing.assert_allclose(stored, scales.numpy(), rtol=1e-3 if half else 1e-6)
        assert (given is not None) == (layer.mode == "int8")
        if given is not None:
            assert given[0] == pytest.approx(layer.input.scale, rel=1e-3 if half else 1e-5)
            assert given[1] == layer.input.zero_point


class Embedded(nn.Module):
    """A table that weighs more than the layer behind it: what stays float counts, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.table, self.layer = nn.Embedding(4096, 32), nn.Linear(32, 32)

    def forward(self, input_ids):
        return torch.tanh(self.layer(nn.functional.silu(self.table(input_ids))))


@pytest.mark.parametrize("name", ALL)
def test_what_stays_float_is_stored_as_the_target_stores_floats(name, tmp_path):
    target = load(name)
    ids = torch.arange(12, dtype=torch.int32)[None]
    given = TensorSpec(name="input_ids", dtype="int32", shape=(1, 12))
    made = TensorSpec(name="last_hidden_state", dtype="float32", shape=(1, 12, 32))
    whole = Component("text_encoder", Embedded().eval().requires_grad_(False), (given,), (made,), (ids,))
    plan = plans.simple_plan(whole)
    lowered = target.lower(whole, axes(name), tmp_path, plan=plan)  # holds the bytes against the plan's
    assert energy(run(target, tmp_path, lowered, whole) - compute(whole)) < 1e-4 * energy(compute(whole))


# ---- whole components -------------------------------------------------------------------------------------------

COMPONENTS = [
    ("unet", "sd1", "tiny"), ("unet", "sdxl", "tiny"), ("text_encoder", "sd1", "tiny"),
    ("text_encoder_2", "sdxl", "tiny"), ("vae_decoder", "sd1", "tiny"), ("vae_decoder", "sd1", "full"),
    ("vae_encoder", "sd1", "full"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "hybrid", "w8"])
@pytest.mark.parametrize(("part", "family", "vae"), COMPONENTS)
@pytest.mark.parametrize("name", ALL)
def test_components_come_out_as_planned(name, part, family, vae, precision, tmp_path):
    check(name, component(part, family, vae), precision, tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_a_unet_comes_out_as_planned(name, tmp_path):
    check(name, component(), "int8", tmp_path)


def check(name, whole, precision, folder):
    """Lowers, runs, and holds against the plan: coverage, error against float, every scale."""
    target = load(name)
    plan = plans.simple_plan(whole, precision, floats=plans.ends(whole))
    lowered = target.lower(whole, axes(name, precision), folder, plan=plan)
    got = run(target, folder, lowered, whole)
    truth = compute(whole)
    simulated = compute(quantize.quantized(whole, lowered.plan, "simulated", target.capabilities.int8_outputs))
    assert np.sqrt(energy(got - truth)) <= 1.25 * np.sqrt(energy(simulated - truth)) + 2e-3 * np.sqrt(energy(truth))
    found = target.coverage(folder / lowered.files[0])
    modes = {mode: sum(x.macs for x in lowered.plan.layers if x.mode == mode) for mode in ("int8", "w8", "float")}
    assert found.int8 == modes["int8"]
    assert found.w8 == modes["w8"]
    assert found.floating >= modes["float"]
    check_scales(name, folder / lowered.files[0], whole, lowered.plan)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_int8_without_its_plan_is_refused(name, tmp_path):
    target, whole = load(name), single("conv")
    with pytest.raises(RequestError, match="no quantization plan"):
        target.lower(whole, axes(name), tmp_path)
    with pytest.raises(RequestError, match="a plan for hybrid"):
        target.lower(whole, axes(name), tmp_path, plan=plans.simple_plan(whole, "hybrid"))
    with pytest.raises(RequestError, match="a quantization plan for fp32"):
        target.lower(whole, axes(name, "fp32"), tmp_path, plan=plans.simple_plan(whole))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALL)
def test_a_lowering_that_falls_back_to_float_fails_the_build(name, tmp_path, monkeypatch):
    target, whole = load(name), single("conv")
    plan = plans.simple_plan(whole)
    # A converter that "succeeds" in float: the layers lose their grids on the way.
    monkeypatch.setattr("edgesd.compress.quantize.quantized", lambda component, *rest, **more: component)
    monkeypatch.setattr("edgesd.targets.coreml.convert.quantized", lambda component, *rest, **more: component)
    with pytest.raises(GateError, match="planned int8 MACs in integers") as caught:
        target.lower(whole, axes(name), tmp_path, plan=plan)
    assert caught.value.exit_code == 3


def test_a_float_copy_of_the_weights_fails_the_build():
    from edgesd.targets import Coverage, _int8

    whole = component()
    plan = plans.simple_plan(whole)
    wanted = _int8.expected(whole, plan, 4)
    fine = Coverage(wanted.int8, wanted.w8, wanted.floating, wanted.bytes)
    _int8.hold("unet", wanted, fine)
    copied = sum(layer.params for layer in plan.layers) * 4
    with pytest.raises(GateError, match="a float copy"):
        _int8.hold("unet", wanted, replace(fine, weight_bytes=wanted.bytes + copied))
    with pytest.raises(GateError, match="widened"):
        _int8.hold("unet", replace(wanted, w8=wanted.int8), fine)


def test_a_bias_that_would_overflow_int32_raises_its_scale(tmp_path):
    target, whole = load("onnx-web"), single("linear")
    whole.module.layer.bias[3] = 4e5
    whole.module.layer.weight[3] *= 1e-6
    plan = plans.simple_plan(whole)
    scales = weight_scales(whole.module.layer.weight, whole.module.layer.bias, plan.layers[0].input.scale)
    lowered = target.lower(whole, axes("onnx-web"), tmp_path, plan=plan)
    got, wanted = run(target, tmp_path, lowered, whole), compute(quantize.quantized(whole, plan, "simulated"))
    assert np.allclose(got[0, 3], wanted[0, 3], rtol=1e-6)
    assert quantize_weight(whole.module.layer.weight, scales)[3].abs().max() < 127


# ---- palettes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [6, 8])
def test_a_palette_s_weights_come_out_of_a_table(bits, tmp_path):
    target, whole = load("coreml"), single("conv")
    plan = plans.simple_plan(whole, "w8")
    lowered = target.lower(whole, axes("coreml", "w8"), tmp_path, plan=plan, palette=bits)
    got, truth = run(target, tmp_path, lowered, whole), compute(whole)
    # k-means of 2^bits values: no worse than 2^bits even steps over the weights' range; tanh only shrinks it.
    weight = whole.module.layer.weight
    step = float(weight.max() - weight.min()) / (2**bits - 1)
    x = nn.functional.silu(whole.example[0])
    noise = step**2 / 12 * float(nn.functional.conv2d(x.square(), torch.ones(1, 16, 3, 3), padding=1).mean())
    assert energy(got - truth) < 1.1 * noise + 1e-5 * energy(truth)
    assert energy(got - truth) > (0.02 * noise if bits == 6 else 0)
    found = target.coverage(tmp_path / lowered.files[0])
    assert (found.int8, found.w8, found.floating) == (0, plan.layers[0].macs, 0)
    stored = weight.numel() * bits / 8
    assert stored < found.weight_bytes < stored + 2 * 2**bits + 2048


def test_palettes_are_for_weights_alone(tmp_path):
    target, whole = load("coreml"), single("conv")
    with pytest.raises(RequestError, match="palette of 4 bits"):
        target.lower(whole, axes("coreml", "w8"), tmp_path, plan=plans.simple_plan(whole, "w8"), palette=4)
    with pytest.raises(RequestError, match="--precision w8"):
        target.lower(whole, axes("coreml"), tmp_path, plan=plans.simple_plan(whole), palette=6)
