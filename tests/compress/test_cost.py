"""What pruning says a model costs, against the ONNX graph that really comes out."""

import math

import onnx
import pytest
import tiny
import torch
from onnx import shape_inference

from edgesd import targets
from edgesd.calibration.capture import calibrate
from edgesd.compress.prune import prune
from edgesd.manifest import Axes
from edgesd.models.load import load
from edgesd.models.modules import build


def graph_of(modules, spec, size_px, folder):
    """The UNet as onnx-web ships it, with every shape inferred; weights stay on disk."""
    axes = Axes(size_px=size_px, precision="fp32")
    folder.mkdir()
    lowered = targets.load("onnx-web", lowering=True).lower(build("unet", modules, spec, axes), axes, folder)
    model = onnx.load(folder / lowered.files[0], load_external_data=False)
    return shape_inference.infer_shapes(model, data_prop=True).graph


def cost_of(graph):
    """MACs of Conv, Gemm and MatMul nodes."""
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    macs = 0
    for node in graph.node:
        if node.op_type == "Conv":
            macs += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("MatMul", "Gemm"):
            transposed = next((a.i for a in node.attribute if a.name == "transA"), 0)
            macs += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-2 if transposed else -1]
    return macs


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_reported_cost_is_that_of_the_exported_graph(family, tmp_path):
    model = load(tiny.folder(family, tmp_path / family))
    with torch.no_grad():
        for parameter in model.modules["unet"].parameters():  # the exporter would share equal ones
            parameter += 0.01 * torch.randn_like(parameter)
    calls = calibrate(model, tmp_path / "set", calls=20, steps=(4,)).calls("unet")
    done = prune(model, 0.15, calls, tmp_path / "out")
    pruned = load(str(tmp_path / "out"))
    for name, one, size in (("dense", model, done.plan.before), ("pruned", pruned, done.plan.after)):
        graph = graph_of(one.modules, one.spec, one.spec.defaults.size_px, tmp_path / name)
        assert cost_of(graph) == size.macs
        assert sum(p.numel() for p in one.modules["unet"].parameters()) == size.params
        # The graph holds every parameter once (some transposed), and some small constants beside.
        assert size.params <= sum(math.prod(i.dims) for i in graph.initializer) <= 1.02 * size.params + 2000
