"""Export-friendly forms of a checkpoint's modules, shared by all targets: static shapes, plain operations, no branches.

`build` wraps diffusers' and transformers' own layers: it shares their weights and parameter names, leaves the caller's
modules as they were, and swaps only what converters stumble over (fused attention, masking utilities, dropout).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from edgesd.errors import RequestError
from edgesd.manifest import Axes, ModelSpec, Role, TensorSpec
from edgesd.models.plain import Layer, attention, plain, share

# Far below any attention score, yet a float16 sum with one stays finite (a float16 holds down to -65504).
MASKED = -30000.0
# Inputs that a half-precision module takes in float32: float16 holds no timestep above 2048 exactly, and diffusers
# joins text_embeds to the float32 sinusoids of time_ids before it casts both.
FLOAT32_INPUTS = ("timestep", "time_ids", "text_embeds")
# Which of a checkpoint's modules a component is made from.
PARTS = {
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "unet": "unet",
    "vae_decoder": "vae",
    "vae_encoder": "vae",
}
Tensors = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Component:
    """One lowerable piece of a model.

    module: eval; forward takes tensors in the order of `inputs` and returns one tensor, or a tuple in the order of
    `outputs` when there are several. example: fixed inputs in the range of real ones, the shapes of `inputs`.
    """

    name: Role
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: tuple[torch.Tensor, ...]


def build(name: str, modules: Mapping[str, nn.Module], spec: ModelSpec, axes: Axes) -> Component:
    """The component `name` at the static shapes of `axes`, in float32; its module shares the weights of `modules`.

    name: text_encoder, text_encoder_2, unet, vae_decoder or vae_encoder; names and shapes of its tensors as in
    `edgesd.runtime.session`. axes: size_px and batch (UNet rows) are used. Raises RequestError: no such component, a
    size off the latent grid, conditioning edgesd does not know.
    """
    if PARTS.get(name) not in modules:
        have = [key for key, part in PARTS.items() if part in modules]
        raise RequestError(f"component {name!r}", ", ".join(have), "Choose a component that the model has")
    if any(side % spec.latent.downscale for side in axes.size_px):
        height, width = axes.size_px
        raise RequestError(
            f"picture size {height}x{width} px", f"multiples of {spec.latent.downscale} px", "Choose such a size"
        )
    part: Layer = modules[PARTS[name]]
    if name == "unet":
        module, inputs, outputs = _unet(part, spec, axes)
    elif name.startswith("vae"):
        module, inputs, outputs = _vae(name, part, spec, axes)
    else:
        module, inputs, outputs = _text_encoder(name, part, spec)
    return Component(cast(Role, name), module.eval(), inputs, outputs, _example(inputs, spec, axes))


def half(component: Component) -> Component:
    """The same component with float16 weights and arithmetic; its inputs and outputs stay float32.

    Costs a float16 copy of the weights. The sinusoids of the timestep stay float32. Layer norms keep
    float32 sums where the target's operation does so (ONNX's stash type).
    """
    return replace(component, module=_Half(component).eval())


class TextEncoder(nn.Module):
    """CLIP's text tower written out on transformers' layers: causal mask and positions are constants.

    length: tokens a call. skipped: layers left out at the end for encoder_hidden_states; normed: whether the final
    norm follows them (SD 1.x/2.x) or not (SDXL). projection: gives the pooled text_embeds too, from the last layer at
    the first end token; eos_id 2 is transformers' name for "the highest id" of old configs.
    """

    def __init__(
        self, core: Layer, length: int, skipped: int, *, normed: bool, projection: Layer | None, eos_id: int
    ) -> None:
        super().__init__()
        layers = core.encoder.layers
        self.token_embedding = core.embeddings.token_embedding
        self.position_embedding = core.embeddings.position_embedding
        self.kept = len(layers) - skipped
        self.layers = layers if projection is not None else layers[: self.kept]
        self.final_layer_norm: Layer = core.final_layer_norm if normed or projection is not None else None
        self.text_projection = projection
        self.normed, self.eos_id, self.length = normed, eos_id, length
        self.mask = torch.full((1, 1, length, length), MASKED).triu(1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        states = self.token_embedding(input_ids) + self.position_embedding.weight[: self.length].unsqueeze(0)
        mask = self.mask.to(states.dtype)
        kept = states
        for index, layer in enumerate(self.layers):
            states = self._layer(layer, states, mask)
            kept = states if index + 1 == self.kept else kept
        hidden = self.final_layer_norm(kept) if self.normed else kept
        if self.text_projection is None:
            return hidden
        return hidden, self.text_projection(self._pool(input_ids, self.final_layer_norm(states)))

    @staticmethod
    def _layer(layer: Layer, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attn, normed = layer.self_attn, layer.layer_norm1(states)
        heads = attn.q_proj.out_features // attn.head_dim
        mixed = attention(
            attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed), heads, attn.head_dim**-0.5, mask
        )
        states = states + attn.out_proj(mixed)
        return states + layer.mlp(layer.layer_norm2(states))

    def _pool(self, input_ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The state at the first end token, chosen by a one-hot product (no gather by a computed index)."""
        score = input_ids if self.eos_id == 2 else (input_ids == self.eos_id).to(input_ids.dtype)
        # Earlier positions win ties, so the maximum is unique.
        score = score * self.length + torch.arange(self.length - 1, -1, -1, dtype=input_ids.dtype)
        chosen = (score == score.amax(dim=1, keepdim=True)).to(states.dtype)
        return (chosen.unsqueeze(1) @ states).squeeze(1)


