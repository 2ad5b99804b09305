"""What each MIL operation means, in torch: one function per type, its name in `OPERATIONS`.

Positional parameters are tensors (`values`: a list of them), keyword-only ones are settings that a program fixes when
it is written: plain numbers, lists, strings. Floats compute in float32 whatever their declared type (the interpreter
rounds results to float16), integers of every width are int32. Definitions: coremltools' MIL operations, iOS 15 to 18.
A ValueError says what a function does not take; shapes that do not fit raise whatever torch raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgesd.targets.coreml import layers
from edgesd.targets.coreml.layers import INTEGERS, pad_sides

Ints = Sequence[int]


def cast(x: Tensor, *, dtype: str) -> Tensor:
    """To a number type; floats lose their fraction towards zero."""
    if dtype in ("fp16", "fp32"):
        return x.to(torch.float32)
    if dtype == "bool":
        return x.to(torch.bool)
    if dtype in (*INTEGERS, "int32"):
        return x.to(torch.int32)
    raise ValueError(f"cast to {dtype}")


def gelu(x: Tensor, *, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def matmul(x: Tensor, y: Tensor, *, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, *, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        return function(x, list(range(x.ndim)) if axes is None else list(axes), keepdim=keep_dims)

    return reduce


def _argument(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def find(x: Tensor, *, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
        return cast(function(x, axis, keepdim=keep_dims), dtype=output_dtype)

    return find


def expand_dims(x: Tensor, *, axes: Ints) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, *, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def concat(values: list[Tensor], *, axis: int, interleave: bool = False) -> Tensor:
    """Joined along axis; interleave: the first slices of all, then the second ones."""
    if not interleave:
        return torch.cat(values, axis)
    axis %= values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def split(
    x: Tensor, *, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return torch.split(x, list(split_sizes), axis)
    if num_splits is None or num_splits < 1 or x.shape[axis] % num_splits:
        raise ValueError(f"{x.shape[axis]} split into {num_splits}")
    return torch.split(x, x.shape[axis] // num_splits, axis)


def slice_by_index(
    x: Tensor, *, begin: Ints, end: Ints, stride: Ints | None = None, begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None, squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:  # fmt: skip
    """x[begin:end:stride] with Python's meaning of negative numbers; a set mask drops the bound, or the dimension."""
    none = [False] * x.ndim
    stride, squeeze_mask = stride or [1] * x.ndim, squeeze_mask or none
    begin_mask, end_mask = begin_mask or none, end_mask or none
    if {len(part) for part in (begin, end, stride, begin_mask, end_mask, squeeze_mask)} != {x.ndim}:
        raise ValueError(f"slice bounds for another rank than {x.ndim}")
    for axis in reversed(range(x.ndim)):
        if squeeze_mask[axis]:
            x = x.select(axis, begin[axis])
            continue
        start = None if begin_mask[axis] else begin[axis]
        stop = None if end_mask[axis] else end[axis]
        taken = range(*slice(start, stop, stride[axis]).indices(x.shape[axis]))
        if taken.step > 0:
            x = x[(slice(None),) * axis + (slice(taken.start, max(taken.stop, taken.start), taken.step),)]
        else:
            x = x.index_select(axis, torch.arange(taken.start, taken.stop, taken.step))
    return x


def slice_by_size(x: Tensor, *, begin: Ints, size: Ints) -> Tensor:
    ends = [full if n == -1 else start + n for start, n, full in zip(begin, size, x.shape, strict=True)]
    return slice_by_index(x, begin=begin, end=ends)


