"""A narrow width's integers out of the widest one's: exact slices, corrections that cost little, smoothing kept out."""

import numpy as np
import plans
import pytest
import tiny
import torch
from compress_inputs import lots_for
from hypothesis import given
from hypothesis import strategies as st

from edgesd.compress.groups import find_groups
from edgesd.compress.inherit import (
    FINE,
    Correction,
    behind_cuts,
    corrected,
    from_widest,
    load_corrections,
    own_integers,
    save_corrections,
)
from edgesd.compress.layouts import dequantized_weight, grid_of, weight_scales
from edgesd.compress.observe import extents
from edgesd.compress.quantize import adjusted, quantized
from edgesd.compress.quantizing import quantize
from edgesd.compress.quantplan import OWN_INTEGERS, OWN_SCALES
from edgesd.compress.smooth import smooth
from edgesd.compress.widths import narrowed, rounded
from edgesd.manifest import Axes
from edgesd.models.modules import build


def component(unet):
    return build("unet", {**tiny.modules(), "unet": unet}, tiny.spec(), Axes(size_px=tiny.SIZE_PX))


@pytest.fixture(scope="module")
def both():
    """(wide, narrow) components; behind cuts the narrow one's weights outgrow the wide one's."""
    torch.manual_seed(0)
    unet = tiny.unet(heads=4)
    groups = find_groups(unet)
    narrow = narrowed(unet, groups, 0.5)
    for group in groups:
        weight = narrow.get_submodule(group.consumer).weight
        weight.data = weight.data + rounded(3 * weight.std() * torch.randn_like(weight))
    return component(unet), component(narrow)


def test_what_is_cut_alone_is_a_slice_and_what_is_corrected_is_nearly_as_good_as_its_own(both):
    wide, narrow = both
    plan = plans.simple_plan(wide, floats=plans.ends(wide))
    tensors = own_integers(wide, plan)
    start = from_widest(narrow, wide, 0.5, plan, tensors)
    assert set(start.corrections) == behind_cuts(wide)
    for layer in plan.layers:
        if layer.mode == "float":
            assert f"{layer.name}.{OWN_INTEGERS}" not in start.tensors
            continue
        mine, scales = (start.tensors[f"{layer.name}.{kind}"] for kind in (OWN_INTEGERS, OWN_SCALES))
        weight = narrow.module.get_submodule(layer.name).weight
        assert mine.shape == weight.shape
        if layer.name not in start.corrections and "ff.net.0" not in layer.name:  # whose halves are cut each
            theirs = tensors[f"{layer.name}.{OWN_INTEGERS}"]
            assert torch.equal(mine, theirs[tuple(slice(n) for n in mine.shape)])
            assert torch.equal(scales, tensors[f"{layer.name}.{OWN_SCALES}"][: len(scales)])
        own = dequantized_weight(weight, weight_scales(weight, None, None))
        got = mine.float() * scales.view(-1, *[1] * (mine.ndim - 1))
        assert float((got - weight).square().sum()) < 2.5 * float((own - weight).square().sum()) + 1e-12


def test_a_layer_that_brings_its_integers_computes_with_them(both):
    wide, narrow = both
    plan = plans.simple_plan(wide, floats=plans.ends(wide))
    start = from_widest(narrow, wide, 0.5, plan, own_integers(wide, plan))
    given_ = adjusted(narrow, start.tensors)
    own = plans.simple_plan(given_, floats=plans.ends(wide))
    for layout in ("simulated", "folded", "unfolded"):
        made = quantized(given_, own, layout)
        layer = next(x for x in own.layers if x.name in start.corrections)
        weight, scales = grid_of(given_.module.get_submodule(layer.name), None)
        torch.testing.assert_close(made.module.get_submodule(layer.name).stored(), dequantized_weight(weight, scales))


def test_a_plan_goes_on_from_the_widest_one_s(both):
    wide, narrow = both
    kept = behind_cuts(wide)
    facts = {"source_sha256": "0" * 64, "calibration": "made up"}
    made = quantize(wide, lots_for(wide, 4), "int8", kept=kept, **facts)
    tensors = made.tensors | own_integers(adjusted(wide, made.tensors), made.plan)
    stepped = made.plan.with_mode(next(x.name for x in made.plan.layers if x.mode == "int8"), "w8", "test")
    start = from_widest(narrow, wide, 0.5, stepped, tensors)
    again = quantize(narrow, lots_for(narrow, 4), "int8", start=start, kept=kept, **facts)
    assert [x.mode for x in again.plan.layers] == [x.mode for x in stepped.layers]
    assert again.plan.strengths == made.plan.strengths
    assert again.plan.snr_db > made.plan.snr_db - 6
    for path, integers in start.tensors.items():
        if path.endswith(OWN_INTEGERS):
            assert torch.equal(again.tensors[path], integers)


def test_smoothing_leaves_the_columns_behind_cuts(both):
    wide, _ = both
    lots = lots_for(wide, 4)
    kept = behind_cuts(wide)
    tensors, _ = smooth(wide, lots, extents(wide, lots), kept)
    assert tensors
    assert not {path.rpartition(".")[0] for path in tensors} & kept


@given(st.integers(0, 2**32 - 1))
def test_float32_gives_a_correction_s_sums_exactly(seed):
    rng = np.random.default_rng(seed)
    pieces = rng.integers(-127, 128, (6, 50)).astype(np.int8)
    gain, ratio = (np.rint(rng.uniform(0, most, (6, 1)) * FINE).astype(np.float32) / FINE for most in (1, 36))
    steps = rng.integers(-7, 8, pieces.shape).astype(np.int8)
    exact = pieces.astype(np.float64) * gain.astype(np.float64) + steps.astype(np.float64) * ratio.astype(np.float64)
    wanted = np.clip(np.rint(exact), -127, 127).astype(np.int8)
    np.testing.assert_array_equal(corrected(pieces, Correction(steps, gain, ratio)), wanted)


def test_corrections_survive_disk(both, tmp_path):
    wide, narrow = both
    plan = plans.simple_plan(wide, floats=plans.ends(wide))
    start = from_widest(narrow, wide, 0.5, plan, own_integers(wide, plan))
    save_corrections(start.corrections, tmp_path / "c.safetensors")
    again = load_corrections(tmp_path / "c.safetensors")
    key = lambda one: (one.steps.tobytes(), one.gain.tobytes(), one.ratio.tobytes())  # noqa: E731
    assert sorted(map(key, again)) == sorted(map(key, start.corrections.values()))
