from dataclasses import replace

import hypothesis.strategies as st
import plans
import pytest
import tiny
import torch
from hypothesis import given, settings
from torch import nn

from edgesd.compress.layouts import quantize_weight, raised_channels, weight_scales
from edgesd.compress.quantize import LayerPlan, QuantPlan, Scale, adjusted, quantized
from edgesd.errors import DataError, RequestError
from edgesd.manifest import Axes
from edgesd.models.modules import Component, build
from edgesd.targets import Capabilities

BOTH = ("conv", "linear")


def component(name="unet", family="sd1"):
    return build(name, tiny.modules(family), tiny.spec(family), Axes(size_px=tiny.SIZE_PX))


def run(component):
    with torch.no_grad():
        made = component.module(*component.example)
    return made if isinstance(made, torch.Tensor) else made[0]


def snr_db(truth, got):
    return float(10 * torch.log10(truth.square().mean() / (got - truth).square().mean()))


@pytest.mark.parametrize(
    ("name", "family"),
    [("unet", "sd1"), ("unet", "sdxl"), ("text_encoder", "sd1"), ("vae_decoder", "sd1"), ("vae_encoder", "sd1")],
)
def test_all_layouts_compute_the_same_numbers(name, family):
    whole = component(name, family)
    plan = plans.simple_plan(whole)
    wanted = run(quantized(whole, plan, "simulated", outputs=BOTH))
    for layout, form in (("folded", "linear"), ("folded", "matmul"), ("unfolded", "linear")):
        got = run(quantized(whole, plan, layout, outputs=BOTH, linear_form=form))
        # One rounding that falls the other way redraws what follows: compare by energy, far above int8's own error.
        assert snr_db(wanted, got) > snr_db(run(whole), wanted) + 6 or torch.equal(wanted, got)
    assert 5 < snr_db(run(whole), wanted) < 60


@pytest.mark.parametrize("layout", ["folded", "unfolded", "simulated"])
def test_a_single_layer_gives_the_integers_of_the_definition(layout):
    torch.manual_seed(3)
    layer = nn.Conv2d(6, 8, 3, padding=1, stride=2)
    x = torch.randn(2, 6, 9, 9)
    one = toy(layer, x)
    plan = plans.simple_plan(one)
    first = plan.layers[0]
    integers = (x / first.input.scale).round().add(first.input.zero_point).clamp(-128, 127) - first.input.zero_point
    scales = layer.weight.abs().flatten(1).amax(1) / 127
    weights = (layer.weight / scales.view(-1, 1, 1, 1)).round()
    exact = nn.functional.conv2d(integers.double(), weights.double(), padding=1, stride=2)
    wanted = exact * (scales * first.input.scale).view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(run(quantized(one, plan, layout)).double(), wanted, atol=1e-5, rtol=1e-5)


def toy(layer, x):
    whole = component()
    return Component("unet", nn.Sequential(layer).eval(), whole.inputs[:1], whole.outputs, (x,))


@given(st.integers(0, 2**31), st.floats(1e-6, 1e3), st.floats(0, 1e6))
@settings(max_examples=60, deadline=None)
def test_no_weight_or_bias_leaves_its_integers(seed, input_scale, size):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator) * torch.logspace(-8, 2, 5).view(-1, 1)
    weight[0] = 0
    bias = torch.randn(5, generator=generator) * size
    scales = weight_scales(weight, bias, input_scale)
    assert (scales > 0).all()
    assert ((bias.double() / (scales.double() * input_scale)).abs() <= 2**30 * (1 + 1e-6)).all()
    integers = quantize_weight(weight, scales).double()
    error = (integers * scales.double().view(-1, 1) - weight.double()).abs()
    assert (error <= scales.double().view(-1, 1) * 0.500001).all()


def test_a_channel_raised_for_its_bias_is_counted():
    layer = nn.Linear(4, 2).requires_grad_(False)
    layer.weight[:], layer.bias[:] = 1e-9, torch.tensor([1.0, 0.0])
    assert raised_channels(layer, 1e-3) == 1
    layer.bias = None
    assert raised_channels(layer, 1e-3) == 0


