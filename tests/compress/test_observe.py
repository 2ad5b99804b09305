import hypothesis.strategies as st
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from torch import nn

from edgesd.calibration.sets import Call
from edgesd.compress.calls import batches
from edgesd.compress.observe import BINS, best_grid, candidates, choose, extents, grid, on_grid
from edgesd.errors import DataError
from edgesd.manifest import Axes, TensorSpec
from edgesd.models.modules import Component, build


def unet_calls(count=6, family="sd1", channels=4):
    rng = np.random.default_rng(0)
    made = []
    for row in range(count):
        inputs = {
            "sample": rng.standard_normal((2, channels, 8, 12)).astype(np.float32),
            "timestep": np.array([990.0 - 160 * row], np.float32),
            "encoder_hidden_states": rng.standard_normal((2, tiny.TOKENS, tiny.context(family))).astype(np.float32),
        }
        made.append(Call("unet", inputs, weight=1.0, guidance=4.0, row=row))
    return made


@pytest.fixture(scope="module")
def component():
    return build("unet", tiny.modules(), tiny.spec(), Axes(size_px=tiny.SIZE_PX))


@pytest.fixture(scope="module")
def lots():
    return batches("unet", unet_calls(), tiny.spec(), size=3)


@pytest.fixture(scope="module")
def seen(component, lots):
    return extents(component, lots)


def watched(component, lots, path):
    """Everything one layer was given and gave, over all batches."""
    xs, ys = [], []
    layer = component.module.get_submodule(path)

    def keep(layer, inputs, output):
        xs.append(inputs[0])
        ys.append(output)

    hook = layer.register_forward_hook(keep)
    with torch.no_grad():
        for lot in lots:
            component.module(*(lot.inputs[spec.name] for spec in component.inputs))
    hook.remove()
    return torch.cat(xs), torch.cat(ys)


def test_extents_are_those_of_all_values_of_all_calls(component, lots, seen):
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    x, y = watched(component, lots, path)
    assert torch.equal(seen[path].low, x.flatten(0, -2).amin(0))
    assert torch.equal(seen[path].high, x.flatten(0, -2).amax(0))
    assert seen[path].output == (float(y.min()), float(y.max()))
    assert min(low for low, _ in seen[path].bands.values()) == float(x.min())


def test_bands_tell_what_each_part_of_a_run_needs(component, lots, seen):
    # The path of time sees what its timestep makes: early and late steps differ.
    bands = seen["unet.time_embedding.linear_1"].bands
    assert sorted(bands) == [0, 1, 2, 3]
    conv = seen["unet.conv_in"].bands
    x, _ = watched(component, lots, "unet.conv_in")
    time = torch.cat([lot.inputs["timestep"] for lot in lots])
    last = x[time < 250]
    assert conv[0] == (float(last.min()), float(last.max()))


def test_layers_come_in_the_order_they_run(seen):
    names = list(seen)
    assert names[0] == "unet.time_embedding.linear_1"
    assert names[-1] == "unet.conv_out"
    assert names.index("unet.conv_in") < names.index("unet.down_blocks.0.resnets.0.conv1")


def test_values_that_are_not_finite_name_the_layer_and_the_step():
    broken = build("unet", tiny.modules(), tiny.spec(), Axes(size_px=tiny.SIZE_PX))
    calls = unet_calls()
    calls[4].inputs["sample"][0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"unet\.conv_in \(step 5\)"):
        extents(broken, batches("unet", calls, tiny.spec(), size=3))


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
@settings(max_examples=200, deadline=None)
def test_a_grid_holds_its_range_and_zero_exactly(a, b):
    scale = grid(min(a, b), max(a, b))
    ends = torch.tensor([min(a, b, 0.0), max(a, b, 0.0)], dtype=torch.float32)
    rounded = on_grid(ends, scale)
    assert (rounded - ends).abs().max() <= scale.scale * 1.001 + 1e-12
    assert float(on_grid(torch.zeros(1), scale)) == 0.0