class UNet(nn.Module):
    """diffusers' UNet2DConditionModel with positional inputs. extra: names of the other inputs."""

    def __init__(self, unet: Layer, extra: tuple[str, ...]) -> None:
        super().__init__()
        self.unet, self.extra = unet, extra

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, *extra: torch.Tensor
    ) -> torch.Tensor:
        named = dict(zip(self.extra, extra, strict=True))
        timestep_cond = named.pop("timestep_cond", None)
        return self.unet(
            sample, timestep, encoder_hidden_states, timestep_cond=timestep_cond,
            added_cond_kwargs=named if named else None, return_dict=False,
        )[0]  # fmt: skip


class VaeDecoder(nn.Module):
    """Latents, divided by the scaling factor, to a picture of about -1..1."""

    def __init__(self, vae: Layer) -> None:
        super().__init__()
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.decoder = vae.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


class VaeEncoder(nn.Module):
    """A picture of -1..1 to the mean (and, for a full VAE, the standard deviation) of its latents, not yet scaled."""

    def __init__(self, vae: Layer, channels: int, *, gaussian: bool) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = getattr(vae, "quant_conv", None)
        self.channels, self.gaussian = channels, gaussian

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        if not self.gaussian:
            return moments
        log_variance = moments[:, self.channels :].clamp(-30.0, 20.0)
        return moments[:, : self.channels], torch.exp(0.5 * log_variance)


class _Half(nn.Module):
    """A component's module in float16 between float32 borders."""

    def __init__(self, component: Component) -> None:
        super().__init__()
        self.module = share(component.module, torch.float16)
        self.cast = tuple(spec.dtype == "float32" and spec.name not in FLOAT32_INPUTS for spec in component.inputs)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        made = self.module(*(x.half() if cast else x for x, cast in zip(inputs, self.cast, strict=True)))
        return made.float() if isinstance(made, torch.Tensor) else tuple(x.float() for x in made)


def _text_encoder(name: str, model: Layer, spec: ModelSpec) -> tuple[nn.Module, Tensors, Tensors]:
    tokenizer = next((t for t in spec.tokenizers if t.component == name), None)
    if tokenizer is None:
        raise RequestError(f"{name} without a tokenizer", "one tokenizer per text encoder", "Use a whole pipeline")
    shared, sdxl = share(model), spec.family.startswith("sdxl")
    core: Layer = getattr(shared, "text_model", shared)
    most = len(core.encoder.layers) - 1 - sdxl
    if spec.clip_skip > most:
        raise RequestError(f"clip_skip {spec.clip_skip}", f"0 to {most}", "Skip fewer layers")
    projection = shared.text_projection if name == "text_encoder_2" else None
    module = TextEncoder(
        core,
        tokenizer.max_length,
        spec.clip_skip + sdxl,
        normed=not sdxl,
        projection=projection,
        eos_id=model.config.eos_token_id,
    )
    meaning = f"token ids: start {tokenizer.bos_id}, end {tokenizer.eos_id}, filled with {tokenizer.pad_id}"
    inputs = (TensorSpec(name="input_ids", dtype="int64", shape=(1, tokenizer.max_length), meaning=meaning),)
    states = (1, tokenizer.max_length, model.config.hidden_size)
    outputs: Tensors = (_f32("encoder_hidden_states", states, "what the UNet attends to, one state per token"),)
    if projection is not None:
        outputs += (_f32("text_embeds", (1, projection.out_features), "the whole prompt as one vector"),)
    return module, inputs, outputs


