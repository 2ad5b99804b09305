"""The UNet form `split_einsum`: transformer layers laid out as the Apple Neural Engine wants them.

Follows the published principles (Apple, "Deploying Transformers on the Apple Neural Engine", 2022): activations stay
[batch, channels, 1, sequence] throughout, linear layers are 1x1 convolutions, every head is a product of its own, and
nothing is transposed but the keys. Numerically equal to the original form up to the order of sums.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgesd.errors import RequestError
from edgesd.models.modules import Component
from edgesd.models.plain import Layer, share


def split_einsum(component: Component) -> Component:
    """The same UNet, on the same weights, with transformers in the split form. Raises RequestError (another kind)."""
    module = share(component.module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Transformer2DModel":
                setattr(parent, name, SplitTransformer(child))
    return replace(component, module=module.eval())


class SplitTransformer(nn.Module):
    """diffusers' Transformer2DModel over pictures, with its parameter names."""

    def __init__(self, original: Layer) -> None:
        super().__init__()
        for block in original.transformer_blocks:
            if block.norm_type != "layer_norm" or type(block.ff.net[0]).__name__ != "Gate":
                came, allowed = "a UNet with transformers of another kind", "layer norms and GEGLU (Stable Diffusion)"
                raise RequestError(came, allowed, "Choose the original form")
        self.norm, self.proj_in, self.proj_out = original.norm, original.proj_in, original.proj_out
        self.transformer_blocks = original.transformer_blocks

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        """hidden_states [B,C,H,W], encoder_hidden_states [B,L,D]; returned in a tuple as diffusers' blocks expect."""
        batch, _channels, height, width = hidden_states.shape
        states = pointwise(self.proj_in, self.norm(hidden_states).flatten(2).unsqueeze(2))
        context = encoder_hidden_states.transpose(1, 2).unsqueeze(2)
        for block in self.transformer_blocks:
            states = _block(block, states, context)
        return (pointwise(self.proj_out, states).reshape(batch, -1, height, width) + hidden_states,)


def _block(block: Layer, states: Tensor, context: Tensor) -> Tensor:
    normed = channel_norm(block.norm1, states)
    states = states + attend(block.attn1, normed, context if block.only_cross_attention else normed)
    if block.attn2 is not None:
        states = states + attend(block.attn2, channel_norm(block.norm2, states), context)
    both = pointwise(block.ff.net[0].proj, channel_norm(block.norm3, states))
    inner = both.shape[1] // 2
    return states + pointwise(block.ff.net[-1], both[:, :inner] * functional.gelu(both[:, inner:]))


def attend(attn: Layer, states: Tensor, context: Tensor) -> Tensor:
    """softmax(scale k^T q) over the keys, one head at a time: states [B,C,1,S], context [B,D,1,L] -> [B,C,1,S]."""
    query = pointwise(attn.to_q, states) * attn.scale
    key = pointwise(attn.to_k, context).transpose(1, 3)
    value = pointwise(attn.to_v, context)
    width = query.shape[1] // attn.heads
    mixed = []
    for start in range(0, query.shape[1], width):
        head = slice(start, start + width)
        weights = torch.einsum("bchq,bkhc->bkhq", query[:, head], key[..., head]).softmax(dim=1)
        mixed.append(torch.einsum("bkhq,bchk->bchq", weights, value[:, head]))
    return pointwise(attn.to_out[0], torch.cat(mixed, dim=1))


def pointwise(layer: Layer, states: Tensor) -> Tensor:
    """A linear layer on the channels of [B,C,1,S], as a 1x1 convolution."""
    if isinstance(layer, nn.Linear):
        return functional.conv2d(states, layer.weight[:, :, None, None], layer.bias)
    if isinstance(layer, nn.Conv2d):
        return layer(states)
    # Any other stand-in for a linear layer (a quantized one) keeps its own arithmetic.
    return layer(states.squeeze(2).transpose(1, 2)).transpose(1, 2).unsqueeze(2)


def channel_norm(norm: Layer, states: Tensor) -> Tensor:
    """Layer norm over the channels of [B,C,1,S]."""
    centred = states - states.mean(dim=1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + norm.eps)
    return scaled * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]
