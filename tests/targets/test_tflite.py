"""The TFLite target against torch, LiteRT's interpreter and LiteRT's own GPU compatibility check."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from edgesd import targets
from edgesd.errors import DataError, GateError, RequestError
from edgesd.manifest import (
    Axes,
    Component,
    FileEntry,
    Manifest,
    Provenance,
    SamplerFile,
    TensorSpec,
    Variant,
    dump,
)
from edgesd.models import load
from edgesd.models import modules as m
from edgesd.targets import _tflite_file, _tflite_gpu, tflite

pytest.importorskip("litert_torch")
AXES = Axes(size_px=tiny.SIZE_PX)


def toy(
    module: torch.nn.Module, *shapes: tuple[int, ...], outputs: tuple[tuple[str, tuple[int, ...]], ...]
) -> m.Component:
    """A component of float inputs z, y, x ... (not in alphabetical order) around any module."""
    inputs = tuple(TensorSpec(name=n, dtype="float32", shape=s) for n, s in zip("zyx", shapes, strict=False))
    made = tuple(TensorSpec(name=n, dtype="float32", shape=s) for n, s in outputs)
    example = tuple(torch.randn(s, generator=torch.Generator().manual_seed(5)) for s in shapes)
    return m.Component("unet", module.eval(), inputs, made, example)


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def run(path, arrays):
    """One call of the file in LiteRT's own interpreter, by signature."""
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_path=str(path), num_threads=1).get_signature_runner()(**arrays)


def snr_db(want, got):
    want = want.double().numpy()
    return 10 * np.log10((want**2).sum() / ((want - got) ** 2).sum())


def parity(component, axes, directory):
    """Lowers, runs the example, and returns (path, the worst SNR over the outputs in dB)."""
    lowered = tflite.lower(component, axes, directory)
    path = directory / lowered.files[0]
    arrays = {s.name: x.numpy().astype(s.dtype) for s, x in zip(lowered.inputs, component.example, strict=True)}
    with torch.no_grad():
        want = component.module(*component.example)
    want = want if isinstance(want, tuple) else (want,)
    got = run(path, arrays)
    return path, min(snr_db(w, got[s.name]) for s, w in zip(lowered.outputs, want, strict=True))


