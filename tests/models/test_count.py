"""Parameters and multiply-accumulates against numbers worked out by hand and against the exported graph's form."""

import pytest
import tiny
import torch
from torch import nn

from edgesd.manifest import Axes
from edgesd.models.count import count
from edgesd.models.modules import build


def test_layers_by_hand():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
    assert count(conv, [torch.empty(2, 3, 8, 6)]).macs == 2 * 4 * 3 * 8 * 27
    assert count(nn.Conv2d(8, 8, 3, padding=1, groups=8), [torch.empty(1, 8, 5, 5)]).macs == 25 * 8 * 9
    linear = count(nn.Linear(6, 5), [torch.empty(3, 7, 6)])
    assert (linear.macs, linear.params, linear.bytes) == (3 * 7 * 30, 35, 140)


class Attention(nn.Module):
    def forward(self, q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k)


def test_attention_counts_both_products():
    cost = count(Attention(), [torch.empty(2, 4, 10, 8), torch.empty(2, 4, 7, 8)])
    assert cost.macs == 2 * (2 * 4 * 10 * 7 * 8)


def test_tied_weights_count_once_and_children_add_up():
    shared = nn.Linear(4, 4)
    cost = count(nn.Sequential(shared, nn.ReLU(), shared), [torch.empty(1, 4)])
    assert cost.params == 20
    assert cost.macs == 32 == cost.by_module[""]


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_a_module_costs_what_its_exported_form_costs(name):
    modules, spec = tiny.modules("sd1"), tiny.spec("sd1")
    component = build(name, modules, spec, Axes(size_px=(64, 64)))
    form = count(component.module, component.example)
    graph = torch.export.export(component.module, component.example).run_decompositions()
    assert form.macs == sum(_node_macs(node) for node in graph.graph.nodes)
    if name == "unet":
        sample, timestep, text = component.example
        assert count(modules["unet"], [sample, timestep, text]).macs == form.macs


def _node_macs(node: torch.fx.Node) -> int:
    """The rule an ONNX graph is counted by: Conv, Gemm and MatMul."""

    def shape(arg: object) -> torch.Size:
        return arg.meta["val"].shape

    if node.target is torch.ops.aten.convolution.default:
        return node.meta["val"].numel() * shape(node.args[1])[1:].numel()
    if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
        return node.meta["val"].numel() * shape(node.args[0])[-1]
    if node.target is torch.ops.aten.addmm.default:
        return node.meta["val"].numel() * shape(node.args[1])[-1]
    return 0
