"""The interpreter of saved ML programs: each operation against its definition, random programs, hostile packages."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("coremltools")
import coremltools as ct
import mil
from coremltools.proto import MIL_pb2, Model_pb2

from edgesd.errors import DataError, RequestError, SetupError
from edgesd.targets.coreml.interpreter import Program
from edgesd.targets.coreml.operations import OPERATIONS
from edgesd.targets.coreml.package import Package


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


A, B = numbers(2, 3, 4), numbers(2, 3, 4, seed=1)
P = np.abs(A) + 0.1
WHOLE, FIVES = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4), np.full((2, 3, 4), 5, np.int32)
T, U = A > 0, B > 0
PICTURE, KERNEL = numbers(2, 4, 7, 6), numbers(6, 2, 3, 2)
BIAS, GAMMA = numbers(6), numbers(4)


def correlate(x, w, bias, strides, pads, dilations, groups):
    """Cross-correlation written out (the definition in the MIL documentation of `conv`)."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    out, per = w.shape[0], w.shape[1]
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    size = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    y = np.zeros((x.shape[0], out, *size))
    for o, *at in itertools.product(range(out), *map(range, size)):
        first = o // (out // groups) * per
        window = tuple(slice(i * s, i * s + r, d) for i, s, r, d in zip(at, strides, reach, dilations, strict=True))
        y[(slice(None), o, *at)] = (x[(slice(None), slice(first, first + per), *window)] * w[o]).sum(
            axis=tuple(range(1, x.ndim))
        )
    return y + (0 if bias is None else bias.reshape(-1, *[1] * (x.ndim - 2)))


def pooled(x, kernel, strides, pads, fill, reduce):
    x = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=fill)
    size = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, strides, strict=True)]
    y = np.zeros((*x.shape[:2], *size))
    for at in itertools.product(*map(range, size)):
        window = tuple(slice(i * s, i * s + k) for i, s, k in zip(at, strides, kernel, strict=True))
        y[(..., *at)] = reduce(x[(..., *window)], axis=(-2, -1))
    return y


def standard(x, axes, eps):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def column(v):
    return v.reshape(1, -1, 1, 1)


def softmax(x, axis):
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


def spread(x, factor):
    return x.repeat(factor, -1).repeat(factor, -2)


def bilinear(x, scale):
    """Aligned corners: the outer samples stay where they are."""
    for axis in (-2, -1):
        n = x.shape[axis]
        at = np.linspace(0, n - 1, n * scale)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        part = (at - low).reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
        x = x.take(low, axis) * (1 - part) + x.take(np.minimum(low + 1, n - 1), axis) * part
    return x


