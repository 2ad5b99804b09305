"""Export forms against diffusers and transformers themselves, for tiny models of each family."""

from __future__ import annotations

import pytest
import tiny
import torch

from edgesd.errors import RequestError
from edgesd.manifest import Axes
from edgesd.models import modules as m
from edgesd.models.plain import attention, instance_norms

AXES = Axes(size_px=tiny.SIZE_PX, batch=2)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_unet_equals_diffusers(family):
    parts = tiny.modules(family)
    component = m.build("unet", parts, tiny.spec(family), AXES)
    names = [spec.name for spec in component.inputs]
    x = dict(zip(names, component.example, strict=True))
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    with torch.no_grad():
        want = parts["unet"](
            x["sample"], x["timestep"].expand(2), x["encoder_hidden_states"],
            timestep_cond=x.get("timestep_cond"), added_cond_kwargs=added or None,
        ).sample  # fmt: skip
        close(component.module(*component.example), want)
        torch.testing.assert_close(
            m.half(component).module(*component.example), want, rtol=0, atol=0.02 * want.abs().max().item()
        )
    assert ("time_ids" in names) == family.startswith("sdxl")
    assert ("timestep_cond" in names) == (family == "lcm")
    assert component.inputs[0].shape[1] == (9 if family == "inpaint" else 4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_declared_shapes_and_dtypes_are_the_real_ones(family):
    parts = tiny.modules(family, "full")
    for name in ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"):
        if name not in parts and not name.startswith("vae"):
            continue
        component = m.build(name, parts, tiny.spec(family, "full"), AXES)
        with torch.no_grad():
            made = component.module(*component.example)
        made = made if isinstance(made, tuple) else (made,)
        for spec, tensor in (
            *zip(component.inputs, component.example, strict=True),
            *zip(component.outputs, made, strict=True),
        ):
            assert spec.shape == tuple(tensor.shape), spec.name
            assert spec.dtype == str(tensor.dtype).removeprefix("torch."), spec.name


def test_building_leaves_the_callers_modules_alone_and_copies_no_weight():
    parts = tiny.modules("sd1", "full")
    before = {name: [type(child) for child in part.modules()] for name, part in parts.items()}
    processors = [type(p) for p in parts["unet"].attn_processors.values()]
    for name in ("text_encoder", "unet", "vae_decoder"):
        component = m.build(name, parts, tiny.spec("sd1", "full"), AXES)
        own = {p.data_ptr() for part in parts.values() for p in part.parameters()}
        assert {p.data_ptr() for p in component.module.parameters()} <= own
        m.half(component)
    assert {name: [type(child) for child in part.modules()] for name, part in parts.items()} == before
    assert [type(p) for p in parts["unet"].attn_processors.values()] == processors
    assert all(p.dtype == torch.float32 for part in parts.values() for p in part.parameters())


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_text_encoder_equals_transformers(clip_skip):
    parts = tiny.modules("sd1")
    component = m.build("text_encoder", parts, tiny.spec("sd1").model_copy(update={"clip_skip": clip_skip}), AXES)
    model = parts["text_encoder"]
    with torch.no_grad():
        truth = model(component.example[0], output_hidden_states=True)
        # diffusers' clip_skip: an earlier state through the final norm.
        norm = getattr(model, "text_model", model).final_layer_norm
        close(component.module(*component.example), norm(truth.hidden_states[-1 - clip_skip]))
    assert len(component.module.layers) == 3 - clip_skip


@pytest.mark.parametrize("eos_id", [2, tiny.VOCABULARY - 1])
def test_sdxl_second_encoder_gives_the_penultimate_state_and_the_pooled_end_token(eos_id):
    parts = {"text_encoder_2": tiny.text_encoder(width=tiny.POOLED, projection=True, eos_id=eos_id)}
    component = m.build("text_encoder_2", parts, tiny.spec("sdxl"), AXES)
    end = tiny.VOCABULARY - 1
    for ids in (
        component.example[0],
        torch.tensor([[97, end] + [end] * 10]),
        torch.tensor([[97, 1, 4, end] + [0] * 8]),
    ):
        with torch.no_grad():
            truth = parts["text_encoder_2"](ids, output_hidden_states=True)
            states, pooled = component.module(ids)
        close(states, truth.hidden_states[-2])
        close(pooled, truth.text_embeds)


@pytest.mark.parametrize("kind", ["tiny", "full"])
def test_vae_equals_diffusers(kind):
    parts, facts = tiny.modules("sd1", kind), tiny.spec("sd1", kind)
    decoder, encoder = (m.build(f"vae_{way}", parts, facts, AXES) for way in ("decoder", "encoder"))
    with torch.no_grad():
        close(decoder.module(*decoder.example), parts["vae"].decode(decoder.example[0]).sample)
        made, truth = encoder.module(*encoder.example), parts["vae"].encode(encoder.example[0])
    if kind == "tiny":
        close(made, truth.latents)
    else:
        close(made[0], truth.latent_dist.mean)
        close(made[1], truth.latent_dist.std)
    assert [spec.name for spec in encoder.outputs] == (["mean"] if kind == "tiny" else ["mean", "std"])


@pytest.mark.parametrize("shape", [(2, 8, 5), (1, 8, 3, 4)])
def test_instance_norms_equal_group_norms(shape):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.GroupNorm(4, 8, eps=1e-3))
    torch.nn.init.normal_(net[0].weight)
    torch.nn.init.normal_(net[0].bias)
    copied = instance_norms(net)
    x = 3 + 5 * torch.randn(shape)
    close(copied(x), net(x))
    assert isinstance(net[0], torch.nn.GroupNorm)
    assert not any(isinstance(layer, torch.nn.GroupNorm) for layer in copied.modules())
    # float16 sums would overflow here.
    loud = 200 * torch.randn(1, 8, 64, 64)
    torch.testing.assert_close(copied.half()(loud.half()).float(), net.float()(loud), rtol=0, atol=0.02)


def test_no_tensor_of_the_exported_graph_has_more_than_four_dimensions():
    component = m.build("unet", tiny.modules("sdxl"), tiny.spec("sdxl"), AXES)
    graph = torch.export.export(component.module, component.example, strict=False).graph
    ranks = [node.meta["val"].ndim for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert max(ranks) == 4
    assert not any("scaled_dot_product" in str(node.target) or "alias" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize(
    ("name", "options"),
    [("vae", {}), ("text_encoder_2", {}), ("unet", {"size_px": (60, 64)}), ("text_encoder", {"clip_skip": 3})],
)
def test_wrong_requests_are_refused(name, options):
    axes = Axes(size_px=options.get("size_px", tiny.SIZE_PX))
    spec = tiny.spec().model_copy(update={"clip_skip": options.get("clip_skip", 0)})
    with pytest.raises(RequestError):
        m.build(name, tiny.modules(), spec, axes)


def test_unknown_conditioning_is_refused():
    parts = tiny.modules()
    parts["unet"].register_to_config(class_embed_type="timestep")
    with pytest.raises(RequestError, match="class_embed_type"):
        m.build("unet", parts, tiny.spec(), AXES)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_same_where_gradients_flow_and_keeps_no_map_of_it(masked):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, length, 32, generator=generator) for length in (96, 80, 80))
    mask = torch.full((96, 80), -1e4).triu(1) if masked else None
    truth = attention(query, key, value, 4, 0.3, mask)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        made = attention(query.requires_grad_(True), key, value, 4, 0.3, mask)
    torch.testing.assert_close(made, truth, rtol=1e-5, atol=1e-5)
    assert max(kept) < 2 * 4 * 96 * 80
