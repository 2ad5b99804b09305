"""Pruning end to end on the embedded model, and the maths beneath it on problems with known answers."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from edgesd.compress import evidence as evidence_module
from edgesd.compress import latency, moments
from edgesd.compress.allocate import allocate
from edgesd.compress.calls import batches
from edgesd.compress.evidence import collect
from edgesd.compress.groups import find_groups
from edgesd.compress.importance import IMPORTANCE, Curve, curve
from edgesd.compress.moments import Moments, features, rows
from edgesd.compress.plan import PrunePlan, apply
from edgesd.compress.prune import CHART, prune
from edgesd.compress.replay import lockstep
from edgesd.errors import DataError, RequestError
from edgesd.models.load import load
from edgesd.models.weights import SIDECAR


def error(model, module, calls):
    """Relative squared error of a pruned UNet on recorded calls."""
    batch = batches("unet", calls)[0]
    with torch.no_grad():
        wanted, got = batch.forward(model.modules["unet"]), batch.forward(module)
    return float((wanted - got).square().sum() / wanted.square().sum())


# ---- moments and layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 3, stride=2), nn.Linear(6, 5)])
def test_features_times_weight_is_the_layer(layer):
    x = torch.randn(2, 3, 7, 6) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4, 6)
    with torch.no_grad():
        made = features(layer, x) @ layer.weight.flatten(1).T + layer.bias
        assert torch.allclose(made, rows(layer, layer(x)), atol=1e-5)


def test_least_squares_finds_an_affine_map_and_its_bias():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(500, 6) + 3, torch.randn(4, 6), torch.randn(4)
    y, root = x @ weight.T + bias, torch.rand(500, 1) + 0.1
    sums = Moments(6, 4)
    for part in range(5):
        one = slice(part * 100, part * 100 + 100)
        sums.add(root[one], x[one] * root[one], y[one] * root[one])
    found, shift = sums.solve(1e-9)
    assert torch.allclose(found.float(), weight, atol=1e-3)
    assert torch.allclose(shift.float(), bias, atol=1e-2)
    scaled = x * root
    mean = scaled.T @ root / root.square().sum()
    assert torch.allclose(sums.covariance().float(), scaled.T @ scaled / root.square().sum() - mean @ mean.T, atol=1e-3)


def test_columns_that_hardly_vary_about_a_large_mean_are_told_apart():
    torch.manual_seed(0)
    small, weight = torch.randn(4000, 8) * 0.01, torch.randn(3, 8)
    sums = Moments(8, 3)
    for part in small.split(500):
        sums.add(torch.ones(500, 1), part + 300, part @ weight.T - 50)
    found, shift = sums.solve(1e-6)
    assert torch.allclose(found.float(), weight, atol=0.05)
    assert torch.allclose(
        shift + (found @ torch.full((8,), 300.0).double()), torch.full((3,), -50.0).double(), atol=1e-2
    )
    assert torch.allclose(sums.second().sqrt().float(), torch.full((8, 8), 300.0), atol=0.1)


def test_pairs_count_as_guidance_combines_them(calls):
    batch = batches("unet", calls[:2])[0]
    plain, guided = batch.mixed(torch.tensor([[1.0], [2.0], [5.0], [7.0]]))
    root, g = batch.weight.sqrt(), batch.guidance
    assert torch.allclose(guided[0][:, 0], root * (torch.tensor([1.0, 2.0]) * (1 - g) + torch.tensor([5.0, 7.0]) * g))
    assert torch.allclose(plain[0][:, 0], root.repeat(2) * torch.tensor([1.0, 2.0, 5.0, 7.0]))


# ---- lanes ------------------------------------------------------------------------------------------------------


def test_lanes_wait_together_and_later_layers_may_change():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    inputs, done = [torch.randn(4, 3) for _ in range(3)], {}
    lanes = [(net, lambda m, i=i, x=x: done.__setitem__(i, m(x))) for i, x in enumerate(inputs)]
    order = []
    for halts in lockstep(lanes, {"2", "3"}, {"0"}):
        order.append(halts[0].name)
        assert len(halts) == 3
        assert all(torch.equal(h.seen["0"], x) for h, x in zip(halts, inputs, strict=True))
        if halts[0].name == "2":
            net[3].weight.data.zero_()
            halts[1].x = torch.zeros_like(halts[1].x)
    assert order == ["2", "3"]
    assert all(torch.allclose(done[i], net[3].bias.expand(4, 2)) for i in range(3))


def test_an_error_in_a_lane_comes_out_and_leaving_early_ends_all():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes"):
        list(lockstep([(net, lambda m: m(torch.zeros(1, 3))), (net, lambda m: m(torch.zeros(1, 4)))], {"1"}))
    for _ in lockstep([(net, lambda m: m(torch.zeros(1, 3)))] * 2, {"0", "1"}):
        break
    assert not net[0]._forward_pre_hooks


# ---- importance and allocation ----------------------------------------------------------------------------------


def test_every_criterion_orders_every_group(model, calls):
    module = model.modules["unet"]
    groups = [g for g in find_groups(module) if g.name.startswith("mid_block")]
    lots = batches("unet", calls[:8])
    evidence = {name: collect(module, groups, lots, name) for name in ("merge", "taylor")}
    for name in IMPORTANCE:
        for found in evidence["taylor" if name == "taylor" else "merge"].values():
            for method in ("ls", "bias", "none"):
                made = curve(found, name, method)
                assert sorted(made.order) == list(range(found.group.units))
                if method == "ls":
                    assert list(made.errors) == sorted(made.errors)
    one = evidence["taylor"]["mid_block.resnets.0"]
    others = [curve(one, name, "ls").errors[0] for name in IMPORTANCE if name != "merge"]
    assert curve(one, "obs", "ls").errors[0] <= min(others) + 1e-9
    for name in ("l1", "obs"):
        assert curve(one, name, "ls").errors[-1] <= curve(one, name, "bias").errors[-1]


def test_gradients_in_small_portions_are_those_of_whole_batches(model, calls, monkeypatch):
    module = model.modules["unet"]
    groups = [g for g in find_groups(module) if g.name.startswith("mid_block")]
    lots = batches("unet", calls[:5])
    found = []
    for positions in (5 * 64, 2 * 64):  # all five calls at once; two, two and one
        monkeypatch.setattr(evidence_module, "GRAPH_LATENTS", positions)
        found.append(collect(module, groups, lots, "taylor"))
    whole, portions = found
    assert whole.keys() == portions.keys()
    for name, one in whole.items():
        torch.testing.assert_close(portions[name].gain, one.gain, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(portions[name].taylor, one.taylor, rtol=1e-4, atol=1e-9)


def test_a_unit_that_says_nothing_goes_first(model, calls):
    from edgesd.models.modules import share

    module = share(model.modules["unet"])
    group = next(g for g in find_groups(module) if g.name == "up_blocks.1.resnets.1")
    conv = module.get_submodule(group.consumer)
    conv.weight = nn.Parameter(conv.weight.index_fill(1, group.channels([1, 3]), 0.0), requires_grad=False)
    found = collect(module, [group], batches("unet", calls[:4]), "taylor")[group.name]
    for name in ("wanda", "taylor", "obs"):
        made = curve(found, name, "ls")
        assert set(made.order[:2]) == {1, 3}, name
        assert made.errors[0] < 1e-9


def plain_groups():
    groups = [dataclasses.replace(g, macs=100, params=10) for g in find_groups(tiny.unet("sd1"))]
    flat = {
        g.name: Curve(tuple(range(g.units)), tuple(float(i + 1) for i in range((g.units - 1) // g.step)))
        for g in groups
    }
    return groups, flat


def cost(macs):
    from edgesd.models.count import Cost

    return Cost(params=macs, bytes=macs, macs=macs, by_module={})


def test_uniform_takes_the_same_share_and_global_the_cheapest():
    groups, curves = plain_groups()
    whole = cost(sum(g.macs * g.units for g in groups))
    kept = allocate(curves, groups, whole, 0.25, allocation="uniform", careful=1.0)
    left = [len(kept[g.name]) / g.units for g in groups]
    assert min(left) >= 0.5
    dear = {
        name: Curve(c.order, tuple(e * (1 if "resnets" in name else 1e6) for e in c.errors))
        for name, c in curves.items()
    }
    taken = allocate(dear, groups, whole, 0.02, careful=1.0)
    assert all(len(taken[g.name]) == g.units for g in groups if "resnets" not in g.name)
    assert sum((g.units - len(taken[g.name])) * g.macs for g in groups) >= 0.02 * whole.macs


def test_protection_and_what_is_out_of_reach():
    groups, curves = plain_groups()
    whole = cost(sum(g.macs * g.units for g in groups))
    kept = allocate(curves, groups, whole, 0.1, protect=["*attn*"])
    assert all(len(kept[g.name]) == g.units for g in groups if "attn" in g.name)
    with pytest.raises(RequestError, match="matches no group"):
        allocate(curves, groups, whole, 0.1, protect=["nowhere*"])
    with pytest.raises(RequestError, match=r"up to 0\.\d+"):
        allocate(curves, groups, whole, 0.89)
    with pytest.raises(RequestError, match=r"up to 0\.000"):
        allocate(curves, groups, whole, 0.1, protect=["*"])


# ---- the whole ---------------------------------------------------------------------------------------------------


def test_restoration_beats_none_and_the_written_checkpoint_is_it(model, calls, tmp_path):
    made = {
        method: prune(model, 0.15, calls, importance="l1", restoration=method, allocation="uniform")
        for method in ("none", "ls")
    }
    assert error(model, made["ls"].module, calls) < 0.5 * error(model, made["none"].module, calls)
    assert made["none"].plan.before == made["ls"].plan.before

    out = tmp_path / "smaller"
    before = json.dumps({k: float(v.double().sum()) for k, v in model.modules["unet"].state_dict().items()})
    done = prune(model, 0.2, calls, out)
    assert json.dumps({k: float(v.double().sum()) for k, v in model.modules["unet"].state_dict().items()}) == before
    plan = done.plan
    assert 0.2 <= 1 - plan.after.macs / plan.before.macs < 0.23
    assert plan.after.params == sum(p.numel() for p in done.module.parameters())
    assert (out / CHART).read_bytes()[:4] == b"\x89PNG"
    again = load(str(out))
    batch = batches("unet", calls[:4])[0]
    with torch.no_grad():
        assert torch.allclose(batch.forward(again.modules["unet"]), batch.forward(done.module), atol=1e-4)
    assert again.spec.defaults == model.spec.defaults
    assert again.sha256 != model.sha256
    assert PrunePlan.parse(json.loads((out / SIDECAR).read_text())["pruned"]["unet"]) == plan
    with pytest.raises(RequestError, match="pruned already"):
        prune(again, 0.1, calls)
    cut_alone = apply(plan, model.modules["unet"])
    assert {k: v.shape for k, v in cut_alone.state_dict().items()} == {
        k: v.shape for k, v in done.module.state_dict().items()
    }
    check_hostile_plans(out)


def check_hostile_plans(out):
    """A sidecar from elsewhere: wrong groups, wrong units, wrong weights."""
    sidecar = json.loads((out / SIDECAR).read_text())
    for change in (
        {"name": "nowhere"},
        {"kept": [5, 3]},
        {"kept": []},
        {"units": 10**9},
        {"unit_size": 3},
        {"kept": [0]},
    ):
        bad = json.loads(json.dumps(sidecar))
        bad["pruned"]["unet"]["groups"][0] |= change
        (out / SIDECAR).write_text(json.dumps(bad))
        with pytest.raises(DataError):
            load(str(out))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"ratio": 0.0}, "ratio"), ({"ratio": 0.9}, "ratio"), ({"ratio": float("nan")}, "ratio"),
        ({"importance": "best"}, "obs"),
        ({"restoration": "magic"}, "ls"), ({"component": "tokenizer"}, "unet"), ({"calls": []}, "recorded calls"),
        ({"protect": ["nowhere"]}, "matches no group"), ({"ratio": 0.85, "importance": "l1"}, "up to 0"),
    ],
)  # fmt: skip
def test_bad_requests_write_nothing(model, calls, tmp_path, wrong, told):
    given = {"ratio": 0.2, "calls": calls[:8], "importance": "l1"} | wrong
    with pytest.raises(RequestError, match=told):
        prune(model, out=tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_name_the_layer(model, calls, tmp_path):
    broken = [
        dataclasses.replace(c, inputs={**c.inputs, "sample": np.full_like(c.inputs["sample"], np.nan)})
        for c in calls[:8]
    ]
    with pytest.raises(DataError, match=r"down_blocks.*steps?"):
        prune(model, 0.2, broken, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- few rows, big layers ------------------------------------------------------------------------------------------


def test_views_hold_what_the_rows_can_tell():
    conv, linear = nn.Conv2d(16, 8, 3), nn.Linear(16, 8)
    assert moments.view(conv, 16, 10_000) == moments.View(144, True, 1)
    assert moments.view(conv, 16, 500) == moments.View(16, False, 1)  # 144 unfolded inputs need 576 rows
    assert moments.view(linear, 16, 10) == moments.View(16, True, 1)
    big = moments.view(conv, 16, 1e9)
    assert big.stride > 1
    assert 1e9 / big.stride * 144**2 <= moments.WORK
    thinned = dataclasses.replace(big, stride=3).thin(torch.arange(20.0).view(20, 1), 2)
    assert thinned.flatten().tolist() == [0, 3, 6, 9, 10, 13, 16, 19]


def test_restoring_by_channel_still_beats_none(model, calls, monkeypatch):
    options = {"importance": "l1", "allocation": "uniform"}
    none = prune(model, 0.15, calls, restoration="none", **options)
    taps = prune(model, 0.15, calls, **options)
    monkeypatch.setattr(moments, "ROWS_PER_COLUMN", 1e9)  # never enough rows for the taps
    channels = prune(model, 0.15, calls, **options)
    assert error(model, taps.module, calls) < error(model, channels.module, calls)
    assert error(model, channels.module, calls) < 0.6 * error(model, none.module, calls)
    monkeypatch.setattr(moments, "WORK", 1e6)  # and few positions of each call
    thin = prune(model, 0.15, calls, **options)
    assert error(model, thin.module, calls) < error(model, none.module, calls)


# ---- latency ---------------------------------------------------------------------------------------------------------


def test_latency_is_interpolated_and_bought_where_it_is_cheap():
    groups, curves = plain_groups()
    slow = next(g.name for g in groups if "resnets" in g.name and "mid" in g.name)
    blocks = {g.name: [(1, 1.0), (g.units, 5.0 if g.name == slow else 1.001)] for g in groups}
    found = latency.Latency("openvino", 10.0, blocks)
    assert found.saved(slow, 0) == 0
    half = found.saved(slow, 1)
    assert 0 < half < found.saved(slow, 2) <= 4
    kept = allocate(curves, groups, cost(1), 0.1, budget="latency", latency=found, careful=1.0)
    assert len(kept[slow]) < next(g.units for g in groups if g.name == slow)
    assert sum(found.saved(g.name, g.units - len(kept[g.name])) for g in groups) >= 1.0
    with pytest.raises(RequestError, match=r"up to 0\.\d+"):
        allocate(curves, groups, cost(1), 0.85, budget="latency", latency=found, careful=1.0)
    with pytest.raises(RequestError, match="target"):
        allocate(curves, groups, cost(1), 0.1, budget="latency")


def test_latency_is_measured_on_the_target_itself(model, calls):
    done = prune(model, 0.02, calls[:8], importance="l1", restoration="none", budget="latency", target="openvino")
    plan = done.plan
    assert plan.target == "openvino"
    assert plan.before.seconds > 0 < plan.after.seconds
    assert plan.after.macs < plan.before.macs
    for wrong in ({"target": "coreml"}, {"target": None}, {"budget": "macs"}, {"component": "text_encoder"}):
        with pytest.raises(RequestError):
            prune(model, 0.1, calls[:8], **({"budget": "latency", "target": "openvino"} | wrong))
