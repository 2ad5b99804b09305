"""What a request comes to before any model is opened."""

import pytest
import torch_target

from edgesd import buildplan, targets
from edgesd.errors import RequestError
from edgesd.recipe import make_recipe


@pytest.mark.parametrize(
    ("asked", "target", "flavours", "prune"),
    [
        ({}, "openvino", [("int8", "")], None),
        ({"profile": "balanced"}, "onnx-web", [("int8", "wasm"), ("fp16", "webgpu")], None),
        ({"profile": "quality"}, "onnx-web", [("fp32", "wasm"), ("fp16", "webgpu")], None),
        ({"profile": "quality"}, "coreml", [("fp16", "")], None),
        ({"profile": "small"}, "tflite", [("int8", "")], 0.25),
        ({"profile": "small", "prune": 0.4, "precision": "w8"}, "tflite", [("w8", "")], 0.4),
        ({"precision": "int8"}, "onnx-web", [("int8", "wasm")], None),
    ],
)
def test_a_profile_sets_precision_and_pruning_and_single_fields_win(asked, target, flavours, prune):
    made = make_recipe(target=target, **asked)
    assert buildplan.flavours(made, targets.load(target)) == flavours
    assert made.prune == prune


def test_the_default_says_what_to_do_where_a_target_has_no_int8():
    with pytest.raises(RequestError, match=r"profile balanced for torch, which has no int8.*--profile quality"):
        buildplan.flavours(make_recipe(target="torch"), torch_target)


def test_a_profile_that_is_none_is_told_with_those_there_are():
    with pytest.raises(RequestError, match=r"profile = 'tiny'.*'quality', 'balanced' or 'small'"):
        make_recipe(target="openvino", profile="tiny")