def shuffled(x, f):
    n, c, h, w = x.shape
    return x.reshape(n, c // f**2, f, f, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // f**2, h * f, w * f)


erf = np.vectorize(math.erf)
pair = {"kernel_sizes": [2, 3], "strides": [2, 1]}
QUANTIZED = np.array([[-128, 5], [0, 127]], np.int8)
TABLE = np.float32([-3, 0.5, 2, 7])  # 2 bits an index, the lowest first
SCALES, ZEROS = np.float32([0.5, 0.25]), np.int8([3, -4])

# (operation, program, definition, inputs); several may show one operation.
CASES = [
    *((name, lambda mb, x, name=name: getattr(mb, name)(x=x), f, (A,)) for name, f in {
        "abs": np.abs, "ceil": np.ceil, "floor": np.floor, "sign": np.sign, "exp": np.exp, "exp2": np.exp2,
        "square": np.square, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "erf": erf, "identity": lambda x: x,
        "relu": lambda x: np.maximum(x, 0), "relu6": lambda x: np.clip(x, 0, 6),
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "silu": lambda x: x / (1 + np.exp(-x)),
        "softplus": lambda x: np.log1p(np.exp(x)),
        "shape": lambda x: np.int32(x.shape),
    }.items()),
    ("round", lambda mb, x: mb.round(x=x), lambda x: np.float32([-2, -2, -0.0, 0, 2, 2, 3]),
     (np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.6]),)),
    ("sqrt", lambda mb, x: mb.sqrt(x=x), np.sqrt, (P,)),
    ("log", lambda mb, x: mb.log(x=x, epsilon=0.5), lambda x: np.log(x + 0.5), (P,)),
    ("rsqrt", lambda mb, x: mb.rsqrt(x=x, epsilon=0.5), lambda x: 1 / np.sqrt(x + 0.5), (P,)),
    ("inverse", lambda mb, x: mb.inverse(x=x, epsilon=0.5), lambda x: 1 / (x + 0.5), (P,)),
    *((name, lambda mb, x, y, name=name: getattr(mb, name)(x=x, y=y), f, (A, B)) for name, f in {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide, "maximum": np.maximum,
        "minimum": np.minimum, "less": np.less, "less_equal": np.less_equal, "greater": np.greater,
        "greater_equal": np.greater_equal,
    }.items()),
    ("pow", lambda mb, x, y: mb.pow(x=x, y=y), np.power, (P, B)),
    ("floor_div", lambda mb, x, y: mb.floor_div(x=x, y=y), np.floor_divide, (WHOLE, FIVES)),
    ("mod", lambda mb, x, y: mb.mod(x=x, y=y), np.mod, (WHOLE, FIVES)),
    ("equal", lambda mb, x: mb.equal(x=x, y=np.int32(3)), lambda x: x == 3, (WHOLE,)),
    ("not_equal", lambda mb, x: mb.not_equal(x=x, y=np.int32(3)), lambda x: x != 3, (WHOLE,)),
    ("logical_and", lambda mb, x, y: mb.logical_and(x=x, y=y), np.logical_and, (T, U)),
    ("logical_or", lambda mb, x, y: mb.logical_or(x=x, y=y), np.logical_or, (T, U)),
    ("logical_not", lambda mb, x: mb.logical_not(x=x), np.logical_not, (T,)),
    ("cast", lambda mb, x: mb.cast(x=x, dtype="int32"), lambda x: np.trunc(x * 1.0).astype(np.int32), (3 * A,)),
    ("cast", lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="fp32"), lambda x: (x != 0) * 1.0, (WHOLE,)),
    ("cast", lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), lambda x: x.astype(np.float16), (A,)),
    ("select", lambda mb, c, x, y: mb.select(cond=c, a=x, b=y), np.where, (T, A, B)),
    ("clip", lambda mb, x: mb.clip(x=x, alpha=-0.5, beta=0.25), lambda x: np.clip(x, -0.5, 0.25), (A,)),
    ("leaky_relu", lambda mb, x: mb.leaky_relu(x=x, alpha=0.1), lambda x: np.where(x < 0, x * 0.1, x), (A,)),
    ("elu", lambda mb, x: mb.elu(x=x, alpha=0.7), lambda x: np.where(x < 0, 0.7 * np.expm1(x), x), (A,)),
    ("prelu", lambda mb, x: mb.prelu(x=x, alpha=GAMMA), lambda x: np.where(x < 0, x * column(GAMMA), x), (PICTURE,)),
    ("sigmoid_hard", lambda mb, x: mb.sigmoid_hard(x=x, alpha=0.3, beta=0.4),
     lambda x: np.clip(0.3 * x + 0.4, 0, 1), (A,)),
    ("gelu", lambda mb, x: mb.gelu(x=x, mode="EXACT"), lambda x: x * (1 + erf(x / 2**0.5)) / 2, (A,)),
    ("gelu", lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
     lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))), (A,)),
    ("gelu", lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x / (1 + np.exp(-1.702 * x)), (A,)),
    ("softmax", lambda mb, x: mb.softmax(x=x, axis=1), lambda x: softmax(x, 1), (A,)),
    ("linear", lambda mb, x: mb.linear(x=x, weight=numbers(5, 4), bias=numbers(5)),
     lambda x: x @ numbers(5, 4).T + numbers(5), (A,)),
    ("matmul", lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: x @ y.swapaxes(-1, -2), (A, B)),
    ("matmul", lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True), lambda x, y: x.swapaxes(-1, -2) @ y, (A, B)),
    ("einsum", lambda mb, x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"),
     lambda x, y: np.einsum("nchw,nwhu->nchu", x, y), (numbers(2, 3, 4, 5), numbers(2, 5, 4, 6))),
    ("conv", lambda mb, x: mb.conv(x=x, weight=KERNEL, bias=BIAS, groups=2, strides=[2, 1], pad_type="custom",
                                   pad=[1, 2, 0, 3], dilations=[1, 2]),
     lambda x: correlate(x, KERNEL, BIAS, [2, 1], [(1, 2), (0, 3)], [1, 2], 2), (PICTURE,)),
    ("conv", lambda mb, x: mb.conv(x=x, weight=KERNEL[:, :, :, :1], groups=2, pad_type="valid"),
     lambda x: correlate(x, KERNEL[:, :, :, :1], None, [1, 1], [(0, 0), (0, 0)], [1, 1], 2), (PICTURE,)),
    ("conv", lambda mb, x: mb.conv(x=x, weight=KERNEL, groups=2, pad_type="same"),
     lambda x: correlate(x, KERNEL, None, [1, 1], [(1, 1), (0, 1)], [1, 1], 2), (PICTURE,)),
    ("conv", lambda mb, x: mb.conv(x=x, weight=KERNEL, groups=2, pad_type="same_lower"),
     lambda x: correlate(x, KERNEL, None, [1, 1], [(1, 1), (1, 0)], [1, 1], 2), (PICTURE,)),
    ("conv", lambda mb, x: mb.conv(x=x, weight=numbers(2, 3, 3), pad_type="custom", pad=[1, 1]),
     lambda x: correlate(x, numbers(2, 3, 3), None, [1], [(1, 1)], [1], 1), (A,)),
    ("avg_pool", lambda mb, x: mb.avg_pool(x=x, pad_type="custom", pad=[1, 0, 0, 1], **pair),
     lambda x: pooled(x, [2, 3], [2, 1], [(1, 0), (0, 1)], 0, np.mean), (PICTURE,)),
    ("avg_pool", lambda mb, x: mb.avg_pool(x=x, pad_type="custom", pad=[1, 0, 0, 1],
                                           exclude_padding_from_average=True, **pair),
     lambda x: pooled(x, [2, 3], [2, 1], [(1, 0), (0, 1)], np.nan, np.nanmean), (PICTURE,)),
    ("max_pool", lambda mb, x: mb.max_pool(x=x, pad_type="custom", pad=[1, 0, 0, 1], **pair),
     lambda x: pooled(x, [2, 3], [2, 1], [(1, 0), (0, 1)], -np.inf, np.max), (PICTURE,)),
    ("layer_norm", lambda mb, x: mb.layer_norm(x=x, axes=[2], gamma=GAMMA, beta=GAMMA, epsilon=0.1),
     lambda x: standard(x, (2,), 0.1) * GAMMA + GAMMA, (A,)),
    ("layer_norm", lambda mb, x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=GAMMA, epsilon=0.1),
     lambda x: standard(x, (1,), 0.1) * column(GAMMA) + column(GAMMA), (PICTURE,)),
    ("batch_norm", lambda mb, x: mb.batch_norm(x=x, mean=GAMMA, variance=GAMMA**2, gamma=GAMMA, beta=GAMMA,
                                               epsilon=0.1),
     lambda x: (x - column(GAMMA)) / np.sqrt(column(GAMMA) ** 2 + 0.1) * column(GAMMA) + column(GAMMA), (PICTURE,)),
    ("instance_norm", lambda mb, x: mb.instance_norm(x=x, gamma=GAMMA, beta=GAMMA, epsilon=0.1),
     lambda x: standard(x, (2, 3), 0.1) * column(GAMMA) + column(GAMMA), (PICTURE,)),
    *((name, lambda mb, x, name=name: getattr(mb, name)(x=x, axes=[0, -1], keep_dims=True),
       lambda x, f=f: f(x, axis=(0, 2), keepdims=True), (A,)) for name, f in {
        "reduce_mean": np.mean, "reduce_max": np.max, "reduce_min": np.min,
    }.items()),
    ("reduce_sum", lambda mb, x: mb.reduce_sum(x=x), np.sum, (A,)),
    ("reduce_sum", lambda mb, x: mb.reduce_sum(x=x, axes=[1]), lambda x: x.sum(1), (WHOLE,)),
    ("reduce_sum_square", lambda mb, x: mb.reduce_sum_square(x=x, axes=[1]), lambda x: (x**2).sum(1), (A,)),
    ("reduce_l2_norm", lambda mb, x: mb.reduce_l2_norm(x=x, axes=[1]), lambda x: np.sqrt((x**2).sum(1)), (A,)),
    ("reduce_argmax", lambda mb, x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1), (A,)),
    ("reduce_argmin", lambda mb, x: mb.reduce_argmin(x=x, axis=1), lambda x: x.argmin(1), (A,)),
    ("reshape", lambda mb, x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, -1), (A,)),
    ("transpose", lambda mb, x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.transpose(2, 0, 1), (A,)),
    ("expand_dims", lambda mb, x: mb.expand_dims(x=x, axes=[-1, 1]), lambda x: x[:, None, :, :, None], (A,)),
    ("squeeze", lambda mb, x: mb.squeeze(x=x, axes=[0, 2]), lambda x: x[0, :, 0], (numbers(1, 3, 1),)),
    ("concat", lambda mb, x, y: mb.concat(values=[x, y, x], axis=-2),
     lambda x, y: np.concatenate([x, y, x], 1), (A, B)),
    ("concat", lambda mb, x, y: mb.concat(values=[x, y], axis=1, interleave=True),
     lambda x, y: np.stack([x, y], 2).reshape(2, 6, 4), (A, B)),
    ("stack", lambda mb, x, y: mb.stack(values=[x, y], axis=1), lambda x, y: np.stack([x, y], 1), (A, B)),
    ("split", lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=2)[1], lambda x: x[:, :, 1:], (A,)),
    ("split", lambda mb, x: mb.split(x=x, num_splits=2, axis=-1)[0], lambda x: x[:, :, :2], (A,)),
    ("slice_by_index", lambda mb, x: mb.slice_by_index(x=x, begin=[0, 2, -3], end=[0, -4, 4], stride=[1, -1, 2],
                       begin_mask=[True, False, False], end_mask=[True, True, False]),
     lambda x: x[:, 2::-1, -3:4:2], (A,)),
    ("slice_by_index", lambda mb, x: mb.slice_by_index(x=x, begin=[1, 0, 1], end=[2, 3, 3],
                                                       squeeze_mask=[True, False, False]),
     lambda x: x[1, 0:3, 1:3], (A,)),
    ("slice_by_size", lambda mb, x: mb.slice_by_size(x=x, begin=[1, 0, 2], size=[1, 2, -1]),
     lambda x: x[1:2, 0:2, 2:], (A,)),
    ("gather", lambda mb, x, i: mb.gather(x=x, indices=i, axis=1),
     lambda x, i: x[:, i], (A, np.int32([[2, 0], [-1, 1]]))),
    ("gather_along_axis", lambda mb, x, i: mb.gather_along_axis(x=x, indices=i, axis=2),
     lambda x, i: np.take_along_axis(x, i, 2), (A, np.abs(WHOLE) % 4)),
    ("pad", lambda mb, x: mb.pad(x=x, pad=[1, 2, 0, 3], constant_val=7.0),
     lambda x: np.pad(x, [(0, 0), (1, 2), (0, 3)], constant_values=7), (A,)),
    ("pad", lambda mb, x: mb.pad(x=x, pad=[0, 0, 1, 2], mode="reflect"),
     lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2)], "reflect"), (A,)),
    ("pad", lambda mb, x: mb.pad(x=x, pad=[0, 0, 1, 2], mode="replicate"),
     lambda x: np.pad(x, [(0, 0), (0, 0), (1, 2)], "edge"), (A,)),
    ("tile", lambda mb, x: mb.tile(x=x, reps=[2, 1, 3]), lambda x: np.tile(x, (2, 1, 3)), (A,)),
    ("fill", lambda mb, x: mb.add(x=x, y=mb.fill(shape=[3, 4], value=1.5)), lambda x: x + 1.5, (A,)),
    ("reverse", lambda mb, x: mb.reverse(x=x, axes=[1]), lambda x: x[:, ::-1], (A,)),
    ("cumsum", lambda mb, x: mb.cumsum(x=x, axis=2), lambda x: x.cumsum(2), (A,)),
    ("cumsum", lambda mb, x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
     lambda x: x[:, ::-1].cumsum(1)[:, ::-1] - x, (A,)),
    ("upsample_nearest_neighbor",
     lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2),
     lambda x: spread(x, 2), (PICTURE,)),
    ("resize_nearest_neighbor",
     lambda mb, x: mb.resize_nearest_neighbor(x=x, target_size_height=21, target_size_width=18),
     lambda x: spread(x, 3), (PICTURE,)),
    ("upsample_bilinear", lambda mb, x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=2),
     lambda x: bilinear(x, 2), (PICTURE,)),
    ("pixel_shuffle", lambda mb, x: mb.pixel_shuffle(x=x, upscale_factor=2), lambda x: shuffled(x, 2), (PICTURE,)),
    ("quantize", lambda mb, x: mb.quantize(input=x, scale=np.float32(0.5), zero_point=np.int8(3), output_dtype="int8"),
     lambda x: np.int32([-125, 2, 3, 3, 5, 127]), (np.float32([-64, -0.5, -0.25, 0.25, 0.75, 90]),)),
    ("quantize", lambda mb, x: mb.quantize(input=x, scale=SCALES, output_dtype="uint8", axis=1),
     lambda x: np.clip(np.rint(x / SCALES), 0, 255), (100 * numbers(3, 2),)),
    ("dequantize", lambda mb, x: mb.dequantize(input=mb.quantize(input=x, scale=SCALES, zero_point=ZEROS, axis=0,
                   output_dtype="int8"), scale=SCALES, zero_point=ZEROS, axis=0),
     lambda x: np.clip(np.rint(x / SCALES[:, None]), *([[-128.0], [127.0]] - ZEROS * 1.0)[..., None]) * SCALES[:, None],
     (30 * numbers(2, 5),)),
    ("constexpr_affine_dequantize", lambda mb, x: mb.add(x=x, y=mb.constexpr_affine_dequantize(
        quantized_data=QUANTIZED, scale=SCALES, zero_point=ZEROS, axis=np.int32(0))),
     lambda x: x + SCALES[:, None] * (QUANTIZED - ZEROS[:, None] * 1.0), (numbers(2, 2),)),
    ("constexpr_lut_to_dense", lambda mb, x: mb.add(x=x, y=mb.constexpr_lut_to_dense(
        indices=np.uint8([0b11100100, 0b00011011]), lut=TABLE, shape=np.uint32([2, 4]))),
     lambda x: x + TABLE[[[0, 1, 2, 3], [3, 2, 1, 0]]], (numbers(2, 4),)),
    ("constexpr_cast",
     lambda mb, x: mb.add(x=x, y=mb.constexpr_cast(source_val=np.float16(GAMMA), output_dtype="fp32")),
     lambda x: x + np.float16(GAMMA), (A,)),
]  # fmt: skip
LEVELS = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
BLOCK_SCALES, BLOCK_ZEROS = np.float32([[0.5, 2], [1, 4]]), np.int8([[0, 1], [2, 3]])
LATER = [  # operations that iOS 18 brought
    ("constexpr_blockwise_shift_scale", lambda mb, x: mb.add(x=x, y=mb.constexpr_blockwise_shift_scale(
        data=LEVELS, scale=BLOCK_SCALES, offset=BLOCK_ZEROS)),
     lambda x: x + (LEVELS * 1.0 - BLOCK_ZEROS.repeat(4, 1)) * BLOCK_SCALES.repeat(4, 1),
     (numbers(2, 8),)),
    ("scaled_dot_product_attention", lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
     lambda q, k, v: softmax(q @ k.swapaxes(-1, -2) / 2, -1) @ v, (A, numbers(2, 5, 4), numbers(2, 5, 4, seed=1))),
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All cases of one iOS version as outputs of one program: writing a package takes longer than running it."""
    found = []
    for cases, opset in ((CASES, ct.target.iOS17), (LATER, ct.target.iOS18)):
        arrays = [x for *_, inputs in cases for x in inputs]

        def build(mb, *variables, cases=cases):
            left = iter(variables)
            return [program(mb, *itertools.islice(left, len(inputs))) for _, program, _, inputs in cases]

        path = mil.save(tmp_path_factory.mktemp("cases"), build, arrays, opset=opset)
        found += mil.run(path, arrays)
    return found


@pytest.mark.parametrize("index", range(len(CASES + LATER)), ids=[case[0] for case in CASES + LATER])
def test_an_operation_is_what_its_definition_says(results, index):
    _, _, define, inputs = (CASES + LATER)[index]
    with np.errstate(invalid="ignore"):
        want = np.asarray(define(*inputs))
    assert results[index].shape == want.shape
    np.testing.assert_allclose(results[index], want.astype(np.float64), rtol=2e-5, atol=2e-6)


def test_every_operation_has_a_case():
    assert {name for name, *_ in CASES + LATER} == set(OPERATIONS)


# ---- random programs ------------------------------------------------------------------------------------------------

# Elementwise steps and moves on [2,4,6] tensors with a numpy twin: (arity, MIL, numpy).
STEPS = {
    "add": (2, lambda mb, x, y: mb.add(x=x, y=y), np.add),
    "mul": (2, lambda mb, x, y: mb.mul(x=x, y=y), np.multiply),
    "maximum": (2, lambda mb, x, y: mb.maximum(x=x, y=y), np.maximum),
    "tanh": (1, lambda mb, x: mb.tanh(x=x), np.tanh),
    "mean": (1, lambda mb, x: mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[1], keep_dims=True)),
             lambda x: x - x.mean(1, keepdims=True)),
    "turn": (1, lambda mb, x: mb.reshape(x=mb.transpose(x=x, perm=[2, 0, 1]), shape=[2, 4, 6]),
             lambda x: x.transpose(2, 0, 1).reshape(2, 4, 6)),
    "swap": (1, lambda mb, x: mb.concat(values=list(reversed(mb.split(x=x, split_sizes=[1, 3], axis=1))), axis=1),
             lambda x: np.concatenate([x[:, 1:], x[:, :1]], 1)),
    "attend": (2, lambda mb, x, y: mb.matmul(x=mb.softmax(x=mb.matmul(x=x, y=y, transpose_y=True), axis=-1), y=y),
               lambda x, y: softmax(x @ y.swapaxes(1, 2), -1) @ y),
    "linear": (1, lambda mb, x: mb.linear(x=x, weight=numbers(6, 6)), lambda x: x @ numbers(6, 6).T),
}  # fmt: skip


@st.composite
def programs(draw):
    """Steps, each naming earlier values by index; values 0 and 1 are the inputs."""
    steps = []
    for position in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(STEPS)))
        steps.append((name, [draw(st.integers(0, position + 1)) for _ in range(STEPS[name][0])]))
    return steps, draw(st.lists(st.integers(0, len(steps) + 1), min_size=1, max_size=3, unique=True))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs(), st.integers(0, 99))
def test_a_random_program_equals_its_numpy_twin(program, seed):
    steps, outputs = program
    arrays = [np.tanh(numbers(2, 4, 6, seed=seed)), np.tanh(numbers(2, 4, 6, seed=seed + 100))]
    want = [x.astype(np.float64) for x in arrays]
    for name, sources in steps:
        want.append(np.tanh(STEPS[name][2](*(want[i] for i in sources))))

    def build(mb, *variables):
        values = list(variables)
        for name, sources in steps:
            values.append(mb.tanh(x=STEPS[name][1](mb, *(values[i] for i in sources))))
        return [values[i] for i in outputs]

    with tempfile.TemporaryDirectory() as folder:
        made = mil.run(mil.save(Path(folder), build, arrays), arrays)
    for got, index in zip(made, outputs, strict=True):
        np.testing.assert_allclose(got, want[index], rtol=1e-3, atol=1e-4)


# ---- rounding -------------------------------------------------------------------------------------------------------


def test_a_float16_program_rounds_every_value_it_declares_float16(tmp_path):
    x = numbers(3, 50) * 30
    path = mil.save(tmp_path, lambda mb, x: mb.mul(x=mb.add(x=x, y=np.float16(0.1)), y=x), [x], fp16=True)
    (got,) = mil.run(path, [x])
    half = x.astype(np.float16)
    assert np.array_equal(got, ((half + np.float16(0.1)) * half).astype(np.float32))


def test_float16_overflows_to_infinity(tmp_path):
    x = np.float32([300, -300])
    path = mil.save(tmp_path, lambda mb, x: mb.mul(x=mb.square(x=x), y=x), [x], fp16=True)
    assert mil.run(path, [x])[0].tolist() == [math.inf, -math.inf]


def test_a_float32_program_rounds_on_request_alone(tmp_path):
    x = numbers(40)
    path = mil.save(tmp_path, lambda mb, x: mb.add(x=mb.mul(x=x, y=np.float32(1.7)), y=np.float32(0.3)), [x])
    exact = x * np.float32(1.7) + np.float32(0.3)
    rounded = ((x * np.float32(1.7)).astype(np.float16) + np.float32(0.3)).astype(np.float16).astype(np.float32)
    assert np.array_equal(mil.run(path, [x])[0], exact)
    assert np.array_equal(mil.run(path, [x], fp16=True)[0], rounded)


# ---- what is refused ------------------------------------------------------------------------------------------------

WEIGHT = numbers(8, 8)
BLOCK = "CoreML7"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small package with weights in its file; tests change copies."""
    return mil.save(
        tmp_path_factory.mktemp("sound"),
        lambda mb, x: mb.relu(x=mb.linear(x=x, weight=WEIGHT, bias=WEIGHT[0], name="middle"), name="last"),
        [numbers(2, 8)],
    )


@pytest.fixture
def package(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "toy.mlpackage"))


