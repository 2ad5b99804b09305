"""Nested widths: the same outputs in another order, narrow inside wide, corrections of four bits, and disk."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from edgesd.compress import widths
from edgesd.compress.calls import batches
from edgesd.compress.groups import find_groups
from edgesd.errors import DataError, RequestError


@pytest.fixture(scope="module", params=widths.MODES)
def nested(request, model, calls):
    return widths.nest(model, (1.0, 0.75, 0.5), request.param, calls)


def outputs(model, module, calls):
    with torch.no_grad():
        return torch.cat([batch.forward(module) for batch in batches("unet", calls, model.spec)])


def test_the_widest_computes_what_the_original_does(model, nested, calls):
    truth = outputs(model, model.modules["unet"], calls)
    assert torch.allclose(outputs(model, nested.modules[1.0], calls), truth, atol=1e-4 * float(truth.abs().max()))


def test_narrow_lies_inside_wide_in_whole_units_and_costs_less(nested):
    groups = {g.name: g for g in find_groups(nested.modules[1.0])}
    for width, module in nested.modules.items():
        for small in find_groups(module):
            kept, whole = small.units, groups[small.name]
            assert kept == widths.leading(whole, width)
            assert small.unit_size == whole.unit_size
        plain = dict(widths.narrowed(nested.modules[1.0], tuple(groups.values()), width).named_parameters())
        consumers = {g.consumer for g in groups.values()}
        for name, tensor in module.named_parameters():
            assert tensor.shape == plain[name].shape
            if name.rpartition(".")[0] not in consumers:
                assert torch.equal(tensor, plain[name]), name
    macs = [cost.size.macs for cost in nested.plan.widths]
    assert macs == sorted(macs, reverse=True)
    assert nested.plan.off()[1.0] == 0 < nested.plan.off()[0.75] < nested.plan.off()[0.5] < 0.5


def test_restoring_beats_plain_slices(model, nested, calls):
    truth, whole = outputs(model, model.modules["unet"], calls), nested.modules[1.0]
    for width in (0.75, 0.5):
        plain = widths.narrowed(whole, find_groups(whole), width)
        restored, cut = (
            float((outputs(model, m, calls) - truth).square().sum()) for m in (nested.modules[width], plain)
        )
        assert restored < 0.7 * cut


def test_a_model_trained_at_its_widths_keeps_order_and_weights(model, calls, tmp_path):
    (tmp_path / "edgesd.json").write_text(json.dumps({"nested_widths": [1.0, 0.75, 0.5]}))
    trained = replace(model, parts=model.parts | {"unet": tmp_path / "unet"})
    assert widths.trained_widths(trained) == (1.0, 0.75, 0.5)
    assert widths.trained_widths(model) == ()
    made, dense = widths.nest(trained, (1.0, 0.5), "shared", calls), model.modules["unet"]
    assert made.plan.importance == widths.TRAINED
    truth = dict(widths.narrowed(dense, find_groups(dense), 0.5).named_parameters())
    assert all(torch.equal(tensor, truth[name]) for name, tensor in made.modules[0.5].named_parameters())
    widths.save(made, tmp_path)
    assert load_file(tmp_path / "0.5.safetensors") == {}  # plain slices: nothing of its own
    other = widths.nest(trained, (1.0, 0.6), "shared", calls)  # a width that no training saw
    assert other.plan.importance == "obs"


def test_important_units_come_first_and_what_is_computed_stays(model, calls):
    dense = model.modules["unet"]
    first = widths.important_first(model, calls)
    truth = outputs(model, dense, calls)
    assert torch.allclose(outputs(model, first, calls), truth, atol=1e-4 * float(truth.abs().max()))
    groups = find_groups(first)
    last = widths.ordered(first, groups, {group.name: range(group.units)[::-1] for group in groups})
    off = [
        float((outputs(model, widths.narrowed(m, groups, 0.5), calls) - truth).square().sum()) for m in (first, last)
    ]
    assert off[0] < 0.95 * off[1]


def test_what_is_saved_loads_again_and_a_foreign_plan_is_refused(model, nested, calls, tmp_path):
    widths.save(nested, tmp_path)
    for width, module in nested.modules.items():
        again = widths.load(model.modules["unet"], tmp_path, width)
        for (name, a), (_, b) in zip(module.named_parameters(), again.named_parameters(), strict=True):
            assert torch.equal(a, b), (width, name)
    with pytest.raises(RequestError, match=r"width 0\.6"):
        widths.load(model.modules["unet"], tmp_path, 0.6)
    with pytest.raises(DataError, match="groups differ"):
        widths.load(tiny.unet(heads=4), tmp_path, 0.5)
    (tmp_path / "0.5.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="plan of widths"):
        widths.load(model.modules["unet"], tmp_path, 0.5)
    (tmp_path / widths.PLAN).write_text("{}")
    with pytest.raises(DataError, match="plan of widths"):
        widths.read_plan(tmp_path)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(3, 5), (8, 4, 3, 3), (1, 7)]))
def test_corrections_have_fifteen_values_a_channel_and_never_hurt(seed, shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3
    made = widths.rounded(delta)
    assert all(len(row.unique()) <= 2 * widths.LEVELS + 1 for row in made.flatten(1))
    assert float((made - delta).square().sum()) <= float(delta.square().sum())
    assert torch.equal(widths.rounded(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("wrong", [(), (0.5,), (1.0, 1.0), (1.0, 0.05), (1.0, 2.0), (1.0, float("nan"))])
def test_widths_that_cannot_be_are_refused(wrong):
    with pytest.raises(RequestError, match="widths"):
        widths.check_widths(wrong, "shared")


def test_a_request_that_cannot_be_is_refused(model, calls):
    assert widths.check_widths((0.5, 1.0), "separate") == (1.0, 0.5)
    with pytest.raises(RequestError, match="width mode"):
        widths.check_widths((1.0,), "both")
    with pytest.raises(RequestError, match="recorded calls"):
        widths.nest(model, (1.0, 0.5), "shared", calls[:2])
    with pytest.raises(RequestError, match="importance"):
        widths.nest(model, (1.0, 0.5), "shared", calls, importance="luck")