def gather(x: Tensor, indices: Tensor, *, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Slices of x along axis, a negative index counting from the end: x's shape with indices' in place of axis."""
    if batch_dims:
        raise ValueError("gather with batch_dims")
    axis %= x.ndim
    flat = indices.reshape(-1)
    taken = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_along_axis(x: Tensor, indices: Tensor, *, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


def pad(x: Tensor, *, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """pad: (before, after) of the last len(pad)/2 dimensions."""
    pads = list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        return pad_sides(x, pads, constant_val)
    while pads and not any(pads[0]):  # torch reflects and replicates the last dimensions only
        pads = pads[1:]
    return functional.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)


def fill(*, shape: Ints, value: Any = 0.0) -> Tensor:
    kind = {bool: torch.bool, int: torch.int32, float: torch.float32}[type(value)]
    return torch.full(list(shape), value, dtype=kind)


def cumsum(x: Tensor, *, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    x = x.flip(axis) if reverse else x
    total = x.cumsum(axis, dtype=x.dtype)
    total = total - x if exclusive else total
    return total.flip(axis) if reverse else total


def upsample_nearest_neighbor(x: Tensor, *, scale_factor_height: float = 1, scale_factor_width: float = 1) -> Tensor:
    """Output row i is input row floor(i / scale)."""
    return functional.interpolate(
        x, scale_factor=(float(scale_factor_height), float(scale_factor_width)), mode="nearest"
    )


def upsample_bilinear(
    x: Tensor, *, scale_factor_height: float = 1, scale_factor_width: float = 1, align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:  # fmt: skip
    if half_pixel_centers is not None and half_pixel_centers == align_corners:
        raise ValueError("bilinear sampling on a grid that is neither aligned corners nor half-pixel centres")
    factors = (float(scale_factor_height), float(scale_factor_width))
    return functional.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=align_corners)


def resize_nearest_neighbor(x: Tensor, *, target_size_height: int, target_size_width: int) -> Tensor:
    return functional.interpolate(x, size=(target_size_height, target_size_width), mode="nearest")


def _unary(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A built-in of torch under MIL's parameter name, which built-ins do not show."""
    return lambda x: function(x)


def _binary(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: function(x, y)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": _unary(torch.abs),
    "ceil": _unary(torch.ceil),
    "floor": _unary(torch.floor),
    "round": _unary(torch.round),
    "sign": _unary(torch.sign),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "sin": _unary(torch.sin),
    "cos": _unary(torch.cos),
    "tanh": _unary(torch.tanh),
    "erf": _unary(torch.erf),
    "relu": _unary(torch.relu),
    "sigmoid": _unary(torch.sigmoid),
    "logical_not": _unary(torch.logical_not),
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "real_div": _binary(torch.div),
    "floor_div": _binary(torch.floor_divide),
    "mod": _binary(torch.remainder),
    "pow": _binary(torch.pow),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "equal": _binary(torch.eq),
    "not_equal": _binary(torch.ne),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "cast": cast,
    "clip": lambda x, *, alpha, beta: x.clamp(alpha, beta),
    "log": lambda x, *, epsilon=1e-45: torch.log(x + epsilon),
    "rsqrt": lambda x, *, epsilon=1e-12: torch.rsqrt(x + epsilon),
    "inverse": lambda x, *, epsilon=1e-4: 1 / (x + epsilon),
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x, *, alpha: functional.leaky_relu(x, alpha),
    "elu": lambda x, *, alpha: functional.elu(x, alpha),
    "silu": lambda x: functional.silu(x),
    "softplus": lambda x: functional.softplus(x),
    "sigmoid_hard": lambda x, *, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "prelu": lambda x, alpha: functional.prelu(x, alpha),
    "gelu": gelu,
    "softmax": lambda x, *, axis=-1: torch.softmax(x, axis),
    "linear": lambda x, weight, bias=None: functional.linear(x, weight, bias),
    "matmul": matmul,
    "einsum": lambda values, *, equation: torch.einsum(equation, *values),
    "conv": layers.conv,
    "avg_pool": layers.avg_pool,
    "max_pool": layers.max_pool,
    "layer_norm": layers.layer_norm,
    "batch_norm": layers.batch_norm,
    "instance_norm": layers.instance_norm,
    "scaled_dot_product_attention": layers.attention,
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(lambda x, axes, keepdim: torch.sum(x, axes, keepdim=keepdim, dtype=x.dtype)),
    "reduce_max": _reduce(torch.amax),
    "reduce_min": _reduce(torch.amin),
    "reduce_sum_square": _reduce(lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim)),
    "reduce_l2_norm": _reduce(lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim).sqrt()),
    "reduce_argmax": _argument(torch.argmax),
    "reduce_argmin": _argument(torch.argmin),
    "identity": lambda x: x,
    "shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
    "reshape": lambda x, *, shape: x.reshape(shape),
    "transpose": lambda x, *, perm: x.permute(perm),
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "concat": concat,
    "stack": lambda values, *, axis: torch.stack(values, axis),
    "split": split,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "pad": pad,
    "tile": lambda x, *, reps: x.repeat(reps),
    "fill": fill,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "reverse": lambda x, *, axes=None: x.flip(list(range(x.ndim)) if axes is None else axes),
    "cumsum": cumsum,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "pixel_shuffle": lambda x, *, upscale_factor: functional.pixel_shuffle(x, upscale_factor),
    "quantize": layers.quantize,
    "dequantize": layers.dequantize,
    "constexpr_affine_dequantize": layers.affine_weight,
    "constexpr_blockwise_shift_scale": layers.blockwise_weight,
    "constexpr_lut_to_dense": layers.palette_weight,
    "constexpr_cast": lambda source_val, *, output_dtype: cast(source_val, dtype=output_dtype),
}

# Operations that only move values: their results need no rounding of their own.
MOVES = frozenset({
    "identity", "reshape", "transpose", "expand_dims", "squeeze", "concat", "stack", "split", "slice_by_index",
    "slice_by_size", "gather", "gather_along_axis", "tile", "select", "reverse", "upsample_nearest_neighbor",
    "resize_nearest_neighbor", "pixel_shuffle",
})  # fmt: skip
