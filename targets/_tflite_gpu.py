"""The "gpu" form of a TFLite file: mathematics that stays finite in half precision, and the delegate's own rules.

The LiteRT GPU delegate computes in float16 and adds up in float16 too, so a sum above 65504 is infinite.
`delegate_forms` replaces what overflows there by forms that are equal in float32; `check` holds a finished file
against what the delegate takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from edgesd.errors import GateError

if TYPE_CHECKING:
    import torch

    from edgesd.targets._tflite_file import Operation

# What the delegate runs on floats: `CheckGpuDelegateCompatibility` in LiteRT's
# tflite/tools/versioning/gpu_compatibility.cc, as of 2.3.
# fmt: off
ALLOWED = frozenset({
    "ABS", "ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CAST", "CONCATENATION", "CONV_2D", "COS",
    "DEPTHWISE_CONV_2D", "DEPTH_TO_SPACE", "DEQUANTIZE", "DIV", "ELU", "EMBEDDING_LOOKUP", "EQUAL", "EXP",
    "FLOOR", "FULLY_CONNECTED", "GATHER", "GELU", "GREATER", "GREATER_EQUAL", "HARD_SWISH", "LEAKY_RELU",
    "LESS", "LESS_EQUAL", "LOG", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM", "MUL", "NEG",
    "NOT_EQUAL", "PACK", "PAD", "PADV2", "POW", "PRELU", "QUANTIZE", "REDUCE_MAX", "REDUCE_MIN", "RELU",
    "RELU6", "RELU_N1_TO_1", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "ROUND", "RSQRT",
    "SELECT_V2", "SIGN", "SIN", "SLICE", "SOFTMAX", "SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "SQRT", "SQUARE",
    "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM", "TANH", "TILE", "TRANSPOSE", "TRANSPOSE_CONV",
})
# fmt: on
MAX_RANK = 4
ALLOWED_TYPES = frozenset({"float32", "float16", "int32", "bool", "int8"})
# (operation, position of an input): the ranks the delegate takes there.
_INPUT_RANKS = {
    ("SLICE", 0): (3, 4),
    ("STRIDED_SLICE", 0): (3, 4),
    ("DEPTHWISE_CONV_2D", 0): (4,),
    ("GATHER", 1): (1,),
    ("EMBEDDING_LOOKUP", 0): (1,),
}

# A stored operand of more dimensions than the other is lined up by the first, where the format lines up the last:
# [4,24,24] + stored [1,1,24,24] passes the compatibility check and comes out wrong (GPU accelerator of LiteRT 2.3).
BINARY = frozenset({"ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "POW", "SQUARED_DIFFERENCE"})

SMALLEST_NORMAL_FP16 = 2.0**-14
# Phi(x) = sigmoid(2 x P((x/5)^2)) for |x| <= 5: least squares fit of atanh(erf(x/sqrt 2))/x. GELU is within 4e-6 for
# |x| <= 12. Every coefficient and power is below 1, so nothing overflows or cancels in float16.
_GELU_CLAMP = 5.0
_GELU_COEFFICIENTS = (0.79782813, 0.91171994, -0.07803861, -0.47783432, 0.43715671)


def finite_gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GELU without powers of unbounded values, x * sigmoid(2 z(clamped x)): within 4e-6 of torch's in float32."""
    if approximate == "tanh":
        c = x.clamp(-10.0, 10.0)
        return x * (2 * math.sqrt(2 / math.pi) * c * (1 + 0.044715 * c * c)).sigmoid()
    c = x.clamp(-_GELU_CLAMP, _GELU_CLAMP)
    u = (c / _GELU_CLAMP).square()
    p = _GELU_COEFFICIENTS[-1] * u
    for coefficient in _GELU_COEFFICIENTS[-2:0:-1]:
        p = (p + coefficient) * u
    return x * (2 * c * (p + _GELU_COEFFICIENTS[0])).sigmoid()


