import pytest
import tiny
import torch
from compress_inputs import lots_for

from edgesd.compress.observe import call, extents, grid, on_grid
from edgesd.compress.quantize import adjusted
from edgesd.compress.smooth import factors, find_folds, fold_in, smooth
from edgesd.manifest import Axes
from edgesd.models.modules import build

CASES = [
    ("unet", "sd1", "tiny"), ("unet", "sd2", "tiny"), ("unet", "sdxl", "tiny"), ("unet", "lcm", "tiny"),
    ("text_encoder", "sd1", "tiny"), ("text_encoder_2", "sdxl", "tiny"), ("vae_decoder", "sd1", "tiny"),
    ("vae_decoder", "sd1", "full"), ("vae_encoder", "sd1", "full"), ("vae_encoder", "sd1", "tiny"),
]  # fmt: skip


def component(name, family, vae):
    return build(name, tiny.modules(family, vae), tiny.spec(family, vae), Axes(size_px=tiny.SIZE_PX))


@pytest.mark.parametrize(("name", "family", "vae"), CASES)
def test_smoothing_leaves_the_float_output_as_it_was(name, family, vae):
    """Any factors at all, on every fold at once."""
    whole = component(name, family, vae)
    generator = torch.Generator().manual_seed(5)
    folds = find_folds(whole.module)
    assert folds
    random = {fold: torch.empty(fold.rows).log_normal_(0, 1, generator=generator) for fold in folds}
    with torch.no_grad():
        wanted, got = (one.module(*whole.example) for one in (whole, adjusted(whole, fold_in(whole, random))))
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (wanted, got)), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(a.abs().max()))


def test_the_folds_are_those_that_cost_nothing():
    found = {fold.source.removeprefix("unet."): fold.consumers for fold in find_folds(component(*CASES[0]).module)}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert [c.rpartition(".")[2] for c in found[f"{block}.norm1"]] == ["to_q", "to_k", "to_v"]
    assert [c.rpartition(".")[2] for c in found[f"{block}.norm2"]] == ["to_q"]
    assert found["down_blocks.0.attentions.0.norm"] == ("unet.down_blocks.0.attentions.0.proj_in",)
    assert found[f"{block}.ff.net.0.proj"] == (f"unet.{block}.ff.net.2",)
    assert f"{block}.attn2.to_v" in found
    # Nothing behind a SiLU or a skip connection.
    assert not [c for consumers in found.values() for c in consumers if "resnets" in c or "sampler" in c]


def test_outliers_of_a_channel_are_moved_into_weights():
    """A norm with one loud channel: int8 loses the others, until smoothing."""
    whole = component("text_encoder", "sd1", "tiny")
    norm = whole.module.layers[0].layer_norm1
    norm.weight.data[3] *= 80
    lots = lots_for(whole, 4)
    seen = extents(whole, lots)
    tensors, strengths = smooth(whole, lots, seen)
    assert strengths["layers.0.layer_norm1"] > 0
    better = adjusted(whole, tensors)
    for a, b in zip(call(whole, lots[0]), call(better, lots[0]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    def error(one):
        layer, inputs = one.module.layers[0].self_attn.q_proj, []
        hook = layer.register_forward_hook(lambda _, x, y: inputs.append(x[0]))
        call(one, lots[0])
        hook.remove()
        x = inputs[0]
        rounded = on_grid(x, grid(float(x.min()), float(x.max())))
        scales = layer.weight.abs().amax(1, keepdim=True) / 127
        wanted = layer(x)
        return float(
            (torch.nn.functional.linear(rounded, (layer.weight / scales).round() * scales, layer.bias) - wanted)
            .square().mean() / wanted.square().mean()
        )  # fmt: skip

    assert error(better) < error(whole) / 4


def test_factors_are_bounded_and_silent_channels_are_left_alone():
    s = factors(torch.tensor([0.0, 1.0, 1e9, 1e-12]), torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.5)
    assert s[0] == s[1] == 1
    assert ((s >= 1e-3) & (s <= 1e3)).all()
    assert torch.equal(factors(torch.ones(3), torch.ones(3), 0.0), torch.ones(3))
