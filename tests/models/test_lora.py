"""LoRA files fused into weights, against the definition: y = W x + scale * alpha / rank * up(down(x))."""

import json

import original
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from edgesd.errors import DataError, RequestError
from edgesd.models import ingredients, lora
from edgesd.models.load import load, load_parts, open_checkpoint

RANK = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {f: tiny.folder(f, tmp_path_factory.mktemp(f)) for f in ("sd1", "sdxl")}


def layers(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def pair(layer, seed):
    """(down, up) of random numbers that fit a layer; a kernel's down has the kernel."""
    generator = torch.Generator().manual_seed(seed)
    weight = layer.weight
    down = torch.randn((RANK, *weight.shape[1:]), generator=generator) * 0.2
    up = torch.randn((weight.shape[0], RANK, *(1,) * (weight.ndim - 2)), generator=generator) * 0.2
    return down, up


def with_hooks(module, pairs, factor):
    """The definition, as forward hooks on the layers themselves."""

    def hook(layer, down, up):
        def added(_, inputs, output):
            if isinstance(layer, nn.Conv2d):
                mid = nn.functional.conv2d(inputs[0], down, stride=layer.stride, padding=layer.padding)
                return output + factor * nn.functional.conv2d(mid, up)
            return output + factor * inputs[0] @ down.T @ up.T

        return added

    for name, (down, up) in pairs.items():
        layer = module.get_submodule(name)
        layer.register_forward_hook(hook(layer, down, up))
    return module


def unet_output(unet, sdxl=False):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn((1, 4, 8, 8), generator=generator)
    states = torch.randn((1, 6, unet.config.cross_attention_dim), generator=generator)
    added = {"text_embeds": torch.ones(1, tiny.POOLED), "time_ids": torch.full((1, 6), 64.0)} if sdxl else None
    with torch.no_grad():
        return unet(x, torch.tensor([500.0]), states, added_cond_kwargs=added).sample


def words(model):
    with torch.no_grad():
        return model(torch.arange(8)[None]).last_hidden_state


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def kohya_unet(name):
    return f"lora_unet_{name.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"


def peft_unet(name):
    return f"unet.{name}", ".lora_A.weight", ".lora_B.weight"


def diffusers_unet(name):
    return f"unet.{name}", ".lora.down.weight", ".lora.up.weight"


@pytest.mark.parametrize("style", [kohya_unet, peft_unet, diffusers_unet])
def test_every_layer_of_a_unet_takes_it(style, folders, tmp_path):
    truth = tiny.unet("sd1")
    pairs = {name: pair(layer, i) for i, (name, layer) in enumerate(layers(truth).items())}
    tensors = {}
    for name, (down, up) in pairs.items():
        base, one, other = style(name)
        tensors |= {f"{base}{one}": down, f"{base}{other}": up}
        tensors |= {f"{base}.alpha": torch.tensor(1.0)} if style is kohya_unet else {}
    save_file(tensors, tmp_path / "l.safetensors")
    unet = load(folders["sd1"], lora=[f"{tmp_path / 'l.safetensors'}:0.7"]).modules["unet"]
    plain = unet_output(truth)
    expected = unet_output(with_hooks(truth, pairs, 0.7 * (0.5 if style is kohya_unet else 1.0)))
    close(unet_output(unet), expected)
    assert (expected - plain).abs().max() > 0.01


def test_the_original_block_names_are_the_same_layers(folders, tmp_path):
    """What kohya's trainer writes for SDXL; the names come from the test's own inverse mapping."""
    truth = tiny.unet("sdxl")
    pairs = {name: pair(layer, i) for i, (name, layer) in enumerate(layers(truth).items())}
    tensors = {}
    for name, (down, up) in pairs.items():
        key = original._unet_key(f"{name}.weight", truth.config.layers_per_block + 1, truth)
        base = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
    save_file(tensors, tmp_path / "l.safetensors")
    unet = load(folders["sdxl"], lora=[str(tmp_path / "l.safetensors")]).modules["unet"]
    close(unet_output(unet, sdxl=True), unet_output(with_hooks(truth, pairs, 1.0), sdxl=True))


@pytest.mark.parametrize(
    ("prefix", "join", "down_name", "up_name"),
    [
        ("lora_te_", "_", "lora_down.weight", "lora_up.weight"),
        ("lora_te1_", "_", "lora_down.weight", "lora_up.weight"),
        ("text_encoder.", ".", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("text_encoder.", ".", "lora_A.weight", "lora_B.weight"),
    ],
)
def test_text_encoders_take_it(prefix, join, down_name, up_name, folders, tmp_path):
    model = load(folders["sd1"]).modules["text_encoder"]
    pairs = {name: pair(layer, i) for i, (name, layer) in enumerate(layers(model).items())}
    tensors = {}
    for name, (down, up) in pairs.items():
        whole = "text_model." + name.removeprefix("text_model.")
        base = prefix + whole.replace(".", join)
        tensors |= {f"{base}.{down_name}": down, f"{base}.{up_name}": up}
    save_file(tensors, tmp_path / "l.safetensors")
    fused = load(folders["sd1"], lora=[str(tmp_path / "l.safetensors")]).modules["text_encoder"]
    close(words(fused), words(with_hooks(model, pairs, 1.0)))


def test_the_second_text_encoder_and_its_projection_take_it(folders, tmp_path):
    model = load(folders["sdxl"]).modules["text_encoder_2"]
    down, up = pair(model.text_projection, 1)
    base = "lora_te2_text_projection"
    save_file({f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}, tmp_path / "l.safetensors")
    fused = load(folders["sdxl"], lora=[str(tmp_path / "l.safetensors")]).modules["text_encoder_2"]
    close(fused.text_projection.weight, model.text_projection.weight + up @ down)


def test_old_attention_processors_and_a_middle_kernel(folders, tmp_path):
    truth = tiny.unet("sd1")
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    to_q, to_out = (pair(truth.get_submodule(f"{attention}.{name}"), i) for i, name in enumerate(("to_q", "to_out.0")))
    conv = truth.mid_block.resnets[0].conv1
    down, up = torch.randn(RANK, conv.in_channels, 1, 1), torch.randn(conv.out_channels, RANK, 1, 1)
    mid = torch.randn(RANK, RANK, 3, 3)
    tensors = {
        f"unet.{attention}.processor.to_q_lora.down.weight": to_q[0],
        f"unet.{attention}.processor.to_q_lora.up.weight": to_q[1],
        f"unet.{attention}.processor.to_out_lora.down.weight": to_out[0],
        f"unet.{attention}.processor.to_out_lora.up.weight": to_out[1],
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": down,
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": up,
        "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": mid,
    }
    save_file(tensors, tmp_path / "l.safetensors")
    fused = load(folders["sd1"], lora=[str(tmp_path / "l.safetensors")]).modules["unet"]
    for name, (one, other) in (("to_q", to_q), ("to_out.0", to_out)):
        old = truth.get_submodule(f"{attention}.{name}").weight
        close(fused.get_submodule(f"{attention}.{name}").weight, old + other @ one)
    # The chain of convolutions is one convolution with the fused kernel.
    x = torch.randn(1, conv.in_channels, 5, 5)
    chain = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1), up)
    kernel = fused.mid_block.resnets[0].conv1.weight - conv.weight
    torch.testing.assert_close(nn.functional.conv2d(x, kernel, padding=1), chain, rtol=1e-4, atol=1e-3)


