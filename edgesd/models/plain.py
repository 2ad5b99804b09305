"""diffusers' layers in the plain form that every converter takes: copies that share weights, never changed originals.

Fused attention, `chunk`, dropout and time frequencies computed on the fly each trouble one converter or another.
Parameter names stay diffusers' own, so whatever is keyed by them still fits.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from edgesd.errors import RequestError

Layer = Any  # a module of diffusers or transformers: its parts are known to us, not to a type checker


def share(module: Layer, dtype: torch.dtype | None = None) -> Layer:
    """A copy of a module's structure on the same weights: changing its parts leaves the original alone.

    dtype: the floating-point weights are converted copies instead.
    """

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if dtype is None or not tensor.is_floating_point():
            return tensor
        cast = tensor.detach().to(dtype)
        return nn.Parameter(cast, requires_grad=False) if isinstance(tensor, nn.Parameter) else cast

    memo = {id(tensor): keep(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def plain(module: Layer) -> Layer:
    """A weight-sharing copy of a diffusers module with attention, gates, time projection and dropout in plain form."""
    shared = share(module)
    parents: list[Layer] = list(shared.modules())
    for parent in parents:
        if hasattr(parent, "to_q") and hasattr(parent, "set_processor"):
            parent.processor = PlainAttention()
        for name, child in list(parent.named_children()):
            if (make := _PLAIN.get(type(child).__name__)) is not None:
                setattr(parent, name, make(child))
    return shared.eval()


def two_product_attention(unet: Layer) -> None:
    """Sets a diffusers UNet's attention to two products and a softmax where a processor trains.

    torch's fused attention is 4 to 15 times slower on the way back in bfloat16 (2.13, heads of 8 to 32 channels). The
    maps [B*heads,S,S] wait in memory for it, so this is for few positions S. Nothing changes where there is a GPU.
    """
    from diffusers.models.attention_processor import AttnProcessor

    if not torch.cuda.is_available():
        unet.set_attn_processor(AttnProcessor())


def instance_norms(module: nn.Module) -> nn.Module:
    """A weight-sharing copy whose group norms are instance norms over groups, for runtimes that have only those."""
    shared = share(module)
    for parent in list(shared.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, InstanceGroupNorm(child))
    return shared.eval()


class PlainAttention:
    """A diffusers attention processor of two matrix products and a softmax; no tensor above 4 dimensions.

    Equals diffusers' `AttnProcessor` without a mask. diffusers reads its options off this signature.
    """

    def __call__(
        self,
        attn: Layer,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: [B,S,C] tokens or a [B,C,H,W] picture (VAE)."""
        if attention_mask is not None:
            raise RequestError("an attention mask", "no mask", "Call the component without one")
        states = hidden_states
        if hidden_states.ndim == 4:
            states = states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
        context = states if encoder_hidden_states is None else encoder_hidden_states
        mixed = attention(attn.to_q(states), attn.to_k(context), attn.to_v(context), attn.heads, attn.scale)
        states = attn.to_out[0](mixed)
        if hidden_states.ndim == 4:
            states = states.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            states = states + hidden_states
        return states if attn.rescale_output_factor == 1 else states / attn.rescale_output_factor


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T + mask) v by head, [B,S,heads*d] in and out (Vaswani et al. 2017)."""
    batch, length, width = query.shape
    if query.requires_grad:  # never so in an export; where gradients flow, no map [S,S] waits for the way back
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        made = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return made.transpose(1, 2).flatten(2)
    # The query is scaled before the product: scores then stay within float16 (SD 2.x overflows the other way round).
    query = (query * scale).reshape(batch, length, heads, -1).transpose(1, 2)
    key = key.reshape(batch, key.shape[1], heads, -1).permute(0, 2, 3, 1)
    value = value.reshape(batch, value.shape[1], heads, -1).transpose(1, 2)
    scores = query @ key
    scores = scores if mask is None else scores + mask
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, width)


class Gate(nn.Module):
    """GEGLU (Shazeer 2020) with two slices in place of `chunk`; keeps the parameter name `proj`."""

    def __init__(self, geglu: Layer) -> None:
        super().__init__()
        self.proj: nn.Module = geglu.proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        both = self.proj(states)
        inner = both.shape[-1] // 2
        return both[..., :inner] * nn.functional.gelu(both[..., inner:])


class Pointwise(nn.Module):
    """A linear layer on [..., K] as a 1x1 convolution: the same product, on the same weights."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
        self.conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
        if linear.bias is not None:
            self.conv.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        return self.conv(rows).permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


class Sinusoids(nn.Module):
    """diffusers' `Timesteps`: [N] -> [N, channels] float32, with the frequencies as constants."""

    def __init__(self, timesteps: Layer) -> None:
        super().__init__()
        if timesteps.num_channels % 2:
            raise RequestError(
                f"a time projection of {timesteps.num_channels} channels", "an even number", "Use another model"
            )
        half_dim = int(timesteps.num_channels) // 2
        exponent = -math.log(10000) * torch.arange(half_dim, dtype=torch.float32)
        frequencies = torch.exp(exponent / (half_dim - timesteps.downscale_freq_shift)) * timesteps.scale
        # Two float16 numbers that sum to the frequency: a target that stores its constants in float16 then loses next
        # to nothing, where one rounding would turn timestep 999 by 0.2 rad. No buffers: conversion leaves them alone.
        self.coarse = frequencies.half().float()
        self.fine = (frequencies - self.coarse).half().float()
        self.cosine_first = timesteps.flip_sin_to_cos

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        time = time.float().unsqueeze(1)
        angle = time * self.coarse + time * self.fine
        waves = (angle.cos(), angle.sin()) if self.cosine_first else (angle.sin(), angle.cos())
        return torch.cat(waves, dim=1)


class InstanceGroupNorm(nn.Module):
    """GroupNorm (Wu & He 2018) as an instance norm of [N, groups, rest], its sums in float32, then scale and shift."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = norm.weight, norm.bias, norm.num_groups, norm.eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        grouped = states.float().reshape(states.shape[0], self.groups, -1)
        normed = nn.functional.instance_norm(grouped, eps=self.eps).reshape(states.shape).to(states.dtype)
        per_channel = (1, -1) + (1,) * (states.ndim - 2)
        return normed * self.weight.reshape(per_channel) + self.bias.reshape(per_channel)


_PLAIN = {"GEGLU": Gate, "Timesteps": Sinusoids, "Dropout": lambda _: nn.Identity()}
