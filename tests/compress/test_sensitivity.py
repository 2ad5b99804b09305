import pytest
import tiny
import torch
from compress_inputs import lots_for

from edgesd.compress import quantizing, sensitivity
from edgesd.compress.quantize import adjusted, quantized
from edgesd.compress.sensitivity import Truth, decibels, rank
from edgesd.errors import GateError
from edgesd.manifest import Axes
from edgesd.models.modules import build


def component(name="unet", family="sd1", vae="tiny"):
    return build(name, tiny.modules(family, vae), tiny.spec(family, vae), Axes(size_px=tiny.SIZE_PX))


def plan_of(one, precision="int8", gate_db=None, family="sd1"):
    lots = lots_for(one, 5, family)
    return lots, quantizing.quantize(
        one, lots, precision, source_sha256="0" * 64, calibration="test", gate_db=gate_db
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    return component()


@pytest.fixture(scope="module")
def made(whole):
    return plan_of(whole)


def test_errors_are_relative_and_by_noise_level(whole):
    lots = lots_for(whole, 5)
    truth = Truth.of(whole, lots)
    assert set(truth.errors(whole)) == {0, 2, 5, 7, 9}
    assert set(truth.errors(whole).values()) == {0.0}
    louder = adjusted(whole, {"unet.conv_out.weight": whole.module.unet.conv_out.weight * 1.1,
                              "unet.conv_out.bias": whole.module.unet.conv_out.bias * 1.1})  # fmt: skip
    assert all(error == pytest.approx(0.01, rel=1e-3) for error in truth.errors(louder).values())
    assert decibels(0.01) == pytest.approx(20)


def test_a_layer_made_worse_is_ranked_worst(whole):
    lots, made = plan_of(whole)
    name = "unet.up_blocks.0.resnets.0.conv2"
    coarse = tuple(
        layer.model_copy(update={"input": layer.input.model_copy(update={"scale": layer.input.scale * 60})})
        if layer.name == name
        else layer
        for layer in made.plan.layers
    )
    ranked = rank(whole, made.plan.model_copy(update={"layers": coarse}), Truth.of(whole, lots), lambda *_: None)
    assert ranked[0].name == name
    assert [one.snr_db for one in ranked] == sorted(one.snr_db for one in ranked)


@pytest.mark.parametrize(("name", "family", "vae"), [("unet", "sd1", "tiny"), ("text_encoder_2", "sdxl", "tiny"),
                                                      ("vae_decoder", "sd1", "full")])  # fmt: skip
def test_ranks_are_what_quantizing_each_layer_alone_costs(name, family, vae, monkeypatch):
    monkeypatch.setattr(sensitivity, "PROBES", 1000)  # an error of 4 %, 0.2 dB
    one = component(name, family, vae)
    lots, made = plan_of(one, family=family)
    truth, plan = Truth.of(one, lots), made.plan
    ranked = rank(one, plan, truth, lambda *_: None)
    assert {layer.name for layer in plan.layers if layer.mode != "float"} == {each.name for each in ranked}
    for each in ranked[:: max(1, len(ranked) // 8)]:
        layer = next(layer for layer in plan.layers if layer.name == each.name)
        alone = quantized(one, plan.model_copy(update={"layers": (layer,)}), "simulated")
        errors = truth.errors(alone).values()
        right = decibels(sum(errors) / len(errors))
        first_order = 2.5 if right < 25 else 1.0  # an error so large is no longer followed in a straight line
        assert each.snr_db == pytest.approx(right, abs=first_order), each.name


def test_cautious_layers_keep_int8_weights_alone(made):
    modes = {layer.name.removeprefix("unet."): layer.mode for layer in made[1].plan.layers}
    for name in ("time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj",
                 "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"):  # fmt: skip
        assert modes[name] == "w8", name
    assert modes["conv_in"] == modes["conv_out"] == "float"
    assert modes["down_blocks.0.resnets.0.conv1"] == "int8"
    assert modes["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"] == "int8"
    assert made[1].plan.share_int8() > 0.8


def test_what_is_told_is_what_the_plan_reaches(whole, made):
    lots, one = made
    simulated = quantized(adjusted(whole, one.tensors), one.plan, "simulated")
    reached = Truth.of(whole, lots).snr_db(simulated)
    assert min(reached.values()) == pytest.approx(one.plan.snr_db, abs=0.01)
    assert reached == pytest.approx(one.levels)


def test_a_gate_steps_back_the_worst_layers_and_then_stops(whole, made):
    _lots, free = made
    gate = free.plan.snr_db + 6
    _, held = plan_of(whole, gate_db=gate)
    assert min(held.levels.values()) >= gate
    stepped = [layer.name for layer in held.plan.layers if layer.why.startswith("gate of")]
    assert stepped
    order = [one.name for one in held.plan.sensitivities]
    assert set(stepped) == set(order[: len(stepped)])
    # Not one step further than needed, but for the stride.
    assert len(stepped) < len(order)
    modes = {layer.name: layer.mode for layer in free.plan.layers}
    down = {"int8": "w8", "w8": "float"}
    assert all(layer.mode == down[modes[layer.name]] for layer in held.plan.layers if layer.name in stepped)


def test_a_gate_out_of_reach_says_so(whole):
    with pytest.raises(GateError, match=r"dB with nothing left in int8.*119 dB at every noise level"):
        plan_of(whole, gate_db=119)
    with pytest.raises(GateError, match="nothing left in w8"):
        plan_of(component("text_encoder"), "w8", gate_db=300)


def test_hybrid_and_weight_only_plans(whole):
    _, hybrid = plan_of(whole, "hybrid")
    assert {layer.mode for layer in hybrid.plan.layers if layer.kind == "linear"} == {"w8"}
    assert "int8" in {layer.mode for layer in hybrid.plan.layers if layer.kind == "conv"}
    _, weights = plan_of(whole, "w8")
    assert {layer.mode for layer in weights.plan.layers} == {"w8", "float"}
    assert weights.plan.snr_db > hybrid.plan.snr_db
    assert not [path for path in weights.tensors if not path.endswith(".bias")]  # nothing to smooth


@pytest.mark.parametrize(
    ("name", "family", "vae"),
    [("text_encoder_2", "sdxl", "tiny"), ("vae_decoder", "sd1", "full"), ("vae_encoder", "sd1", "tiny"),
     ("unet", "sdxl", "tiny"), ("unet", "inpaint", "tiny")],
)  # fmt: skip
def test_every_component_of_every_family(name, family, vae):
    one = component(name, family, vae)
    _lots, made = plan_of(one, family=family)
    assert made.plan.snr_db > 20
    assert len(made.plan.sensitivities) == sum(layer.mode != "float" for layer in made.plan.layers)
    assert made.plan.share_int8() > 0.5
    macs = sum(layer.macs for layer in made.plan.layers)
    assert macs > 0


def test_bias_correction_takes_the_mean_error_off(whole):
    lots, made = plan_of(component("vae_decoder"))
    plain = component("vae_decoder")
    weights = {path: tensor for path, tensor in made.tensors.items() if not path.endswith(".bias")}
    truth = Truth.of(plain, lots)
    with_bias = truth.errors(quantized(adjusted(plain, made.tensors), made.plan, "simulated"))[0]
    smoothed_biases = {p: t for p, t in made.tensors.items() if p.endswith(".bias")}
    assert smoothed_biases
    assert weights
    assert with_bias < 0.01
    assert all(torch.isfinite(t).all() for t in made.tensors.values())
