"""Every family through the whole path: folder, plan, lowered, bundled, validated, drawn from the bundle."""

import json

import inline
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from edgesd import packager, sources, targets, workers
from edgesd.errors import RequestError
from edgesd.models.load import load
from edgesd.runtime.generate import generate

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "inpaint", "lcm")
PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture(autouse=True)
def _no_children(monkeypatch):
    monkeypatch.setitem(targets.TARGETS, "torch", "torch_target")
    inline.install(monkeypatch.setattr)


def package(source, output, target="torch", **fields):
    asked = {"source": str(source), "profile": "quality", "samplers": ("euler",), "steps": (3, 3), **fields}
    return packager.package_all(asked, [target], output).made[0].path


def same(a, b):
    return np.abs(a.image.astype(int) - b.image.astype(int)).mean() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_packaged_and_draws_as_the_reference(family, tmp_path):
    check_family(family, tmp_path, "torch")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "onnx-web", "tflite", "coreml"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_target(family, target, tmp_path):
    check_family(family, tmp_path, target)


def check_family(family, tmp_path, target):
    source = tiny.folder(family, tmp_path / family)
    sampler = "lcm" if family == "lcm" else "euler"
    bundle = package(source, tmp_path, target, samplers=(sampler,), precision="fp32")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["quality"]["passed"]
    assert manifest["model"]["family"] == {"inpaint": "sd1", "lcm": "sd1"}.get(family, family)
    assert ("text_encoder_2" in {c["name"] for c in manifest["components"]}) == family.startswith("sdxl")
    settings = {"num_inference_steps": 3, "sampler": sampler, "seed": 5}
    pipelines = [sources.open_pipeline(str(p)) for p in (bundle, source)]
    ours, truth = (generate(p, PROMPT, **settings)[0] for p in pipelines)
    assert same(ours, truth)
    assert ours.image.std() > 2
    mask = np.zeros(truth.image.shape[:2], np.float32)
    mask[: len(mask) // 2] = 1
    for task in ({"strength": 0.7}, {"strength": 1.0, "mask": mask}):
        ours, again = (generate(p, "a green ring", image=truth.image, **task, **settings)[0] for p in pipelines)
        assert same(ours, again)
        assert not same(ours, truth)


def test_a_refiners_bundle_draws_on_where_the_bases_stops(tmp_path):
    folders = [tiny.folder(family, tmp_path / family) for family in ("sdxl", "sdxl_refiner")]
    bundles = [package(folder, tmp_path, precision="fp32") for folder in folders]
    drawn = []
    for base, refiner in (bundles, folders):
        base, refiner = sources.open_pipeline(str(base)), sources.open_pipeline(str(refiner))
        options = {"num_inference_steps": 3, "sampler": "euler", "seed": 5, "refiner": refiner, "refiner_start": 0.5}
        drawn.append(generate(base, PROMPT, **options)[0])
    assert same(*drawn)


def test_what_was_added_is_in_the_bundle_and_its_manifest(tmp_path):
    source = tiny.folder("sd1", tmp_path / "sd1")
    layer = tiny.unet("sd1").conv_in.weight
    down, up = torch.randn(2, *layer.shape[1:]), torch.randn(len(layer), 2, 1, 1)
    lora, word = tmp_path / "style.safetensors", tmp_path / "toy.safetensors"
    save_file({"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}, lora)
    save_file({"<toy>": torch.randn(2, tiny.TEXT)}, word)
    added = {"loras": (f"{lora}:0.5",), "embeddings": (str(word),), "clip_skip": 1, "long_prompt": 48}
    bundle = package(source, tmp_path, **added)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["critical"] == ["chunked-prompts", "expanded-tokens"]
    assert [(i["kind"], i["name"], i["scale"]) for i in manifest["provenance"]["ingredients"]] == [
        ("lora", "style.safetensors", 0.5),
        ("embedding", "<toy>", None),
    ]
    assert str(tmp_path) not in json.dumps(manifest)
    settings = {"num_inference_steps": 3, "sampler": "euler", "seed": 5}
    prompt = f"a <toy> and {PROMPT} and {PROMPT} and a <toy>"
    truth = sources.torch_pipeline(
        load(source, lora=[f"{lora}:0.5"], embedding=[str(word)], clip_skip=1, long_prompt=48)
    )
    ours = generate(sources.open_pipeline(str(bundle)), prompt, **settings)[0]
    assert same(ours, generate(truth, prompt, **settings)[0])
    assert not same(ours, generate(sources.open_pipeline(source), prompt, **settings)[0])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_prepared_prompts_need_no_text_encoder(family, tmp_path):
    source = tiny.folder(family, tmp_path / family)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n\n a (green:1.3) ring \nan ugly star\n{PROMPT}\n")
    bundle = package(source, tmp_path, prompt_bank=str(prompts))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["critical"] == ["prompt-bank"]
    assert [c["name"] for c in manifest["components"]] == ["unet", "vae_decoder", "vae_encoder"]
    assert manifest["model"]["tokenizers"] == []
    assert manifest["quality"]["passed"]
    settings = {"num_inference_steps": 3, "sampler": "euler", "seed": 5, "negative_prompt": "an ugly star"}
    banked, whole = sources.open_pipeline(str(bundle)), sources.open_pipeline(source)
    for prompt in (PROMPT, "a (green:1.3) ring"):
        assert same(generate(banked, prompt, **settings)[0], generate(whole, prompt, **settings)[0])
    with pytest.raises(RequestError, match=r"not prepared.*a \(green:1\.3\) ring"):
        generate(banked, "a blue ring", **settings)


def test_memory_beyond_the_limit_is_refused_before_any_work(tmp_path):
    source = tiny.folder("sd1", tmp_path / "sd1")
    with pytest.raises(RequestError, match=r"\(predicted\).*--max-ram of 0\.5 GiB"):
        package(source, tmp_path, max_ram_bytes=512 << 20)
    assert not list(tmp_path.glob("*.edgesd"))
    assert workers.child_limit(None) is None
    assert 0 < workers.child_limit(64 << 30) < 64 << 30