def test_alpha_may_stand_in_pefts_metadata(folders, tmp_path):
    truth = tiny.unet("sd1")
    down, up = pair(truth.conv_in, 1)
    tensors = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
    noted = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": RANK})}
    save_file(tensors, tmp_path / "l.safetensors", metadata=noted)
    fused = load(folders["sd1"], lora=[str(tmp_path / "l.safetensors")]).modules["unet"]
    added = 6 / RANK * (up.flatten(1) @ down.flatten(1)).reshape(truth.conv_in.weight.shape)
    close(fused.conv_in.weight, truth.conv_in.weight + added)


def small(tmp_path, name="s.safetensors", **changed):
    truth = tiny.unet("sd1")
    down, up = pair(truth.conv_in, 1)
    tensors = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up} | changed
    save_file(tensors, tmp_path / name)
    return tmp_path / name


def test_a_part_loads_alone_and_identity_follows_file_and_scale(folders, tmp_path):
    path = small(tmp_path)
    base = open_checkpoint(folders["sd1"])
    one, half, again = (open_checkpoint(folders["sd1"], lora=[t]) for t in (str(path), f"{path}:0.5", str(path)))
    assert len({base.sha256, one.sha256, half.sha256}) == 3
    assert one.sha256 == again.sha256
    assert [(i.kind, i.name, i.scale) for i in half.ingredients] == [("lora", "s.safetensors", 0.5)]
    assert list(load_parts(one, ["text_encoder"]).modules) == ["text_encoder"]