def model_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/model.mlmodel"


def weight_file(package: Path) -> Path:
    return package / "Data/com.apple.CoreML/weights/weight.bin"


def change(package: Path, edit) -> Path:
    spec = Model_pb2.Model()
    spec.ParseFromString(model_file(package).read_bytes())
    main = spec.mlProgram.functions["main"]
    edit(spec, main.block_specializations[main.opset].operations)
    model_file(package).write_bytes(spec.SerializeToString())
    return package


def of_type(operations, kind):
    return next(operation for operation in operations if operation.type == kind)


def test_a_sound_package_opens_and_runs(package):
    x = numbers(2, 8)
    assert np.allclose(mil.run(package, [x])[0], np.maximum(x @ WEIGHT.T + WEIGHT[0], 0), atol=1e-5)


def test_an_unknown_operation_is_named_with_its_place(package):
    change(package, lambda _, ops: setattr(of_type(ops, "relu"), "type", "lstm"))
    with pytest.raises(DataError, match=r"operation \d+ \(lstm 'last'\)"):
        Program(package)


def widen(operations):
    of_type(operations, "relu").outputs[0].type.tensorType.dimensions[1].constant.size = 9


def loop(operations):
    of_type(operations, "relu").blocks.add()


def dynamic(operations):
    of_type(operations, "relu").outputs[0].type.tensorType.dimensions[0].unknown.variadic = True


