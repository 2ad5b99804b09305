"""Several widths over one weights file: what is derived, and what the runtimes make of it, against torch."""

import numpy as np
import plans
import pytest
import readback
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgesd import targets
from edgesd.compress.groups import find_groups
from edgesd.compress.inherit import FINE, Correction, corrected, from_widest, own_integers
from edgesd.compress.quantize import adjusted
from edgesd.compress.quantplan import OWN_INTEGERS
from edgesd.compress.widths import narrowed, rounded
from edgesd.errors import GateError
from edgesd.manifest import Axes
from edgesd.models.modules import build
from edgesd.targets._sharing import derive, rebuilt

SHARING = {"onnx-web": ("fp32", "fp16"), "openvino": ("fp32", "fp16")}


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float16"]), st.booleans(), st.integers(1, 2))
def test_a_slice_with_its_correction_is_found_and_rebuilt(seed, dtype, corrected, blocks):
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal((32, 24)).astype(dtype)
    rows = [slice(b * 32 // blocks, b * 32 // blocks + 8) for b in range(blocks)]
    narrow = np.concatenate([wide[r, :20] for r in rows]) if blocks == 2 else wide[:16, :20]
    if corrected:
        change = rounded(torch.from_numpy(rng.standard_normal(narrow.shape).astype(np.float32))).numpy()
        narrow = (narrow.astype(np.float32) + change).astype(dtype)
    found = derive(wide, narrow)
    assert found is not None
    assert (found.codes is not None) == corrected
    close = dict(rtol=0, atol=4e-3 * np.abs(narrow).max()) if dtype == "float16" else dict(rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rebuilt(wide, found), narrow, **(close if corrected else {"rtol": 0}))


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([(20,), (12, 3, 3)]))
def test_integers_with_a_given_correction_are_rebuilt(seed, turned, columns):
    """Among the corrections of other layers; some reach past the ends of their range."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(-127, 128, (32, columns[0] + 4, *columns[1:])).astype(np.int8)
    shape, each = (16, *columns), (16, *[1] * len(columns))
    several = [
        Correction(rng.integers(-7, 8, shape).astype(np.int8), *(np.rint(rng.uniform(0, largest, each) * FINE)
                   .astype(np.float32) / FINE for largest in (1, 30)))
        for _ in range(3)
    ]  # fmt: skip
    narrow = corrected(wide[:16, : columns[0]], several[1])
    if turned and narrow.ndim == 2:
        wide, narrow = wide.T, narrow.T
    found = derive(wide, narrow, several)
    assert found is not None
    np.testing.assert_array_equal(rebuilt(wide, found), narrow)
    assert derive(wide, narrow, several[:1]) is None  # integers tell nothing of what was added to them
    assert derive(wide, wide[:16]).codes is None


def test_other_weights_are_no_slice():
    rng = np.random.default_rng(0)
    wide, other = (rng.standard_normal((32, 24)).astype(np.float32) for _ in range(2))
    assert derive(wide, other[:16]) is None
    assert derive(wide, other) is None
    assert derive(wide, wide.astype(np.float16)) is None
    assert derive(wide[:2], wide[:1]) is None  # too small to be worth it
    assert derive(wide, wide).cuts == ()


@pytest.fixture(scope="module")
def unets():
    """Width -> the embedded-like tiny UNet; the narrow one with corrected weights, as a shared width has them."""
    torch.manual_seed(0)
    wide = tiny.unet(heads=4)
    narrow = narrowed(wide, find_groups(wide), 0.5)
    for name, weight in narrow.named_parameters():
        if weight.ndim > 1 and ("conv2" in name or "to_out" in name):
            weight.data = weight.data + rounded(0.3 * torch.randn_like(weight))
    return {1.0: wide, 0.5: narrow}


@pytest.mark.parametrize(("name", "precision"), [(n, p) for n, several in SHARING.items() for p in several])
def test_a_shared_width_equals_its_torch_model_and_stores_no_weight_twice(name, precision, unets, tmp_path):
    target, spec = targets.load(name, lowering=True), tiny.spec()
    files, components = {}, {}
    for width, unet in unets.items():
        axes = Axes(size_px=tiny.SIZE_PX, precision=precision, width=width)
        components[width] = build("unet", {**tiny.modules(), "unet": unet}, spec, axes)
        (tmp_path / f"{width}").mkdir()
        files[width] = target.lower(components[width], axes, tmp_path / f"{width}").files
    wide, narrow = (tmp_path / f"{w}" / files[w][0] for w in (1.0, 0.5))
    before = sum(f.stat().st_size for f in wide.parent.iterdir() if f.suffix in (".bin", ".data"))
    alone = sum(f.stat().st_size for f in narrow.parent.iterdir() if f.suffix in (".bin", ".data"))
    made = target.share_widths(wide, narrow, wide.with_name(f"unet-w0.5{wide.suffix}"))
    weights = sum(f.stat().st_size for f in wide.parent.iterdir() if f.suffix in (".bin", ".data"))
    assert weights - before < 0.35 * alone
    assert {path.parent for path in made} == {wide.parent}
    component = components[0.5]
    with torch.no_grad():
        truth = component.module(*component.example).numpy()
    inputs = {spec.name: x.numpy() for spec, x in zip(component.inputs, component.example, strict=True)}
    assert tiny.snr_db(truth, run(name, made, inputs)) > (90 if precision == "fp32" else 45)


@pytest.mark.parametrize(
    ("precision", "demoted"),
    [
        ("int8", True),
        ("w8", False),
        *(
            pytest.param(p, d, marks=pytest.mark.slow)
            for p, d in [("int8", False), ("hybrid", False), ("hybrid", True), ("w8", True)]
        ),
    ],
)
@pytest.mark.parametrize("name", SHARING)
def test_a_shared_int8_width_is_the_model_its_plan_describes(name, precision, demoted, unets, tmp_path):
    """demoted: the narrow width alone computes a layer in float arithmetic; its integers are shared all the same.

    That no integer kernel is lost is what `share_widths` checks itself.
    """
    target, spec = targets.load(name, lowering=True), tiny.spec()
    axes = {w: Axes(size_px=tiny.SIZE_PX, precision=precision, width=w) for w in unets}
    wide, narrow = (build("unet", {**tiny.modules(), "unet": unets[w]}, spec, axes[w]) for w in (1.0, 0.5))
    plan = plans.simple_plan(wide, precision, floats=plans.ends(wide))
    tensors = own_integers(wide, plan)
    start = from_widest(narrow, wide, 0.5, plan, tensors)
    own = plans.simple_plan(adjusted(narrow, start.tensors), precision, floats=plans.ends(wide))
    if demoted:
        layer = next(x for x in own.layers if x.name.endswith("attn1.to_q"))
        own = own.with_mode(layer.name, "w8" if layer.mode == "int8" else "float", "test")
    floats = {layer.name for layer in own.layers if layer.mode == "float"}
    given = {path: x for path, x in start.tensors.items() if path.rpartition(".")[0] not in floats}
    narrow = adjusted(narrow, given)
    files = {}
    for width, component, each in ((1.0, adjusted(wide, tensors), plan), (0.5, narrow, own)):
        (tmp_path / f"{width}").mkdir()
        lowered = target.lower(component, axes[width], tmp_path / f"{width}", plan=each)
        files[width] = [tmp_path / f"{width}" / file for file in lowered.files]
    check_integers(name, files[0.5][0], given)
    shared = stored(files[1.0])
    made = target.share_widths(
        files[1.0][0], files[0.5][0], files[1.0][0].with_stem("unet-w0.5"), [*start.corrections.values()]
    )
    assert stored([*files[1.0], *made]) - shared < 0.75 * stored(files[0.5])
    inputs = {spec.name: x.numpy() for spec, x in zip(narrow.inputs, narrow.example, strict=True)}
    # The same integers; a float layer's sums may be taken in another order.
    np.testing.assert_allclose(run(name, made, inputs), run(name, files[0.5], inputs), atol=2e-6)


def stored(files):
    """Bytes of weights."""
    return sum(file.stat().st_size for file in {*files} if file.suffix in (".bin", ".data"))


def check_integers(name, path, tensors):
    """Every weight that a narrow width was given is in its file, integer for integer."""
    found = {row[0].tobytes() for row in readback.READERS[name](path)}
    given = [x.numpy() for key, x in tensors.items() if key.endswith(OWN_INTEGERS)]
    assert given
    assert all(x.tobytes() in found for x in given)


def run(name, files, inputs):
    if name == "onnx-web":
        import onnxruntime

        return onnxruntime.InferenceSession(str(files[0])).run(None, inputs)[0]
    import openvino as ov

    core = ov.Core()
    return core.compile_model(core.read_model(*files[:2]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)[0]


@pytest.mark.parametrize("name", SHARING)
def test_graphs_of_different_models_are_refused(name, tmp_path):
    target = targets.load(name, lowering=True)
    paths = []
    for part in ("vae_decoder", "text_encoder"):
        axes = Axes(size_px=tiny.SIZE_PX, precision="fp32")
        component = build(part, tiny.modules(), tiny.spec(), axes)
        (tmp_path / part).mkdir()
        paths.append(tmp_path / part / target.lower(component, axes, tmp_path / part).files[0])
    with pytest.raises(GateError, match="differ in their operations"):
        target.share_widths(*paths, paths[0].with_stem("narrow"))