def test_two_files_add_up(folders, tmp_path):
    path = small(tmp_path)
    truth = tiny.unet("sd1").conv_in.weight
    once, twice = (load(folders["sd1"], lora=[str(path)] * n).modules["unet"].conv_in.weight for n in (1, 2))
    close(twice - truth, 2 * (once - truth))


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_not_there.lora_down.weight",
        "lora_unet_conv_in.dora_scale",
        "lora_unet_conv_out.alpha",
        "lora_te2_text_projection.lora_up.weight",
    ],
)
def test_a_key_without_a_weight_is_named(key, folders, tmp_path):
    with pytest.raises(RequestError, match=key.replace(".", r"\.")):
        open_checkpoint(folders["sd1"], lora=[str(small(tmp_path, **{key: torch.ones(1)}))])


def test_shapes_that_do_not_fit_are_refused_before_any_weight_is_read(folders, tmp_path):
    for name in ("down", "up"):
        wrong = {f"lora_unet_conv_in.lora_{name}.weight": torch.ones(3, 5, 3, 3)}
        with pytest.raises(RequestError, match="conv_in"):
            open_checkpoint(folders["sd1"], lora=[str(small(tmp_path, **wrong))])


def test_files_and_scales_that_cannot_be_are_refused(folders, tmp_path):
    path = small(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    for text in ("nowhere.safetensors", f"{path}:0", f"{path}:99", f"{path}:strong", str(tmp_path / "x.ckpt")):
        with pytest.raises(RequestError):
            lora.read(text)
    with pytest.raises(DataError):
        open_checkpoint(folders["sd1"], lora=[str(tmp_path / "broken.safetensors")])


def test_clip_skip_leaves_layers_out(folders):
    plain, skipping = load(folders["sd1"]), load(folders["sd1"], clip_skip=1)
    assert skipping.spec.clip_skip == 1
    assert skipping.sha256 != plain.sha256  # prompts cached for one are not those of the other
    from edgesd import sources

    ids = torch.arange(24)[None].numpy()
    got = sources.torch_pipeline(skipping).session.run("text_encoder", {"input_ids": ids})["encoder_hidden_states"]
    shorter = plain.modules["text_encoder"]
    core = getattr(shorter, "text_model", shorter)
    core.encoder.layers = core.encoder.layers[:-1]
    close(torch.from_numpy(got), shorter(torch.from_numpy(ids)).last_hidden_state)
    with pytest.raises(RequestError, match="clip skip"):
        open_checkpoint(folders["sd1"], clip_skip=3)


def test_swapped_parts_are_loaded_and_recorded(folders, tmp_path):
    other = tiny.unet("sd1")
    with torch.no_grad():
        other.conv_in.weight.zero_()
    other.save_pretrained(tmp_path / "mine")
    model = load(folders["sd1"], unet=str(tmp_path / "mine"), text_encoder=folders["sd1"])
    assert not model.modules["unet"].conv_in.weight.any()
    assert [(i.kind, i.name) for i in model.ingredients] == [("unet", "mine")]  # its own text encoder is no swap
    with pytest.raises(RequestError, match="--unet"):
        open_checkpoint(folders["sd1"], unet=str(tmp_path))


def test_nothing_added_leaves_the_checkpoint_as_it_is(folders):
    opened = open_checkpoint(folders["sd1"])
    assert ingredients.add(opened) is opened