@pytest.fixture(scope="module")
def embedded():
    return load.load()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    tflite.lower(m.build("text_encoder", tiny.modules(), tiny.spec(), AXES), AXES, directory)
    return directory / "text_encoder.tflite"


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """Opens a file in LiteRT's GPU accelerator; a software Vulkan driver is enough."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator

    directory = tmp_path_factory.mktemp("gpu")
    relu = tflite.lower(toy(torch.nn.ReLU(), (1, 4), outputs=(("out", (1, 4)),)), AXES, directory)
    try:
        CompiledModel.from_file(str(directory / relu.files[0]), HardwareAccelerator.GPU)
    except RuntimeError:
        pytest.skip("LiteRT's GPU accelerator finds no adapter here")
    return lambda path: CompiledModel.from_file(str(path), HardwareAccelerator.GPU)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_the_embedded_model_equals_torch(name, embedded, tmp_path):
    axes = Axes(size_px=embedded.spec.defaults.size_px)
    path, db = parity(m.build(name, embedded.modules, embedded.spec, axes), axes, tmp_path)
    assert db >= 90
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.tflite"]
    counts = tflite.count_operations(path).counts
    assert not [key for key in counts if key[1] == "float16" or key[0].startswith("CUSTOM")]
    if name == "unet":
        weights = sum(p.numel() for p in embedded.modules["unet"].parameters())
        assert 4 * weights < path.stat().st_size < 4.2 * weights
        assert counts["CONV_2D", "float32"] == 50  # one per convolution: none was split, none folded away


@pytest.mark.parametrize(("name", "family"), [("vae_encoder", "sd1"), ("text_encoder_2", "sdxl")])
@pytest.mark.parametrize("form", ["", "gpu"])
def test_half_precision_weights_of_every_form(name, family, form, tmp_path):
    axes = AXES.model_copy(update={"precision": "fp16", "form": form})
    component = m.build(name, tiny.modules(family, "full"), tiny.spec(family, "full"), axes)
    path, db = parity(component, axes, tmp_path)
    assert 45 <= db < 90  # random weights are no float16 numbers: more would mean that nothing was rounded
    stored = [op for op in _tflite_file.read_operations(path) if op.name == "DEQUANTIZE"]
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    layers = sum(isinstance(module, kinds) for module in component.module.modules())
    assert {op.inputs[0].dtype for op in stored} == {"float16"}
    unstored = {"": 1, "gpu": 2}[form] if name.startswith("text") else 0  # positions are added; the table: below
    assert len(stored) >= layers - unstored


def check_gpu_form(component, directory):
    from ai_edge_litert import _pywrap_analyzer_wrapper as analyzer

    path, db = parity(component, AXES.model_copy(update={"form": "gpu"}), directory)
    assert db >= 90
    assert "compatible with GPU delegate" in analyzer.ModelAnalyzer(str(path), True, True)
    names = {name for name, _ in tflite.count_operations(path).counts}
    assert "REDUCE_MAX" in names
    assert not names & {"GELU", "SQUARED_DIFFERENCE"}  # the forms that overflow in float16 are gone


def test_the_gpu_form_of_a_transformer_block_is_equal_and_passes_both_checks(tmp_path):
    unet = m.build("unet", tiny.modules(), tiny.spec(), AXES).module.unet
    block = unet.down_blocks[0].attentions[0]  # group norm, layer norms, both attentions, GEGLU
    shape = (1, 16, 8, 12)
    call = Call(lambda states, text: block(states, encoder_hidden_states=text, return_dict=False)[0])
    call.block = block
    check_gpu_form(toy(call, shape, (1, tiny.TOKENS, tiny.TEXT), outputs=(("out", shape),)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lcm", "sdxl"])
def test_the_gpu_form_of_a_whole_unet_is_equal_and_passes_both_checks(family, tmp_path):
    axes = AXES.model_copy(update={"batch": 2})
    check_gpu_form(m.build("unet", tiny.modules(family), tiny.spec(family), axes), tmp_path)


def test_the_gpu_form_keeps_its_lookup_table_in_float32_and_says_so(tmp_path):
    component = m.build("text_encoder", tiny.modules(), tiny.spec(), AXES)
    for form, dtype, told in (("", "float16", 0), ("gpu", "float32", 1)):
        axes = AXES.model_copy(update={"precision": "fp16", "form": form})
        lowered = tflite.lower(component, axes, tmp_path)
        operations = _tflite_file.read_operations(tmp_path / lowered.files[0])
        lookup = next(op for op in operations if op.name == "EMBEDDING_LOOKUP")
        table = {op.outputs[0].name: op.inputs[0] for op in operations if op.name == "DEQUANTIZE"}
        assert table.get(lookup.inputs[1].name, lookup.inputs[1]).dtype == dtype
        assert len(lowered.downgrades) == told


def test_operands_that_the_delegate_lines_up_wrongly_are_refused(text_file):
    with pytest.raises(GateError, match=r"ADD .* a stored operand of higher rank, \[2, 12, 12\] and \[1, 1, 12, 12\]"):
        _tflite_gpu.check(_tflite_file.read_operations(text_file))  # the mask of the plain form


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gpu_form_runs_in_litert_s_gpu_accelerator(name, precision, on_gpu, tmp_path):
    axes = AXES.model_copy(update={"precision": precision, "form": "gpu"})
    component = m.build(name, tiny.modules("sd1", "full"), tiny.spec("sd1", "full"), axes)
    lowered = tflite.lower(component, axes, tmp_path)
    model = on_gpu(tmp_path / lowered.files[0])
    assert model.is_fully_accelerated()
    (key,) = model.get_signature_list()
    (given,), (made,) = lowered.inputs, lowered.outputs
    inputs = {given.name: model.create_input_buffer_by_name(key, given.name)}
    outputs = {made.name: model.create_output_buffer_by_name(key, made.name)}
    inputs[given.name].write(component.example[0].numpy().astype(given.dtype))
    model.run_by_name(key, inputs, outputs)
    got = np.array(outputs[made.name].read(int(np.prod(made.shape)), np.float32)).reshape(made.shape)
    with torch.no_grad():
        assert snr_db(component.module(*component.example), got) >= {"fp32": 80, "fp16": 45}[precision]


def test_weights_halve(embedded, tmp_path):
    axes = Axes(size_px=embedded.spec.defaults.size_px, precision="fp16")
    path, db = parity(m.build("text_encoder", embedded.modules, embedded.spec, axes), axes, tmp_path)
    assert db >= 45
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in embedded.modules["text_encoder"].parameters())


def test_names_and_order_are_the_components_own(tmp_path):
    component = toy(
        Call(lambda z, y: (z - 2 * y, y + 1)), (2, 3), (2, 3), outputs=(("second", (2, 3)), ("first", (2, 3)))
    )
    lowered = tflite.lower(component, AXES, tmp_path)
    z, y = (x.numpy() for x in component.example)
    got = run(tmp_path / lowered.files[0], {"y": y, "z": z})
    np.testing.assert_allclose(got["second"], z - 2 * y, rtol=1e-6)
    np.testing.assert_allclose(got["first"], y + 1, rtol=1e-6)
    assert [spec.name for spec in lowered.inputs] == ["z", "y"]
    assert _tflite_file.signature_fault(tmp_path / "unet.tflite", lowered.inputs, lowered.outputs) is None


def test_tokens_are_int32_at_the_border(text_file):
    assert _tflite_file.signature_fault(
        text_file,
        (TensorSpec(name="input_ids", dtype="int32", shape=(1, tiny.TOKENS)),),
        (TensorSpec(name="encoder_hidden_states", dtype="float32", shape=(1, tiny.TOKENS, tiny.TEXT)),),
    ) is None  # fmt: skip


@pytest.mark.parametrize(
    ("module", "shape", "out", "told"),
    [
        (Call(lambda x: x.cumsum(1).sin()), (2, 3), (2, 3), "CUMSUM"),
        (
            Call(lambda x: x.reshape(2, 3, 2, 2, 2).permute(4, 2, 0, 1, 3).sin()),
            (6, 8),
            (2, 2, 2, 3, 2),
            "5 dimensions",
        ),
    ],
)
def test_the_gpu_form_refuses_by_name_and_place(module, shape, out, told, tmp_path):
    component = toy(module, shape, outputs=(("out", out),))
    with pytest.raises(GateError, match=told) as caught:
        tflite.lower(component, AXES.model_copy(update={"form": "gpu"}), tmp_path)
    assert "operation 0" in str(caught.value)
    assert "Call" in str(caught.value)
    assert not list(tmp_path.iterdir())
    tflite.lower(component, AXES, tmp_path)  # the plain form takes both


def test_the_allow_list_knows_only_real_operations():
    from ai_edge_litert import schema_py_generated as schema

    assert set(vars(schema.BuiltinOperator)) >= _tflite_gpu.ALLOWED


def test_lowering_prints_nothing_and_leaves_the_module_alone(tmp_path, capfd):
    gelu = torch.nn.GELU()
    tflite.lower(toy(gelu, (1, 4, 8), outputs=(("out", (1, 4, 8)),)), AXES.model_copy(update={"form": "gpu"}), tmp_path)
    assert capfd.readouterr().out == ""
    x = torch.tensor([1e4, -3.0])
    assert torch.equal(gelu(x), F.gelu(x))


def test_a_failing_converter_is_reported_and_leaves_nothing(tmp_path):
    component = toy(Call(lambda x: x[x > 0]), (4, 4), outputs=(("out", (4,)),))
    with pytest.raises(GateError, match="unet does not lower to TFLite"):
        tflite.lower(component, AXES, tmp_path)
    assert not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 1e4), shift=st.floats(-5, 5), groups=st.sampled_from([1, 4]), seed=st.integers(0, 99))
def test_finite_norms_equal_torchs(scale, shift, groups, seed):
    x = (torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(seed)) + shift) * scale
    weight, bias = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
    torch.testing.assert_close(
        _tflite_gpu.finite_group_norm(x, groups, weight, bias, 1e-6),
        F.group_norm(x, groups, weight, bias, 1e-6), rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    torch.testing.assert_close(_tflite_gpu.finite_layer_norm(x, (5, 7)), F.layer_norm(x, (5, 7)), rtol=1e-4, atol=1e-4)


def test_expansion_by_concatenation_is_torchs():
    x = torch.arange(6.0).reshape(1, 2, 3)
    for sizes in ((4, 2, 3), (5, -1, 2, 3), (1, 2, 3)):
        assert torch.equal(_tflite_gpu.expand(x, *sizes), x.expand(*sizes))
        assert torch.equal(_tflite_gpu.expand(x, sizes), x.expand(*sizes))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_finite_gelu_is_within_its_bound(approximate):
    x = torch.linspace(-12, 12, 20001)
    assert (_tflite_gpu.finite_gelu(x, approximate) - F.gelu(x, approximate=approximate)).abs().max() < 4e-6


def test_forms_stay_finite_in_float16_where_plain_ones_do_not():
    x = 300 * torch.randn(1, 8, 64, 64, generator=torch.Generator().manual_seed(1))
    half = x.half()
    plain = half - half.mean((1, 2, 3), keepdim=True)
    assert (plain * plain).isinf().any()  # the variance as it is usually written
    got = _tflite_gpu.finite_group_norm(half, 2)
    assert got.dtype == torch.float16
    assert snr_db(F.group_norm(x, 2), got.float().numpy()) > 40
    big = torch.tensor([6e4, -6e4, 50.0, 0.0]).half()
    for approximate in ("none", "tanh"):
        got = _tflite_gpu.finite_gelu(big, approximate).float()
        torch.testing.assert_close(got, F.gelu(big.float(), approximate=approximate), rtol=0, atol=0.01)
    constant = torch.full((1, 8, 4, 4), 500.0).half()
    assert torch.equal(_tflite_gpu.finite_group_norm(constant, 2), torch.zeros_like(constant))


def test_the_flatbuffer_limit_is_checked_before_any_work():
    axes = AXES.model_copy(update={"precision": "fp32"})
    limit = tflite.capabilities.max_file_bytes
    tflite.check_plan("unet", limit, axes)
    with pytest.raises(RequestError, match="Choose precision fp16 or int8"):
        tflite.check_plan("unet", 859_520_964 * 4, axes)  # Stable Diffusion 1.x
    with pytest.raises(RequestError, match="Choose precision int8"):
        tflite.check_plan("unet", 2 * limit, axes.model_copy(update={"precision": "fp16"}))
    with pytest.raises(RequestError, match="Prune"):
        tflite.check_plan("unet", 2 * limit, axes.model_copy(update={"precision": "int8"}))


def test_lower_refuses_too_many_weights_unseen(tmp_path):
    with torch.device("meta"):
        huge = torch.nn.Linear(40_000, 20_000)
    with pytest.raises(RequestError, match=r"2\.98 GiB"):
        tflite.lower(toy(huge, (1, 4), outputs=(("out", (1, 4)),)), AXES, tmp_path)


@pytest.mark.parametrize("change", [{"precision": "w8"}, {"form": "webgpu"}])
def test_unknown_precisions_forms_and_options_are_refused(change, tmp_path):
    component = toy(torch.nn.ReLU(), (1, 4), outputs=(("out", (1, 4)),))
    with pytest.raises(RequestError, match=next(iter(change.values()))):
        tflite.lower(component, AXES.model_copy(update=change), tmp_path)
    with pytest.raises(RequestError, match="opset"):
        tflite.lower(component, AXES, tmp_path, opset=3)


@pytest.mark.parametrize("keep", [0, 4, 64, 0.5, 0.99])
def test_a_truncated_file_is_a_data_error(keep, text_file, tmp_path):
    whole = text_file.read_bytes()
    (tmp_path / "cut.tflite").write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"cut\.tflite"):
        tflite.count_operations(tmp_path / "cut.tflite")


def test_damaged_structure_never_escapes_as_another_error(text_file, tmp_path):
    whole, path = text_file.read_bytes(), tmp_path / "flipped.tflite"
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for at in random.integers(0, len(whole), 40):
            damaged[at] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):  # anything else fails the test
            tflite.count_operations(path)


def bundle(path):
    """A manifest that names one text encoder file, enough for a session."""
    text = m.build("text_encoder", tiny.modules(), tiny.spec(), AXES)
    variant = Variant(
        axes=AXES,
        files=(path.name,),
        inputs=(TensorSpec(name="input_ids", dtype="int32", shape=(1, tiny.TOKENS)),),
        outputs=text.outputs,
    )
    listed = (path.name, "tokenizer/tokenizer.json", "samplers.safetensors")
    return text, Manifest(
        target="tflite",
        model=tiny.spec(),
        components=(Component(name="text_encoder", variants=(variant,)),),
        samplers=(SamplerFile(name="euler", file="samplers.safetensors", steps=(4,)),),
        provenance=Provenance(source="tiny", sha256="0" * 64),
        files=tuple(FileEntry(path=file, bytes=0, sha256="0" * 64) for file in listed),
    )


def test_a_session_runs_reloads_and_owns_its_outputs(text_file):
    text, manifest = bundle(text_file)
    session = targets.load("tflite").open(text_file.parent, manifest, threads=1)
    tokens = text.example[0].numpy()
    first = session.run("text_encoder", {"input_ids": tokens})["encoder_hidden_states"]
    with torch.no_grad():
        assert snr_db(text.module(*text.example), first) >= 90
    kept = first.copy()
    other = session.run("text_encoder", {"input_ids": np.zeros_like(tokens)})["encoder_hidden_states"]
    assert not np.array_equal(other, kept)
    assert np.array_equal(first, kept)
    session.unload("text_encoder")
    again = session.run("text_encoder", {"input_ids": tokens})["encoder_hidden_states"]
    assert np.array_equal(again, kept)


def test_opening_and_running_needs_no_torch(text_file, tmp_path):
    _, manifest = bundle(text_file)
    (tmp_path / "manifest.json").write_bytes(dump(manifest))
    code = f"""
