"""ComponentSession with made-up calls: choosing variants, checking inputs, chunks, memory."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from edgesd import manifest as schema
from edgesd.errors import DataError, RequestError
from edgesd.runtime.session import Session
from edgesd.targets._session import ComponentSession

SIZE = (64, 64)


def f32(name, *shape):
    return schema.TensorSpec(name=name, dtype="float32", shape=shape)


def variant(name, component, inputs, outputs, **axes):
    axes = schema.Axes(**({"size_px": SIZE} | axes))
    return component, schema.Variant(axes=axes, files=(name,), inputs=inputs, outputs=outputs)


def unet(name, **axes):
    rows, side = axes.get("batch", 1), axes.get("size_px", SIZE)[0] // 8
    return variant(
        name, "unet", (f32("sample", rows, 4, side, side),), (f32("model_output", rows, 4, side, side),), **axes
    )


def text(name, **axes):
    ids = schema.TensorSpec(name="input_ids", dtype="int32", shape=(1, 3))
    return variant(name, "text_encoder", (ids,), (f32("encoder_hidden_states", 1, 3, 2),), **axes)


def bundle(*variants):
    facts = tiny.spec().model_copy(update={"defaults": schema.Defaults(sampler="euler", size_px=SIZE)})
    names = dict.fromkeys(component for component, _ in variants)
    paths = {file for _, v in variants for file in v.files} | {"tokenizer/tokenizer.json", "t"}
    return schema.Manifest(
        target="made-up",
        model=facts,
        components=tuple(
            schema.Component(name=name, variants=tuple(v for component, v in variants if component == name))
            for name in names
        ),
        samplers=(schema.SamplerFile(name="euler", file="t", steps=(1,)),),
        provenance=schema.Provenance(source="x", sha256="0" * 64),
        files=tuple(schema.FileEntry(path=path, bytes=0, sha256="0" * 64) for path in sorted(paths)),
    )


class Opened(list):
    """Names of the files opened so far. A call gives each output its file's place in that list, as a shared buffer."""

    def __call__(self, chosen, files):
        self.append(files[0].name)
        buffers = {spec.name: np.full(spec.shape, len(self), np.float32) for spec in chosen.outputs}

        def call(inputs):
            assert {spec.name: (spec.shape, spec.dtype) for spec in chosen.inputs} == {
                name: (x.shape, x.dtype.name) for name, x in inputs.items()
            }
            for buffer in buffers.values():
                buffer += 10
            return buffers

        return call


def opened(folder, manifest, **options):
    for entry in manifest.files:
        (folder / entry.path).parent.mkdir(exist_ok=True)
        (folder / entry.path).touch()
    files = Opened()
    return files, ComponentSession(folder, manifest, files, **options)


def sample(rows=1, side=8):
    return {"sample": np.zeros((rows, 4, side, side), np.float32)}


IDS = {"input_ids": np.array([[1, 2, 3]])}


def test_it_is_a_session_and_opens_on_first_use(tmp_path):
    files, session = opened(tmp_path, bundle(text("t32"), unet("u1")))
    assert isinstance(session, Session)
    assert files == []
    assert session.has("unet")
    assert not session.has("vae_encoder")
    session.run("text_encoder", IDS)
    session.run("text_encoder", IDS)
    assert files == ["t32"]
    session.unload("text_encoder")
    session.run("text_encoder", IDS)
    assert files == ["t32", "t32"]


def test_outputs_belong_to_the_caller(tmp_path):
    _, session = opened(tmp_path, bundle(unet("u1")))
    first = session.run("unet", sample())["model_output"]
    kept = first.copy()
    session.run("unet", sample())
    np.testing.assert_array_equal(first, kept)
    first += 1