def test_weight_only_layers_leave_activations_alone():
    torch.manual_seed(3)
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    one = toy(layer, x)
    plan = plans.simple_plan(one, "w8")
    scales = layer.weight.abs().amax(1, keepdim=True) / 127
    wanted = nn.functional.linear(x, (layer.weight / scales).round() * scales, layer.bias)
    torch.testing.assert_close(run(quantized(one, plan, "folded")), wanted)
    floats = plans.simple_plan(one, floats=("0",))
    assert torch.equal(run(quantized(one, floats, "folded")), run(one))


def test_the_component_itself_is_left_as_it_was():
    whole = component()
    before = {name: p.clone() for name, p in whole.module.named_parameters()}
    kept = run(whole)
    quantized(whole, plans.simple_plan(whole), "folded")
    assert torch.equal(run(whole), kept)
    assert all(torch.equal(before[name], p) for name, p in whole.module.named_parameters())


@pytest.mark.parametrize("layout", ["folded", "unfolded"])
def test_exported_programs_carry_the_operators(layout):
    whole = component()
    plan = plans.simple_plan(whole)
    graph = torch.export.export(quantized(whole, plan, layout, outputs=BOTH).module, whole.example, strict=False)
    names = [str(node.target) for node in graph.graph.nodes]
    inputs = sum("quantize_per_tensor" in name and "dequantize" not in name for name in names)
    assert inputs == 2 * len(plan.layers)
    assert sum("dequantize_per_channel" in name for name in names) == len(plan.layers)
    kept = {t.dtype for n, t in graph.state_dict.items() if n.endswith("conv1.weight")}
    assert kept == {torch.int8 if layout == "folded" else torch.float32}


def test_plans_survive_json_and_refuse_nonsense():
    plan = plans.simple_plan(component())
    assert QuantPlan.parse(plan.model_dump_json()) == plan
    with pytest.raises(DataError, match="does not parse"):
        QuantPlan.parse(plan.model_dump_json().replace('"zero_point":', '"zero_point":9'))
    with pytest.raises(ValueError, match="without scales"):
        LayerPlan(name="a", kind="conv", mode="int8", why="")
    with pytest.raises(ValueError):
        Scale(scale=0.0, zero_point=0)


def test_a_plan_of_another_model_is_refused():
    plan = plans.simple_plan(component())
    with pytest.raises(RequestError, match="a plan of unet for vae_decoder"):
        quantized(component("vae_decoder"), plan, "folded")
    with pytest.raises(DataError, match="not in the model"):
        quantized(replace(component("vae_decoder"), name="unet"), plan, "folded")


def test_every_difference_of_a_target_is_recorded():
    plan = plans.simple_plan(component())
    linears = [layer.name for layer in plan.layers if layer.kind == "linear"]
    mine, lost = plan.for_target(Capabilities(precisions=("int8",)))
    assert mine == plan
    assert not lost
    mine, lost = plan.for_target(Capabilities(precisions=("int8",), int8_kinds=("conv",)))
    assert {layer.mode for layer in mine.layers if layer.kind == "linear"} == {"w8"}
    assert [d.what for d in lost] == [f"{name}: int8 -> w8" for name in linears]
    mine, lost = plan.for_target(Capabilities(precisions=("int8",), int8_kinds=("conv",), w8=False))
    assert {layer.mode for layer in mine.layers if layer.kind == "linear"} == {"float"}
    assert len(lost) == len(linears)
    assert lost[0].component == "unet"


def test_adjusted_weights_replace_by_path_and_must_fit():
    whole = component()
    path = "unet.conv_in.weight"
    old = whole.module.get_parameter(path)
    twice = adjusted(whole, {path: old * 2})
    assert torch.equal(twice.module.get_parameter(path), old * 2)
    assert torch.equal(whole.module.get_parameter(path), old)
    for bad in ({path: old[:1]}, {"unet.nowhere.weight": old}):
        with pytest.raises(DataError, match="adjusted weight"):
            adjusted(whole, bad)