def _standardize(x: torch.Tensor, dims: tuple[int, ...], eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) over `dims`, with every intermediate at most 4 in magnitude.

    Dividing by the largest magnitude m first makes it scale-free: norm(x; eps) = norm(x/m; eps/m^2). Means are taken
    one axis at a time, so no sum has more terms than an axis. The floor under the variance keeps a constant input
    from dividing by zero where float16 flushes subnormals.
    """

    def mean(y: torch.Tensor) -> torch.Tensor:
        for dim in dims:
            y = y.mean(dim, keepdim=True)
        return y

    peak = x.abs().amax(dims, keepdim=True).clamp(min=0.01)
    u = x / peak
    d = u - mean(u)
    variance = mean(d * d) + (math.sqrt(eps) / peak).square()
    return d * variance.clamp(min=SMALLEST_NORMAL_FP16).rsqrt()


def finite_group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.group_norm` on [B, C, ...] through a 4-dimensional view of groups."""
    y = _standardize(x.reshape(x.shape[0], num_groups, -1, x.shape[-1]), (3, 2), eps).reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    y = y if weight is None else y * weight.reshape(per_channel)
    return y if bias is None else y + bias.reshape(per_channel)


def finite_layer_norm(
    x: torch.Tensor,
    normalized_shape: Iterable[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm` over the last axes."""
    y = _standardize(x, tuple(range(-1, -1 - len(tuple(normalized_shape)), -1)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def add(x: torch.Tensor, y: Any, **options: Any) -> torch.Tensor:
    """x + y, where a mask [1,1,S,S] meets the scores of all heads in 3 dimensions, as the converter leaves those."""
    import torch

    masks_heads = isinstance(y, torch.Tensor) and x.dim() == y.dim() == 4 and x.shape[0] == 1 and y.shape[:2] == (1, 1)
    if masks_heads and x.shape[1] > 1:
        return torch.add(x[0], y[0], **options).unsqueeze(0)
    return torch.add(x, y, **options)


def expand(x: torch.Tensor, *sizes: Any) -> torch.Tensor:
    """`x.expand(*sizes)` by concatenation, since the delegate has no broadcast operation (timesteps of a batch)."""
    import torch

    shape = sizes if isinstance(sizes[0], int) else tuple(sizes[0])
    x = x.reshape((1,) * (len(shape) - x.dim()) + tuple(x.shape))
    for dim, size in enumerate(shape):
        if size not in (-1, x.shape[dim]):
            x = torch.cat([x] * size, dim)
    return x


def delegate_forms() -> AbstractContextManager:
    """A context in which torch computes in the forms above, whatever module calls."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    swaps: dict[Callable, Callable] = {
        functional.group_norm: finite_group_norm,
        functional.layer_norm: finite_layer_norm,
        functional.gelu: finite_gelu,
        torch.Tensor.add: add,
        torch.Tensor.expand: expand,
    }

    class DelegateForms(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return swaps.get(func, func)(*args, **({} if kwargs is None else kwargs))

    return DelegateForms()


def check(operations: Iterable[Operation]) -> None:
    """Raises GateError at the first operation the delegate refuses or miscomputes: its name, why, where it stands."""
    for index, operation in enumerate(operations):
        reason = _refusal(operation)
        if reason is not None:
            raise GateError(
                f"operation {index}, {operation.name} ({operation.where or 'unnamed'}), {reason}",
                f"the LiteRT GPU delegate's operations on float tensors of up to {MAX_RANK} dimensions",
                "Leave the gpu form out for this component, or change the module it stands in",
            )


def _refusal(operation: Operation) -> str | None:
    inputs = operation.inputs
    if operation.name not in ALLOWED:
        return "is not an operation of the GPU delegate"
    for tensor in (*inputs, *operation.outputs):
        if len(tensor.shape) > MAX_RANK:
            return f"has a tensor of {len(tensor.shape)} dimensions, {list(tensor.shape)}"
        if tensor.dtype not in ALLOWED_TYPES:
            return f"has a tensor of {tensor.dtype}"
    for (name, position), ranks in _INPUT_RANKS.items():
        if name == operation.name and len(inputs[position].shape) not in ranks:
            return f"has input {position} of shape {list(inputs[position].shape)}"
    if operation.name == "EMBEDDING_LOOKUP" and not inputs[1].constant:
        return "looks up in a table that is not stored as float32 or int8"
    if operation.name in BINARY and len(inputs) == 2:
        short, long = sorted(inputs, key=lambda tensor: len(tensor.shape))
        if long.constant and 1 < len(short.shape) < len(long.shape) and short.shape[0] > 1:
            return f"has a stored operand of higher rank, {list(short.shape)} and {list(long.shape)}"
    return None