def test_the_batch_is_chosen_by_the_rows_given(tmp_path):
    files, session = opened(tmp_path, bundle(unet("u1"), unet("u2", batch=2)))
    assert session.batches("unet") == (1, 2)
    assert len(session.run("unet", sample(2))["model_output"]) == 2
    assert len(session.run("unet", sample(1))["model_output"]) == 1
    assert files == ["u2", "u1"]
    with pytest.raises(RequestError, match="shape"):
        session.run("unet", sample(3))
    assert opened(tmp_path, bundle(unet("u1"), unet("u2", batch=2)), batch=1)[1].batches("unet") == (1,)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, ["t32", "u32"]),
        ({"precision": "fp16"}, ["t16", "u16"]),
        ({"precision": "int8"}, ["t32", "u8"]),
        ({"width": 0.5}, ["t32", "uhalf"]),
        ({"form": "webgpu"}, ["t16", "u16"]),
    ],
)
def test_options_pick_the_variant_where_a_component_has_one(tmp_path, options, want):
    half = {"precision": "fp16", "form": "webgpu"}
    manifest = bundle(
        text("t32"),
        text("t16", **half),
        unet("u32"),
        unet("u16", **half),
        unet("u8", precision="int8"),
        unet("uhalf", width=0.5),
    )
    files, session = opened(tmp_path, manifest, **options)
    session.load("text_encoder")
    session.load("unet")
    assert files == want


def test_the_models_own_size_comes_first_and_another_must_be_there(tmp_path):
    manifest = bundle(text("t32", size_px=(128, 128)), unet("ubig", size_px=(128, 128)), unet("uown"))
    files, session = opened(tmp_path, manifest)
    session.run("unet", sample())
    assert files == ["uown"]
    files, session = opened(tmp_path, manifest, size_px=(128, 128))
    session.run("unet", sample(side=16))
    assert files == ["ubig"]
    with pytest.raises(RequestError, match="128x128, 64x64"):
        opened(tmp_path, manifest, size_px=(128, 64))


@pytest.mark.parametrize(
    "options", [{"precision": "w8"}, {"width": 0.25}, {"form": "gpu"}, {"device": "GPU"}, {"batch": 2}]
)
def test_what_no_component_has_is_refused(tmp_path, options):
    with pytest.raises(RequestError):
        opened(tmp_path, bundle(text("t32"), unet("u1")), **options)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"sample": np.zeros((1, 4, 8, 9), np.float32)},
        {"sample": np.zeros((4, 8, 8), np.float32)},
        {"sample": np.zeros((1, 4, 8, 8), np.complex64)},
        {**sample(), "extra": np.zeros(1)},
    ],
)
def test_wrong_inputs_are_refused_before_the_runtime_sees_them(tmp_path, inputs):
    files, session = opened(tmp_path, bundle(text("t32"), unet("u1")))
    with pytest.raises(RequestError, match="unet"):
        session.run("unet", inputs)
    with pytest.raises(RequestError, match="int32"):
        session.run("text_encoder", {"input_ids": np.zeros((1, 3))})
    with pytest.raises(RequestError, match="vae_decoder"):
        session.run("vae_decoder", inputs)
    assert files == []


def test_one_at_a_time_lets_go_of_the_others(tmp_path):
    files, session = opened(tmp_path, bundle(text("t32"), unet("u1")), one_at_a_time=True)
    for _ in range(2):
        session.run("text_encoder", IDS)
        session.run("unet", sample())
    assert files == ["t32", "u1"] * 2


def test_chunks_run_in_order_and_hand_on_what_they_make(tmp_path):
    def chunk(index, inputs, outputs):
        return variant(f"c{index}", "unet", inputs, outputs, chunk=(index, 2))

    middle, skip = f32("middle", 1, 5), f32("skip", 1, 6)
    first = chunk(0, (f32("sample", 1, 4, 8, 8), f32("timestep", 1)), (middle, skip))
    second = chunk(1, (middle, skip, f32("timestep", 1)), (f32("model_output", 1, 4, 8, 8),))
    files, session = opened(tmp_path, bundle(second, first))
    inputs = sample() | {"timestep": np.zeros(1, np.float32)}
    assert list(session.run("unet", inputs)) == ["model_output"]
    assert files == ["c0", "c1"]
    with pytest.raises(DataError, match="chunk"):
        opened(tmp_path, bundle(second))


def test_a_vendors_failure_names_the_component(tmp_path):
    def broken(chosen, files):
        def call(inputs):
            raise RuntimeError("index 9 out of bounds\nstack of calls")

        return call

    manifest = bundle(unet("u1"))
    opened(tmp_path, manifest)
    with pytest.raises(DataError, match="unet stopped while running: index 9 out of bounds") as caught:
        ComponentSession(tmp_path, manifest, broken).run("unet", sample())
    assert "stack" not in str(caught.value)