@given(st.integers(0, 2**31), st.floats(0.5, 4))
@settings(max_examples=20, deadline=None)
def test_the_best_grid_is_no_worse_than_the_whole_range(seed, tail):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
    x = x.abs() ** tail * x.sign()
    low, high = float(x.min()), float(x.max())
    error = lambda scale: float((on_grid(x, scale) - x).square().mean())  # noqa: E731
    best = best_grid(torch.histc(x, BINS, low, high), low, high)
    assert error(best) <= error(grid(low, high)) * 1.02


def test_a_lone_outlier_is_clipped():
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[0] = 3.0
    low, high = float(x.min()), float(x.max())
    best, whole = best_grid(torch.histc(x, BINS, low, high), low, high), grid(low, high)
    errors = [float((on_grid(x, scale) - x).square().mean()) for scale in (best, whole)]
    assert best.scale < 0.7 * whole.scale
    assert errors[0] < 0.7 * errors[1]


def test_candidates_narrow_from_the_whole_range():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    found = candidates(torch.histc(x, BINS, float(x.min()), float(x.max())), float(x.min()), float(x.max()))
    assert found["min-max"].scale > found["percentile 99.99"].scale > found["percentile 99.9"].scale
    wanted = float(x.quantile(0.9995) - x.quantile(0.0005)) / 255
    assert found["percentile 99.9"].scale == pytest.approx(wanted, rel=0.01)
    assert list(candidates(torch.zeros(BINS), 0.0, 0.0)) == ["min-max"]


def test_the_method_chosen_is_the_one_whose_layer_errs_least():
    """One rare, huge, irrelevant input: clipping it is right; one rare, huge, decisive input: it is wrong."""
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 400.0
    chosen = {}
    for name, weight in (("irrelevant", 0.0), ("decisive", 1.0)):
        layer = nn.Linear(8, 4)
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
        layer.weight.data[:, 0] = weight
        whole = build("unet", tiny.modules(), tiny.spec(), Axes(size_px=tiny.SIZE_PX))
        one = Component("unet", nn.Sequential(layer).eval(), whole.inputs[:1], whole.outputs, (x[:1],))
        lot = batches("unet", unet_calls(2), tiny.spec())[0].with_inputs({"sample": x})
        chosen[name] = choose(one, [lot], extents(one, [lot]), ["0"])["0"]
    assert chosen["irrelevant"].input.scale < 0.1
    assert chosen["decisive"].input.scale > 1


def test_the_mean_error_is_what_a_bias_must_make_good(component, lots, seen):
    path = "unet.mid_block.resnets.0.conv1"
    grids = choose(component, lots, seen, [path])[path]
    x, y = watched(component, lots, path)
    layer = component.module.get_submodule(path)
    scales = layer.weight.abs().flatten(1).amax(1) / 127
    weight = (layer.weight / scales.view(-1, 1, 1, 1)).round() * scales.view(-1, 1, 1, 1)
    got = nn.functional.conv2d(on_grid(x, grids.input), weight, layer.bias, padding=1)
    torch.testing.assert_close(grids.shift, (y - got).mean((0, 2, 3)), atol=1e-5, rtol=1e-3)


def test_what_a_relu_cuts_takes_no_part_of_the_output_s_grid():
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    module[0].bias.data -= 0.5  # most of what it makes is negative
    spec = TensorSpec(name="sample", dtype="float32", shape=(1, 4, 8, 8))
    whole = Component("vae_decoder", module.eval().requires_grad_(False), (spec,), (spec,), (torch.randn(1, 4, 8, 8),))
    calls = [
        Call("vae_decoder", {"sample": np.random.RandomState(i).randn(1, 4, 8, 8).astype(np.float32)}) for i in (0, 1)
    ]
    lots = batches("vae_decoder", calls, tiny.spec())
    found = choose(whole, lots, extents(whole, lots), ["0", "2"])
    kept = torch.cat([module[0](batch.inputs["sample"]) for batch in lots]).relu()
    first, second = found["0"].output, found["2"].output
    assert first.zero_point == -128
    assert 0.5 * float(kept.max()) < 255 * first.scale < 1.01 * float(kept.max())
    assert second.zero_point > -128  # nothing cuts this one