import sys
for absent in ("torch", "litert_torch", "ai_edge_quantizer", "tensorflow"):
    sys.modules[absent] = None  # importing it raises
from pathlib import Path
import numpy as np
from edgesd import targets
from edgesd.manifest import parse
manifest = parse(Path({str(tmp_path / "manifest.json")!r}).read_bytes())
target = targets.load("tflite")
session = target.open(Path({str(text_file.parent)!r}), manifest, threads=1)
made = session.run("text_encoder", {{"input_ids": np.zeros((1, {tiny.TOKENS}), np.int64)}})
counted = target.count_operations(Path({str(text_file)!r})).counts
print(made["encoder_hidden_states"].shape, counted["FULLY_CONNECTED", "float32"], target.runtime_version())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"(1, {tiny.TOKENS}, {tiny.TEXT}) 18 ai-edge-litert 2.")


def test_broken_or_exchanged_files_are_data_errors(text_file, tmp_path):
    text, manifest = bundle(text_file)
    inputs = {"input_ids": text.example[0].numpy()}
    copy = tmp_path / text_file.name
    for damaged in (b"", b"no model at all", text_file.read_bytes()[:-1000]):
        copy.write_bytes(damaged)
        with pytest.raises(DataError, match=r"text_encoder\.tflite"):
            tflite.open(tmp_path, manifest).run("text_encoder", inputs)
    component = toy(torch.nn.ReLU(), (1, 4), outputs=(("out", (1, 4)),))
    tflite.lower(component, AXES, tmp_path)
    (tmp_path / "unet.tflite").replace(copy)
    with pytest.raises(DataError, match="inputs z"):
        tflite.open(tmp_path, manifest).run("text_encoder", inputs)
