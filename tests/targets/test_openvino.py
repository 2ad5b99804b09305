"""openvino: what is lowered, run by OpenVINO on the CPU, against torch."""

from __future__ import annotations

import lowered
import numpy as np
import pytest
import tiny

from edgesd import targets
from edgesd.errors import DataError, RequestError, SetupError
from edgesd.manifest import Axes
from edgesd.models.modules import build


@pytest.fixture(scope="module")
def target():
    return targets.load("openvino", lowering=True)


@pytest.fixture(scope="module")
def converting_once(target):
    """Both precisions are saved from one conversion, which takes most of the time."""
    made, convert = {}, target._convert

    def converted(component):
        key = component.name, component.inputs
        made[key] = made[key] if key in made else convert(component)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "_convert", converted)
        yield


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def embedded(request, target, converting_once, tmp_path_factory):
    return lowered.embedded(target, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def small(target, tmp_path_factory):
    return lowered.small(target, tmp_path_factory.mktemp("small"), precision="fp16")


def test_every_component_of_the_embedded_model_meets_its_floor(embedded, target):
    lowered.check_floors(target, *embedded)


def test_float16_weights_halve_the_file_and_keep_the_timestep(embedded, target):
    precision, folder, manifest, components = embedded
    file = folder / manifest.component("unet").variants[0].files[1]
    weights = sum(p.numel() for p in components["unet"].module.parameters())
    assert file.stat().st_size == pytest.approx(weights * {"fp16": 2, "fp32": 4}[precision], rel=0.01)
    # Late timesteps turn the sinusoids by hundreds of radians: frequencies rounded to float16 would show here.
    inputs, _ = tiny.real_calls(components)["unet"]
    inputs["timestep"] = np.array([999.0], np.float32)
    import torch

    with torch.no_grad():
        truth = components["unet"].module(*(torch.from_numpy(np.array(x)) for x in inputs.values())).numpy()
    got = target.open(folder, manifest, threads=1).run("unet", inputs)["model_output"]
    assert tiny.snr_db(truth, got) > 90


def test_shapes_are_static_and_names_are_edgesds(small):
    import openvino as ov

    folder, manifest, components = small
    for component in manifest.components:
        model = ov.Core().read_model(folder / component.variants[0].files[0])
        assert not model.is_dynamic()
        ports = (*model.inputs, *model.outputs)
        specs = (*components[component.name].inputs, *components[component.name].outputs)
        assert [(port.any_name, tuple(port.shape)) for port in ports] == [(s.name, s.shape) for s in specs]


def test_native_precision_and_the_compiled_cache(small, target, tmp_path):
    folder, manifest, components = small
    inputs, truth = tiny.real_calls(components)["vae_decoder"]
    session = target.open(folder, manifest, hint="native", cache_dir=tmp_path)
    # bf16 keeps 8 bits: about 40 dB; a processor without it computes in float32 and does better.
    assert tiny.snr_db(truth["image"], session.run("vae_decoder", inputs)["image"]) > 30
    assert any(tmp_path.iterdir())


def test_operations_are_counted_as_the_device_runs_them(small, target):
    folder, manifest, components = small
    counts = target.count_operations(folder / manifest.component("vae_decoder").variants[0].files[0]).counts
    convolutions = sum(type(layer).__name__ == "Conv2d" for layer in components["vae_decoder"].module.modules())
    assert sum(n for (kind, _), n in counts.items() if kind == "Convolution") == convolutions


def test_an_absent_device_says_which_are_here(small, target):
    folder, manifest, _ = small
    with pytest.raises(SetupError, match="CPU"):
        target.open(folder, manifest, device="NPU.7")
    assert "CPU" in target.devices()


def test_unknown_hints_and_precisions_are_refused(small, target, tmp_path):
    folder, manifest, _ = small
    with pytest.raises(RequestError, match="native"):
        target.open(folder, manifest, hint="f64")
    axes = Axes(size_px=tiny.SIZE_PX, form="webgpu")
    with pytest.raises(RequestError, match="fp16"):
        target.lower(build("vae_decoder", tiny.modules(), tiny.spec(), axes), axes, tmp_path)


def test_a_damaged_file_is_a_data_error(small, target, tmp_path):
    folder, manifest, components = small
    graph, weights = manifest.component("vae_decoder").variants[0].files
    inputs, _ = tiny.real_calls(components)["vae_decoder"]
    (tmp_path / weights).write_bytes((folder / weights).read_bytes())
    (tmp_path / graph).write_bytes((folder / graph).read_bytes()[:900])
    with pytest.raises(DataError, match="does not load"):
        target.open(tmp_path, manifest).run("vae_decoder", inputs)
    (tmp_path / graph).write_bytes((folder / graph).read_bytes())
    (tmp_path / weights).write_bytes((folder / weights).read_bytes()[:900])
    with pytest.raises(DataError, match="does not load"):
        target.open(tmp_path, manifest).run("vae_decoder", inputs)