def huge(operations):
    for side in of_type(operations, "relu").outputs[0].type.tensorType.dimensions:
        side.constant.size = 1 << 20


def strange_parameter(operations):
    relu = of_type(operations, "relu")
    relu.inputs["tensor"].CopyFrom(relu.inputs["x"])


def twice(operations):
    of_type(operations, "relu").outputs[0].name = "middle"


def backwards(operations):
    of_type(operations, "linear").inputs["x"].arguments[0].name = "last"


def listed(operations):
    of_type(operations, "relu").outputs[0].type.listType.length.constant.size = 3


def four_bits(operations):
    of_type(operations, "relu").outputs[0].type.tensorType.dataType = MIL_pb2.INT4


def outside(operations):
    for operation in operations:
        if operation.attributes["val"].HasField("blobFileValue"):
            operation.attributes["val"].blobFileValue.fileName = "@model_path/../../../../secret"


def far(operations):
    for operation in operations:
        if operation.attributes["val"].HasField("blobFileValue"):
            operation.attributes["val"].blobFileValue.offset = 1 << 50


FAULTY = [widen, loop, dynamic, huge, strange_parameter, twice, backwards, listed, four_bits, outside, far]


@pytest.mark.parametrize("edit", FAULTY, ids=lambda edit: edit.__name__)
def test_an_ill_formed_program_is_refused(package, edit):
    (package.parent / "secret").write_bytes(b"0" * 4096)
    change(package, lambda _, operations: edit(operations))
    with pytest.raises(DataError):
        Program(package)


