"""The Core ML target: packages lowered, read back and run by the interpreter, held against torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("coremltools")
from edgesd import targets
from edgesd.errors import DataError, GateError, RequestError
from edgesd.manifest import Axes, Component, FileEntry, Manifest, Provenance, SamplerFile, TensorSpec, Variant
from edgesd.models import modules as m
from edgesd.targets import coreml
from edgesd.targets.coreml import attention, chunks, convert
from edgesd.targets.coreml.interpreter import Program

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
TINY = Axes(size_px=tiny.SIZE_PX, precision="fp32")
HALF = Axes(size_px=tiny.SIZE_PX, precision="fp16")


def snr_db(want: torch.Tensor, got: np.ndarray) -> float:
    want, got = want.double().numpy(), got.astype(np.float64)
    return float(10 * np.log10((want**2).sum() / max(((want - got) ** 2).sum(), 1e-300)))


def truth(component: m.Component) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        made = component.module(*component.example)
    return made if isinstance(made, tuple) else (made,)


def example(component: m.Component) -> dict[str, np.ndarray]:
    return {spec.name: x.numpy() for spec, x in zip(component.inputs, component.example, strict=True)}


def interpret(component, axes, directory, **options):
    """Lowers, runs the example through the saved package, returns (Lowered, the worst SNR over the outputs)."""
    lowered = coreml.lower(component, axes, directory, **options)
    made = Program(directory / lowered.files[0].parent).run(example(component))
    return lowered, min(snr_db(want, made[s.name]) for want, s in zip(truth(component), component.outputs, strict=True))


def manifest(lowered: dict[Axes, targets.Lowered], name: str = "unet") -> Manifest:
    """A manifest of one component's variants, enough for a session."""
    variants = tuple(
        Variant(axes=axes, files=tuple(f.as_posix() for f in made.files), inputs=made.inputs, outputs=made.outputs,
                compute_units=made.compute_units)
        for axes, made in lowered.items()
    )  # fmt: skip
    listed = {f for v in variants for f in v.files} | {"tokenizer/tokenizer.json", "samplers.safetensors"}
    return Manifest(
        target="coreml",
        model=tiny.spec(),
        components=(Component(name=name, variants=variants),),
        samplers=(SamplerFile(name="euler", file="samplers.safetensors", steps=(4,)),),
        provenance=Provenance(source="tiny", sha256="0" * 64),
        files=tuple(FileEntry(path=file, bytes=0, sha256="0" * 64) for file in sorted(listed)),
    )


@pytest.fixture(scope="module")
def unet():
    return m.build("unet", tiny.modules(), tiny.spec(), TINY)


