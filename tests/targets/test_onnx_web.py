"""onnx-web: what is lowered, run by onnxruntime on a desktop, against torch."""

from __future__ import annotations

import lowered
import numpy as np
import onnx
import pytest
import tiny

from edgesd import targets
from edgesd.errors import DataError, RequestError
from edgesd.manifest import Axes
from edgesd.models.modules import build


@pytest.fixture(scope="module")
def target():
    return targets.load("onnx-web", lowering=True)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def embedded(request, target, tmp_path_factory):
    return lowered.embedded(target, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small(target, tmp_path_factory):
    return lowered.small(target, tmp_path_factory.mktemp("small"))


def test_every_component_of_the_embedded_model_meets_its_floor(embedded, target):
    lowered.check_floors(target, *embedded)


def test_files_are_self_contained_and_name_no_path_of_the_machine_that_made_them(embedded):
    _, folder, manifest, _ = embedded
    for component in manifest.components:
        graph, *weights = component.variants[0].files
        assert len(weights) == 1
        text = (folder / graph).read_bytes()
        assert b"site-packages" not in text
        assert b".py" not in text
        model = onnx.load(folder / graph, load_external_data=False)
        assert (model.ir_version, model.opset_import[0].version) == (10, 21)
        onnx.checker.check_model(str(folder / graph))


def test_float16_stays_inside_float32_borders(embedded, target):
    precision, folder, manifest, _ = embedded
    graph = onnx.load(folder / manifest.component("unet").variants[0].files[0], load_external_data=False).graph
    weights = {
        onnx.helper.tensor_dtype_to_np_dtype(t.data_type).name for t in graph.initializer if np.prod(t.dims) > 99
    }
    assert weights == {"fp32": {"float32"}, "fp16": {"float16"}}[precision]
    assert {t.type.tensor_type.elem_type for t in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    waves = {node.op_type: node.input[0] for node in graph.node if node.op_type in ("Sin", "Cos")}
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    assert {types[name] for name in waves.values()} == {onnx.TensorProto.FLOAT}


def test_sdxl_in_float16_joins_its_pooled_text_and_time(target, tmp_path):
    axes = Axes(size_px=tiny.SIZE_PX, precision="fp16")
    manifest, components = tiny.lower_all(target, tmp_path, tiny.modules("sdxl"), tiny.spec("sdxl"), axes, ("unet",))
    inputs, truth = tiny.real_calls(components)["unet"]
    got = target.open(tmp_path, manifest).run("unet", inputs)
    assert tiny.snr_db(truth["model_output"], got["model_output"]) > 45


def test_operations_are_counted_as_the_runtime_runs_them(small, target):
    folder, manifest, components = small
    counts = target.count_operations(folder / manifest.component("vae_decoder").variants[0].files[0]).counts
    convolutions = sum(type(layer).__name__ == "Conv2d" for layer in components["vae_decoder"].module.modules())
    assert sum(n for (kind, _), n in counts.items() if kind in ("Conv", "FusedConv")) == convolutions
    assert {precision for _, precision in counts} == {"float32"}


def test_group_norms_become_kernels_that_browsers_have(embedded):
    _, folder, manifest, components = embedded
    graph = onnx.load(folder / manifest.component("unet").variants[0].files[0], load_external_data=False).graph
    norms = sum(type(layer).__name__ == "GroupNorm" for layer in components["unet"].module.modules())
    kinds = [node.op_type for node in graph.node]
    assert (kinds.count("InstanceNormalization"), kinds.count("GroupNormalization")) == (norms, 0)


def test_lowering_twice_gives_the_same_bytes(small, target, tmp_path):
    folder, manifest, components = small
    target.lower(components["vae_decoder"], Axes(size_px=tiny.SIZE_PX), tmp_path)
    for file in manifest.component("vae_decoder").variants[0].files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_weights_beyond_the_file_limit_are_split(target, tmp_path, monkeypatch):
    parts, facts, axes = tiny.modules(), tiny.spec(), Axes(size_px=tiny.SIZE_PX)
    limited = type(target.capabilities)(precisions=("fp32",), max_file_bytes=5000)
    monkeypatch.setattr(target, "capabilities", limited)
    manifest, components = tiny.lower_all(target, tmp_path, parts, facts, axes, ("vae_decoder",))
    files = manifest.component("vae_decoder").variants[0].files
    assert len(files) > 2
    assert all((tmp_path / file).stat().st_size <= 5000 for file in files[1:])
    inputs, truth = tiny.real_calls(components)["vae_decoder"]
    got = target.open(tmp_path, manifest).run("vae_decoder", inputs)
    assert tiny.snr_db(truth["image"], got["image"]) > 90


def test_a_damaged_file_is_a_data_error(target, tmp_path):
    axes = Axes(size_px=tiny.SIZE_PX)
    manifest, components = tiny.lower_all(target, tmp_path, tiny.modules(), tiny.spec(), axes, ("vae_encoder",))
    graph, weights = (tmp_path / file for file in manifest.component("vae_encoder").variants[0].files)
    inputs, _ = tiny.real_calls(components)["vae_encoder"]
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"vae_encoder\.onnx does not load"):
        target.open(tmp_path, manifest).run("vae_encoder", inputs)
    weights.unlink()
    with pytest.raises(DataError, match=r"lacks vae_encoder\.data"):
        target.open(tmp_path, manifest).run("vae_encoder", inputs)
    graph.write_bytes(b"not a graph")
    weights.write_bytes(whole)
    with pytest.raises(DataError, match="does not load"):
        target.open(tmp_path, manifest).run("vae_encoder", inputs)


@pytest.mark.parametrize("change", [{"precision": "int8"}, {"precision": "fp16", "form": "wasm"}, {"form": "gpu"}])
def test_a_precision_or_form_it_does_not_make_is_refused(target, tmp_path, change):
    axes = Axes(size_px=tiny.SIZE_PX, **change)
    with pytest.raises(RequestError):
        target.lower(build("vae_decoder", tiny.modules(), tiny.spec(), axes), axes, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_exporter_keeps_off_the_terminal(target, tmp_path, capfd):
    axes = Axes(size_px=tiny.SIZE_PX)
    target.lower(build("vae_decoder", tiny.modules(), tiny.spec(), axes), axes, tmp_path)
    assert capfd.readouterr().out == ""