def _unet(unet: Layer, spec: ModelSpec, axes: Axes) -> tuple[nn.Module, Tensors, Tensors]:
    config, batch = unet.config, axes.batch
    for option in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if (value := config.get(option)) is not None and (option, value) != ("addition_embed_type", "text_time"):
            allowed = "text prompts, SDXL's text_time, LCM's guidance embedding"
            raise RequestError(f"a UNet with {option} {value!r}", allowed, "Choose another model")
    height, width = (side // spec.latent.downscale for side in axes.size_px)
    context = config.cross_attention_dim
    context = context if isinstance(context, int) else context[0]
    length = max(t.max_length * t.chunks for t in spec.tokenizers)
    inputs = [
        _f32("sample", (batch, config.in_channels, height, width), "noisy latents as the table's row makes them"),
        _f32("timestep", (1,), "the row's timestep, fractions allowed"),
        _f32("encoder_hidden_states", (batch, length, context), "the prompt's states, one set per row"),
    ]
    if config.addition_embed_type == "text_time":
        count = 5 if spec.family == "sdxl_refiner" else 6
        last = "aesthetic score" if count == 5 else "target height, width"
        pooled = config.projection_class_embeddings_input_dim - count * config.addition_time_embed_dim
        inputs.append(_f32("text_embeds", (batch, pooled), "the whole prompt as one vector"))
        inputs.append(_f32("time_ids", (batch, count), f"original height, width, crop top, left, {last}"))
    if config.time_cond_proj_dim is not None:
        inputs.append(_f32("timestep_cond", (batch, config.time_cond_proj_dim), "embedding of the guidance scale"))
    outputs = (_f32("model_output", (batch, config.out_channels, height, width), spec.prediction_type),)
    return UNet(plain(unet), tuple(i.name for i in inputs[3:])), tuple(inputs), outputs


def _vae(name: str, vae: Layer, spec: ModelSpec, axes: Axes) -> tuple[nn.Module, Tensors, Tensors]:
    (height, width), scale, channels = axes.size_px, spec.latent.downscale, spec.latent.channels
    grid = (1, channels, height // scale, width // scale)
    if name == "vae_decoder":
        inputs = (_f32("latents", grid, "latents / scaling_factor + shift_factor"),)
        return VaeDecoder(plain(vae)), inputs, (_f32("image", (1, 3, height, width), "RGB, about -1..1"),)
    gaussian = hasattr(vae, "quant_conv")  # AutoencoderTiny has none: it gives one latent, not a distribution
    outputs: Tensors = (_f32("mean", grid, "latents, not yet scaled"),)
    if gaussian:
        outputs += (_f32("std", grid, "standard deviation of the latents"),)
    inputs = (_f32("image", (1, 3, height, width), "RGB, -1..1"),)
    return VaeEncoder(plain(vae), channels, gaussian=gaussian), inputs, outputs


def _f32(name: str, shape: tuple[int, ...], meaning: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape, meaning=meaning)


def _example(inputs: Tensors, spec: ModelSpec, axes: Axes) -> tuple[torch.Tensor, ...]:
    """Fixed inputs of realistic range: half a prompt of tokens; unit normal except time, sizes and pictures."""
    generator, made = torch.Generator().manual_seed(0), []
    for tensor in inputs:
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.name == "input_ids":
            layout = spec.tokenizers[0]
            words = torch.randint(0, max(layout.bos_id, 1), (layout.max_length // 2,), generator=generator)
            noise = torch.full(tensor.shape, layout.pad_id)
            noise[0, : len(words) + 2] = torch.tensor([layout.bos_id, *words.tolist(), layout.eos_id])
        elif tensor.name == "timestep":
            noise = torch.full(tensor.shape, 601.25)
        elif tensor.name == "time_ids":
            sizes = torch.tensor([*axes.size_px, 0, 0, *axes.size_px], dtype=torch.float32)
            noise = sizes[: tensor.shape[1]].expand(tensor.shape).clone()
        elif tensor.name == "image":
            noise = noise.tanh()
        made.append(noise)
    return tuple(made)