def test_versions_from_the_future_are_refused(package):
    change(package, lambda spec, _: setattr(spec, "specificationVersion", 99))
    with pytest.raises(DataError, match="specification version 99"):
        Program(package)


def test_a_program_version_from_the_future_is_refused(package):
    change(package, lambda spec, _: setattr(spec.mlProgram, "version", 2))
    with pytest.raises(DataError, match="program version 2"):
        Program(package)


def test_a_missing_weight_file_is_named(package):
    weight_file(package).unlink()
    with pytest.raises(DataError, match=r"weight\.bin.* is missing"):
        Program(package)


@pytest.mark.parametrize("damage", [lambda b: b[:-8], lambda b: b[:90], lambda b: b[:64] + b"\0" * 4 + b[68:],
                                    lambda b: b[:72] + struct.pack("<Q", 1 << 60) + b[80:]])  # fmt: skip
def test_damaged_weights_are_refused(package, damage):
    path = weight_file(package)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="damaged or cut off"):
        Program(package)


def index_to(place) -> str:
    return json.dumps({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": place}}})


INDEXES = {
    "empty": "",
    "list": "[]",
    "object": "{}",
    "deep": "[" * 100_000,
    "outside": index_to("../../../outside"),
    "number": index_to(3),
    "null byte": index_to("a\0b"),
}


@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES.keys())
def test_a_malformed_index_is_refused(package, text):
    (package.parent / "outside").write_bytes(b"x")
    (package / "Manifest.json").write_text(text)
    with pytest.raises(DataError):
        Program(package)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_flipped_byte_never_escapes_as_another_error(sound, tmp_path, at, byte):
    copy = Path(shutil.copytree(sound, tmp_path / "flip.mlpackage", dirs_exist_ok=True))
    data = bytearray(model_file(sound).read_bytes())
    data[int(at * len(data))] = byte
    model_file(copy).write_bytes(data)
    try:
        program = Program(copy)
        program.run({name: np.zeros(kind.shape, np.float32) for name, kind in program.inputs.items()})
    except (DataError, SetupError):
        pass


def test_more_memory_than_allowed_is_refused_before_it_is_taken(tmp_path):
    x = numbers(8, 8)
    path = mil.save(tmp_path, lambda mb, x: mb.reduce_sum(x=mb.tile(x=x, reps=[1000, 1000])), [x])
    with pytest.raises(SetupError, match="bytes of memory"):
        Program(path, max_live_bytes=200_000_000)
    assert np.isclose(mil.run(path, [x], max_live_bytes=300_000_000)[0], x.sum() * 1e6, rtol=1e-3)


def test_wrong_names_and_shapes_are_refused(package):
    program = Program(package)
    for inputs in ({}, {"x0": numbers(2, 7)}, {"x1": numbers(2, 8)}, {"x0": numbers(2, 8), "x1": numbers(1)}):
        with pytest.raises(RequestError):
            program.run(inputs)


def test_an_index_beyond_the_table_is_the_callers_fault_and_named(tmp_path):
    path = mil.save(tmp_path, lambda mb, i: mb.gather(x=WEIGHT, indices=i, axis=0), [np.int32([0, 1])])
    with pytest.raises(DataError, match="gather"):
        mil.run(path, [np.int32([0, 8])])


def test_values_are_freed_after_their_last_use(tmp_path):
    def build(mb, x):
        for _ in range(5):
            x = mb.tanh(x=x)
        return x

    program = Program(mil.save(tmp_path, build, [A]))
    assert sum(len(step.frees) for step in program._steps) >= 4
    assert {name for step in program._steps for name in step.frees}.isdisjoint(program.outputs)


def test_the_reader_agrees_with_coremltools_own(sound):
    """Weights through coremltools' blob reader, types through its loader."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(sound), skip_model_load=True)
    spec = model.get_spec()
    theirs = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    constants = {op.outputs[0].name: op.val.val for op in theirs.functions["main"].operations if op.op_type == "const"}
    ours = {op.results[0][0]: op.inputs["val"][0] for op in Package(sound).operations() if op.type == "const"}
    assert set(ours) == set(constants)
    assert all(np.array_equal(ours[name], constants[name]) for name in ours)


def test_the_documentation_lists_every_operation():
    text = (Path(__file__).parents[2] / "docs/coreml.md").read_text(encoding="utf-8")
    listed = text.partition("## What the interpreter knows")[2].replace(",", " ").split()
    assert {f"`{name}`" for name in OPERATIONS} <= set(listed)
