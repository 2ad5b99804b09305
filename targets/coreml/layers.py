"""MIL's layers in torch: convolution, pooling, norms, attention and the int8 operations. `operations` has the rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

Ints = Sequence[int]
INTEGERS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1), "uint16": (0, 2**16 - 1)}


def _paddings(
    sizes: Ints, kernel: Ints, strides: Ints, dilations: Ints, pad_type: str, pad: Ints | None
) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension."""
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        if pad is None or len(pad) != 2 * len(sizes):
            raise ValueError(f"custom padding {pad} for {len(sizes)} dimensions")
        return list(zip(pad[::2], pad[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type}")
    made = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        made.append((small, large) if pad_type == "same" else (large, small))
    return made


def pad_sides(x: Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [side for pair in reversed(pads) for side in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, strides: Ints | None = None, pad_type: str = "valid",
    pad: Ints | None = None, dilations: Ints | None = None, groups: int = 1,
) -> Tensor:  # fmt: skip
    """x [N,C,*D], weight [O,C/groups,*K]: cross-correlation in 1 to 3 spatial dimensions."""
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads = _paddings(x.shape[2:], weight.shape[2:], strides, dilations, pad_type, pad)
    same = [before for before, after in pads if before == after]
    if len(same) < rank:
        x, same = pad_sides(x, pads), [0] * rank
    run = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    return run(x, weight, bias, list(strides), same, list(dilations), groups)


def avg_pool(
    x: Tensor, *, kernel_sizes: Ints, strides: Ints | None = None, pad_type: str = "valid", pad: Ints | None = None,
    exclude_padding_from_average: bool = False, ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    strides = strides or [1] * len(kernel_sizes)
    pads = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    run = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}[x.ndim - 2]
    mean = run(pad_sides(x, pads), list(kernel_sizes), list(strides))
    if not exclude_padding_from_average:
        return mean
    return mean / run(pad_sides(torch.ones_like(x), pads), list(kernel_sizes), list(strides))


def max_pool(
    x: Tensor, *, kernel_sizes: Ints, strides: Ints | None = None, pad_type: str = "valid", pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    strides = strides or [1] * len(kernel_sizes)
    pads = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    run = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[x.ndim - 2]
    return run(pad_sides(x, pads, float("-inf")), list(kernel_sizes), list(strides))


def _pool_padding(
    x: Tensor, kernel: Ints, strides: Ints, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> list[tuple[int, int]]:
    if ceil_mode:
        raise ValueError("pooling with ceil_mode")
    return _paddings(x.shape[2:], kernel, strides, [1] * len(kernel), pad_type, pad)


def layer_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, axes: Ints | None = None,
    epsilon: float = 1e-5,
) -> Tensor:  # fmt: skip
    """(x - mean) / sqrt(variance + epsilon) over `axes`, then gamma and beta of the shape of those axes."""
    over = sorted(axis % x.ndim for axis in (range(x.ndim) if axes is None else axes))
    if over == list(range(over[0], x.ndim)):
        return functional.layer_norm(x, x.shape[over[0] :], gamma, beta, epsilon)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + epsilon)
    normed = normed if gamma is None else normed * gamma.reshape(shape)
    return normed if beta is None else normed + beta.reshape(shape)


def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *,
    epsilon: float = 1e-5,
) -> Tensor:  # fmt: skip
    return functional.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon)


def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, *, epsilon: float = 1e-5
) -> Tensor:
    return functional.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask)


def _along(parameter: Tensor | None, x: Tensor, axis: int | None) -> Tensor:
    """A scale or zero point (scalar, or one per slice of axis) as a float that broadcasts against x."""
    if parameter is None:
        return torch.zeros(())
    if parameter.ndim == 0 or axis is None:
        return parameter.float()
    return parameter.float().reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, output_dtype: str, axis: int | None = None
) -> Tensor:
    """clip(round(input / scale) + zero_point), ties to even."""
    low, high = INTEGERS[output_dtype]
    level = torch.round(input / _along(scale, input, axis)) + _along(zero_point, input, axis)
    return level.clamp(low, high).to(torch.int32)


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int | None = None) -> Tensor:
    """scale * (input - zero_point)."""
    return (input.float() - _along(zero_point, input, axis)) * _along(scale, input, axis)


def affine_weight(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, *, axis: int) -> Tensor:
    return dequantize(quantized_data, scale, zero_point, axis=axis)


def palette_weight(indices: Tensor, lut: Tensor, *, shape: list[int]) -> Tensor:
    """lut[index] for indices of log2(len(lut)) bits each, packed into bytes from the lowest bit on."""
    bits, count = (lut.numel() - 1).bit_length(), math.prod(shape)
    if lut.numel() != 1 << bits or indices.numel() != -(-count * bits // 8):
        raise ValueError(f"{indices.numel()} bytes of indices into {lut.numel()} values for {shape}")
    single = (indices.reshape(-1, 1) >> torch.arange(8)) & 1
    places = single.reshape(-1)[: count * bits].reshape(count, bits)
    return lut.float()[(places << torch.arange(bits)).sum(1)].reshape(shape)


def blockwise_weight(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), each of their elements standing for a block of data."""
    if scale.ndim != data.ndim or any(n == 0 or whole % n for whole, n in zip(data.shape, scale.shape, strict=True)):
        raise ValueError(f"blocks {tuple(scale.shape)} of {tuple(data.shape)}")

    def spread(part: Tensor) -> Tensor:
        for axis, whole in enumerate(data.shape):
            part = part.repeat_interleave(whole // part.shape[axis], axis)
        return part.float()

    return (data.float() if offset is None else data.float() - spread(offset)) * spread(scale)
