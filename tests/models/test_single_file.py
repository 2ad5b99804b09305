"""Single files in the original key layout: told by their tensors, converted whole, drawn like the model they hold."""

import json
import shutil
from pathlib import Path

import original
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from edgesd import child, sources
from edgesd.errors import DataError, RequestError, SetupError
from edgesd.models import single_file
from edgesd.models.facts import read_json, safetensors_header
from edgesd.models.load import embedded_folder, load, open_checkpoint

WORDS = str(embedded_folder() / "tokenizer")


@pytest.fixture
def tiny_families(monkeypatch, tmp_path):
    """family -> (file, diffusers' own pipeline): the configs that ship replaced by tiny ones, no child processes."""
    monkeypatch.setattr(child, "in_child", lambda f, *args, label="": f(*args))
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))
    single_file._stages.cache_clear()

    def make(family, dtype=torch.float32):
        pipeline = tiny.pipeline(family, "full")
        pipeline.save_pretrained(tmp_path / "true")
        parts = {
            path.name: read_json(next(path.glob("*config.json"))) | {"pad_token": "<|endoftext|>"}
            for path in sorted((tmp_path / "true").iterdir())
            if path.is_dir()
        }
        known = {"model_index": read_json(tmp_path / "true" / "model_index.json"), **parts}
        monkeypatch.setattr(single_file, "configs", lambda name: known)
        return original.save(pipeline, tmp_path / "my-model.safetensors", dtype), pipeline

    return make


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "inpaint"])
def test_a_file_becomes_the_model_it_holds(family, tiny_families):
    path, truth = tiny_families(family)
    model = load(str(path), tokenizer=WORDS)
    assert (model.source, model.spec.name) == ("my-model", "my-model")
    assert model.spec.family == {"inpaint": "sd1"}.get(family, family)
    assert model.spec.unet_in_channels == (9 if family == "inpaint" else 4)
    for part, module in model.modules.items():
        for (name, got), want in zip(
            module.state_dict().items(), getattr(truth, part).state_dict().values(), strict=True
        ):
            assert torch.equal(got, want), (part, name)


def test_the_file_draws(tiny_families):
    from edgesd.runtime.generate import generate

    path, _ = tiny_families("sd1", torch.float16)
    pipeline = sources.torch_pipeline(load(str(path), tokenizer=WORDS))
    assert generate(pipeline, "a red circle", num_inference_steps=2, sampler="euler")[0].image.std() > 2


def test_weights_keep_their_type_and_a_second_opening_converts_nothing(tiny_families, monkeypatch):
    path, _ = tiny_families("sd1", torch.float16)
    folder = single_file.convert(path, WORDS)
    assert {e["dtype"] for e in safetensors_header(next((folder / "unet").glob("*.safetensors"))).values()} == {"F16"}
    monkeypatch.setattr(single_file, "write_folder", None)
    assert single_file.convert(path, WORDS) == folder


def test_the_prediction_type_is_the_files_mark_or_the_users_word(tiny_families):
    path, _ = tiny_families("sd1")
    assert open_checkpoint(str(path), tokenizer=WORDS).spec.prediction_type == "epsilon"
    assert open_checkpoint(str(path), tokenizer=WORDS, prediction="v_prediction").spec.prediction_type == "v_prediction"
    save_file(load_file(path) | {"v_pred": torch.zeros(0)}, path)
    assert open_checkpoint(str(path), tokenizer=WORDS).spec.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "lost",
    [
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "model.diffusion_model.out.2.bias",
    ],
)
def test_a_missing_tensor_is_named_or_counted(lost, tiny_families):
    path, _ = tiny_families("sd1")
    save_file({k: v for k, v in load_file(path).items() if k != lost}, path)
    with pytest.raises(DataError, match=r"my-model\.safetensors"):
        open_checkpoint(str(path), tokenizer=WORDS)


def test_a_tensor_too_many_and_a_wrong_shape_are_refused(tiny_families):
    path, _ = tiny_families("sd1")
    whole = load_file(path)
    save_file(whole | {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(DataError, match="tensors in its UNet"):
        open_checkpoint(str(path), tokenizer=WORDS)
    save_file(whole | {"model.diffusion_model.out.2.bias": torch.zeros(7)}, path)
    with pytest.raises(DataError, match="does not convert"):
        open_checkpoint(str(path), tokenizer=WORDS)


def header(*names):
    return {name: {"dtype": "F16", "shape": [1, 4]} for name in names}


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight", "sd1"),
        ("cond_stage_model.model.positional_embedding", "sd2"),
        ("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight", "sdxl"),
        ("conditioner.embedders.0.model.positional_embedding", "sdxl_refiner"),
    ],
)
def test_families_are_told_by_their_text_encoders(text, family):
    assert single_file.family_of(header("model.diffusion_model.out.2.bias", text), "x") == family


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",), "a LoRA.*--lora"),
        (("model.diffusion_model.double_blocks.0.img_attn.qkv.weight",), "a FLUX model"),
        (("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",), "a Stable Diffusion 3 model"),
        (("model.diffusion_model.out.2.bias",), "a UNet without text encoder"),
        ((), "no whole Stable Diffusion"),
    ],
)
def test_other_files_are_refused_by_what_they_are(names, message):
    with pytest.raises(RequestError, match=message):
        single_file.family_of(header(*names), "x.safetensors")


def test_a_broken_file_is_broken_data(tmp_path):
    for content in (b"", b"\xff" * 64, (9).to_bytes(8, "little") + b'{"a": 1} '):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(DataError):
            open_checkpoint(str(tmp_path / "x.safetensors"))


def test_no_vocabulary_is_a_matter_of_setup(monkeypatch, tmp_path):
    def unreachable(*_):
        raise SetupError("no hub", "", "")

    monkeypatch.setattr(single_file, "hub_folder", unreachable)
    with pytest.raises(SetupError, match="--tokenizer FOLDER"):
        single_file.vocabulary(None, tmp_path)
    with pytest.raises(RequestError, match="no tokenizer"):
        single_file.vocabulary(str(tmp_path), tmp_path)


def test_a_tokenizer_beside_the_file_needs_no_word(tiny_families):
    path, _ = tiny_families("sd1")
    shutil.copytree(WORDS, path.parent / "tokenizer")
    assert single_file.vocabulary(None, path.parent) == path.parent / "tokenizer"
    assert sources.open_pipeline(str(path)).spec.name == "my-model"


@pytest.mark.parametrize("family", single_file.FAMILIES)
def test_the_configs_that_ship_have_the_published_sizes(family):
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = single_file.configs(family)
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with init_empty_weights():
        made = [UNet2DConditionModel.from_config(config["unet"]), AutoencoderKL.from_config(config["vae"])]
        made += [kind(CLIPTextConfig(**config[part])) for part, kind in kinds.items() if part in config]
    first, second = 123_060_480, 694_659_840
    assert [sum(p.numel() for p in m.parameters()) for m in made] == {
        "sd1": [859_520_964, 83_653_863, first],
        "sd2": [865_910_724, 83_653_863, 340_387_840],
        "sdxl": [2_567_463_684, 83_653_863, first, second],
        "sdxl_refiner": [2_259_526_660, 83_653_863, second],
    }[family]


def test_pads_are_the_familys_where_the_vocabulary_has_them(tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({"!": 0, "<|endoftext|>": 1}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    single_file._write_tokenizer(tmp_path / "tokenizer_2", words, "!")
    made = Path(tmp_path / "tokenizer_2")
    assert read_json(made / "tokenizer_config.json")["pad_token"] == "!"
    assert (made / "merges.txt").exists()