@pytest.fixture(scope="module")
def tiny_unet(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    return folder, coreml.lower(unet, TINY, folder)


@pytest.fixture(scope="module")
def half_unet(tmp_path_factory):
    """SDXL's: it has the most inputs, and sizes as sinusoids beside the timestep."""
    component = m.build("unet", tiny.modules("sdxl"), tiny.spec("sdxl"), HALF)
    folder = tmp_path_factory.mktemp("half")
    return component, folder, coreml.lower(component, HALF, folder)


@pytest.fixture(scope="module")
def embedded():
    return tiny.embedded()


# ---- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 90), ("fp16", 45)])
@pytest.mark.parametrize("name", COMPONENTS)
def test_the_embedded_model_keeps_its_numbers(embedded, name, precision, least_db, tmp_path):
    modules, spec = embedded
    axes = Axes(size_px=spec.defaults.size_px, precision=precision)
    component = m.build(name, modules, spec, axes)
    lowered, snr = interpret(component, axes, tmp_path)
    assert snr >= least_db
    assert lowered.files[0].as_posix() == f"{name}.mlpackage/Manifest.json"
    assert lowered.compute_units == ("cpuAndGPU" if name == "unet" or precision == "fp32" else "cpuAndNeuralEngine")
    weights = sum(p.numel() for p in component.module.parameters())
    made = sum((tmp_path / file).stat().st_size for file in lowered.files)
    assert made <= weights * (4 if precision == "fp32" else 2) * 1.08 + 600_000


def test_the_second_text_encoder_and_a_full_vae_keep_theirs(tmp_path):
    modules, spec = tiny.modules("sdxl", "full"), tiny.spec("sdxl", "full")
    for name in ("text_encoder_2", "vae_encoder", "vae_decoder"):
        assert interpret(m.build(name, modules, spec, TINY), TINY, tmp_path)[1] >= 90


@pytest.mark.parametrize("timestep", [1.0, 601.25, 999.0])
def test_a_float16_unet_keeps_its_timestep(half_unet, timestep):
    unet, folder, lowered = half_unet
    late = replace(unet, example=(unet.example[0], torch.tensor([timestep]), *unet.example[2:]))
    made = Program(folder / lowered.files[0].parent).run(example(late))
    assert snr_db(truth(late)[0], made["model_output"]) >= 45


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_split_einsum_equals_the_original_attention(family):
    original = m.build("unet", tiny.modules(family), tiny.spec(family), TINY)
    split = attention.split_einsum(original)
    assert snr_db(truth(original)[0], truth(split)[0].numpy()) >= 110
    assert original.module.state_dict().keys() == split.module.state_dict().keys()


def test_a_split_einsum_package_has_no_attention_but_einsum(unet, tmp_path):
    axes = TINY.model_copy(update={"form": "split_einsum"})
    lowered, snr = interpret(unet, axes, tmp_path)
    counts = coreml.count_operations(tmp_path / lowered.files[0]).counts
    heads = sum(2 * module.heads for module in unet.module.modules() if hasattr(module, "to_q"))
    assert snr >= 90
    assert counts["einsum", "float32"] == heads
    assert ("matmul", "float32") not in counts
    assert lowered.compute_units == "cpuAndGPU"  # float32: the Neural Engine has none
    assert coreml._compute_units("unet", axes.model_copy(update={"precision": "fp16"})) == "cpuAndNeuralEngine"


def test_split_einsum_of_another_component_is_recorded_as_left_out(tmp_path):
    text = m.build("text_encoder", tiny.modules(), tiny.spec(), TINY)
    lowered, snr = interpret(text, TINY.model_copy(update={"form": "split_einsum"}), tmp_path)
    assert snr >= 90
    assert [d.what for d in lowered.downgrades] == ["form split_einsum"]


# ---- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl", "lcm"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_chunks_in_a_row_are_the_unet(family, count):
    whole = m.build("unet", tiny.modules(family), tiny.spec(family), TINY)
    values = dict(zip((s.name for s in whole.inputs), whole.example, strict=True))
    pieces = chunks.unet_chunks(whole, count)
    with torch.inference_mode():
        for piece in pieces:
            made = piece.module(*(values[s.name] for s in piece.inputs))
            assert [tuple(x.shape) for x in made] == [s.shape for s in piece.outputs]
            values |= dict(zip((s.name for s in piece.outputs), made, strict=True))
    assert torch.equal(values["model_output"], truth(whole)[0])
    everything = sum(p.numel() for p in whole.module.parameters())
    assert sum(p.numel() for piece in pieces for p in piece.module.parameters()) == everything


def test_chunks_of_an_uneven_picture_are_the_unet():
    axes = Axes(size_px=(72, 104))  # latents of 9 x 13: the upsampler must meet the skip connections' size
    whole = m.build("unet", tiny.modules(), tiny.spec(), axes)
    values = dict(zip((s.name for s in whole.inputs), whole.example, strict=True))
    with torch.inference_mode():
        for piece in chunks.unet_chunks(whole, 3):
            made = piece.module(*(values[s.name] for s in piece.inputs))
            values |= dict(zip((s.name for s in piece.outputs), made, strict=True))
    assert torch.equal(values["model_output"], truth(whole)[0])


def test_the_cut_keeps_the_largest_chunk_small(embedded):
    whole = m.build("unet", *embedded, Axes(size_px=(128, 128)))
    sizes = [sum(p.numel() for p in piece.module.parameters()) for piece in chunks.unet_chunks(whole, 2)]
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_session_over_chunks_equals_the_session_over_the_whole(half_unet, tmp_path):
    unet, folder, whole = half_unet
    axes = [HALF.model_copy(update={"chunk": (i, 2)}) for i in (0, 1)]
    cut = {piece: coreml.lower(unet, piece, tmp_path) for piece in axes}
    first, second = cut.values()
    assert [made.files[0].parts[0] for made in (first, second)] == ["unet_1of2.mlpackage", "unet_2of2.mlpackage"]
    assert {s.dtype for s in second.inputs if s.name != "encoder_hidden_states"} == {"float16"}
    one = coreml.open(folder, manifest({HALF: whole})).run("unet", example(unet))["model_output"]
    two = coreml.open(tmp_path, manifest(cut)).run("unet", example(unet))["model_output"]
    assert snr_db(torch.from_numpy(one), two) >= 55
    assert min(snr_db(truth(unet)[0], x) for x in (one, two)) >= 45


def test_what_cannot_be_cut_is_refused(unet, tmp_path):
    text = m.build("text_encoder", tiny.modules(), tiny.spec(), TINY)
    with pytest.raises(RequestError, match="in 2 chunks"):
        coreml.lower(text, TINY.model_copy(update={"chunk": (0, 2)}), tmp_path)
    with pytest.raises(RequestError, match="1 to 5 for this UNet"):
        chunks.unet_chunks(unet, 6)
    assert not list(tmp_path.iterdir())


# ---- the package ----------------------------------------------------------------------------------------------------


def test_the_same_component_gives_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        lowered = coreml.lower(m.build("vae_decoder", tiny.modules(), tiny.spec(), TINY), TINY, tmp_path / run)
    for file in lowered.files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_package_lists_itself_and_tells_no_path(tiny_unet):
    folder, lowered = tiny_unet
    listed = {(folder / file) for file in lowered.files}
    assert listed == {path for path in folder.rglob("*") if path.is_file()}
    private = [part.encode() for part in (str(folder), str(Path.home()), "/site-packages/")]
    assert not any(part in path.read_bytes() for path in listed for part in private)


def test_coremltools_itself_opens_the_package(tiny_unet):
    import coremltools as ct

    folder, lowered = tiny_unet
    model = ct.models.MLModel(str(folder / lowered.files[0].parent), skip_model_load=True)
    assert [f.name for f in model.get_spec().description.output] == ["model_output"]
    assert model.get_spec().specificationVersion == ct.target.iOS17
    assert model.get_spec().description.input[0].shortDescription.startswith("noisy latents")


def test_ios_18_programs_run_too(tmp_path):
    text = m.build("text_encoder", tiny.modules(), tiny.spec(), TINY)
    assert interpret(text, TINY, tmp_path, minimum_target="iOS18")[1] >= 90


def test_a_package_in_the_way_is_left_alone(tiny_unet, unet):
    folder, lowered = tiny_unet
    before = (folder / lowered.files[1]).read_bytes()
    with pytest.raises(RequestError, match="is there already"):
        coreml.lower(unet, TINY, folder)
    assert (folder / lowered.files[1]).read_bytes() == before


def test_an_operation_core_ml_lacks_is_a_gate_error_and_leaves_nothing(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    x = torch.randn(1, 3, 3)
    spec = TensorSpec(name="image", dtype="float32", shape=(1, 3, 3))
    with pytest.raises(GateError, match="Core ML cannot express vae_encoder"):
        coreml.lower(m.Component("vae_encoder", Odd().eval(), (spec,), (spec,), (x,)), TINY, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("axes", "options"), [
    (TINY.model_copy(update={"precision": "hybrid"}), {}),
    (TINY.model_copy(update={"form": "webgpu"}), {}),
    (TINY, {"minimum_target": "iOS12"}),
    (TINY, {"compute_units": "gpu"}),
    (TINY, {"threads": 2}),
])  # fmt: skip
def test_requests_it_does_not_know_are_refused(unet, axes, options, tmp_path):
    with pytest.raises(RequestError):
        coreml.lower(unet, axes, tmp_path, **options)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_a_phone_is_not_handed_more_than_it_loads():
    big = Axes(size_px=(512, 512), precision="fp16")
    with pytest.raises(
        RequestError, match=r"unet in fp16, cut in 1, has 1\.72 GB a package.*fp16 in 2 chunks or precision int8"
    ):
        coreml.check_plan("unet", 1_719_000_000, big)
    coreml.check_plan("unet", 859_500_000, big.model_copy(update={"chunk": (0, 2)}))
    coreml.check_plan("unet", 1_719_000_000, big, minimum_target="macOS14")
    with pytest.raises(RequestError, match="Choose precision int8"):
        coreml.check_plan("text_encoder_2", 1_390_000_000, big)


def test_the_weights_that_count_are_those_of_the_piece(unet, monkeypatch, tmp_path):
    weights = sum(p.numel() for p in unet.module.parameters()) * 4
    monkeypatch.setattr(coreml, "IOS_WEIGHT_BYTES", int(weights * 0.7))
    with pytest.raises(RequestError, match="a package"):
        coreml.lower(unet, TINY, tmp_path)
    for axes in (TINY.model_copy(update={"chunk": (i, 2)}) for i in (0, 1)):
        coreml.check_plan("unet", convert.weight_bytes(convert.shaped(unet, axes), axes), axes)


# ---- opening --------------------------------------------------------------------------------------------------------


def test_a_missing_weight_file_and_a_newer_program_are_said_plainly(tiny_unet, unet, tmp_path):
    import shutil

    from coremltools.proto import Model_pb2

    folder, lowered = tiny_unet
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = copy / "unet.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    spec = Model_pb2.Model()
    spec.ParseFromString(model.read_bytes())
    spec.specificationVersion = 77
    model.write_bytes(spec.SerializeToString())
    with pytest.raises(DataError, match="specification version 77"):
        coreml.open(copy, manifest({TINY: lowered})).run("unet", example(unet))
    shutil.copy(folder / "unet.mlpackage/Data/com.apple.CoreML/model.mlmodel", model)
    (copy / "unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin").unlink()
    with pytest.raises(DataError, match=r"lacks weight\.bin"):
        coreml.open(copy, manifest({TINY: lowered})).run("unet", example(unet))


def test_rounding_on_request_is_float16_noise(tiny_unet, unet):
    folder, lowered = tiny_unet
    got = coreml.open(folder, manifest({TINY: lowered}), fp16=True).run("unet", example(unet))["model_output"]
    assert 35 <= snr_db(truth(unet)[0], got) <= 80  # the timestep's sines are rounded too


def test_devices_are_a_matter_of_the_mac(tiny_unet):
    folder, lowered = tiny_unet
    with pytest.raises(RequestError, match="none off a Mac"):
        coreml.open(folder, manifest({TINY: lowered}), device="cpuAndGPU")


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML itself answers there")
def test_off_a_mac_it_says_that_it_interprets():
    assert coreml.status == "interpreted"
    assert not coreml.speed_is_meaningful()
    assert coreml.runtime_version().startswith("edgesd's MIL interpreter")


def test_on_a_mac_core_ml_gets_the_package_and_the_manifests_units(tiny_unet, unet, monkeypatch):
    """With a stand-in for the class that only exists there."""
    import coremltools as ct

    opened = []

    class OnMac:
        def __init__(self, path, compute_units):
            opened.append((Path(path).name, compute_units))
            self.predict = Program(Path(path)).run

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ct.models, "MLModel", OnMac)
    folder, lowered = tiny_unet
    for device, units in ((None, ct.ComputeUnit.CPU_AND_GPU), ("all", ct.ComputeUnit.ALL)):
        got = coreml.open(folder, manifest({TINY: lowered}), device=device).run("unet", example(unet))
        assert snr_db(truth(unet)[0], got["model_output"]) >= 90
        assert opened.pop() == ("unet.mlpackage", units)
    assert coreml.speed_is_meaningful()


@pytest.mark.skipif(sys.platform == "darwin", reason="Xcode may be there")
def test_a_compile_step_that_cannot_be_is_recorded(tmp_path):
    lowered = coreml.lower(m.build("vae_decoder", tiny.modules(), tiny.spec(), TINY), TINY, tmp_path, compiled=True)
    assert [d.what for d in lowered.downgrades] == ["compiled model (.mlmodelc)"]


def test_xcode_is_asked_for_the_compiled_model_and_its_files_are_listed(tmp_path, monkeypatch):
    def xcrun(command, **_):
        made = Path(command[4]) / Path(command[3]).with_suffix(".mlmodelc").name
        made.mkdir()
        (made / "model.mil").write_text("program")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(convert.sys, "platform", "darwin")
    monkeypatch.setattr(convert.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(convert.subprocess, "run", xcrun)
    lowered = coreml.lower(m.build("vae_decoder", tiny.modules(), tiny.spec(), TINY), TINY, tmp_path, compiled=True)
    assert "vae_decoder.mlmodelc/model.mil" in [file.as_posix() for file in lowered.files]
    assert lowered.files[0].name == "Manifest.json"
    assert lowered.downgrades == ()


def test_naming_the_target_costs_nothing():
    code = "import sys, edgesd.targets.coreml as c; print({'torch', 'coremltools', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_opening_a_package_says_nothing_on_the_terminal(tiny_unet):
    folder, lowered = tiny_unet
    path = str(folder / lowered.files[0].parent)
    code = f"import pathlib; from edgesd.targets.coreml.package import Package; Package(pathlib.Path({path!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_lowering_says_nothing_on_the_terminal(tmp_path, capfd):
    coreml.lower(m.build("vae_decoder", tiny.modules(), tiny.spec(), HALF), HALF, tmp_path)
    assert capfd.readouterr() == ("", "")
