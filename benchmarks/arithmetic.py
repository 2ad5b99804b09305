"""What this machine's arithmetic can do at most: `python benchmarks/arithmetic.py --threads N` prints JSON.

Chains of equal convolutions and products of matrices in float32, bfloat16 and int8, of the shapes that fill a UNet's
time at 512 px, as fast as OpenVINO's kernels and torch's go. The best of each type is the limit that a whole UNet is
held against; operations count a multiplication and an addition as two.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

CHAIN, RUNS = 6, 9
CONVOLUTIONS = ((320, 64), (640, 32), (1280, 16))  # channels, side
PRODUCTS = ((4096, 1280), (1024, 2560))  # rows, width


def median_seconds(call: Callable[[], Any]) -> float:
    """Of RUNS calls after two that warm up."""
    taken = []
    for _ in range(RUNS + 2):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[2:]))


def chain(kind: str, first: int, second: int, dtype: str) -> tuple[Any, int]:
    """(OpenVINO graph of CHAIN equal layers, its MACs). kind: conv (channels, side), matmul (rows, width)."""
    import openvino as ov
    from openvino import opset13 as ops

    shape = [1, first, second, second] if kind == "conv" else [first, second]
    weight = [first, first, 3, 3] if kind == "conv" else [second, second]
    random = np.random.RandomState(0)
    given = node = ops.parameter(shape, np.float32)
    for _ in range(CHAIN):
        if dtype == "int8":
            low, high = np.float32(0), np.float32(2.55)
            node = ops.fake_quantize(node, low, high, low, high, 256)
            whole = ops.constant(random.randint(-127, 128, weight).astype(np.int8))
            scale = np.full((weight[0], 1, 1, 1) if kind == "conv" else (1, weight[1]), 1e-4, np.float32)
            kernel = ops.multiply(ops.convert(whole, np.float32), ops.constant(scale))
        else:
            kernel = ops.constant((random.randn(*weight) * 0.01).astype(np.float32))
        node = (
            ops.convolution(node, kernel, [1, 1], [1, 1], [1, 1], [1, 1]) if kind == "conv"
            else ops.matmul(node, kernel, False, False)
        )  # fmt: skip
    macs = CHAIN * (first * first * 9 * second * second if kind == "conv" else first * second * second)
    return ov.Model([node], [given]), macs


def by_openvino(kind: str, first: int, second: int, dtype: str, threads: int) -> dict[str, Any]:
    import openvino as ov

    graph, macs = chain(kind, first, second, dtype)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "bf16" if dtype == "bf16" else "f32"
    compiled = ov.Core().compile_model(graph, "CPU", settings)
    ran = {op.get_rt_info()["layerType"].astype(str): op.get_rt_info()["runtimePrecision"].astype(str)
           for op in compiled.get_runtime_model().get_ops()}  # fmt: skip
    request = compiled.create_infer_request()
    x = np.random.RandomState(1).rand(*graph.inputs[0].get_shape()).astype(np.float32)
    seconds = median_seconds(lambda: request.infer([x], share_inputs=True))
    kernel = ran.get("Convolution", ran.get("FullyConnected", ran.get("MatMul", "?")))
    return _row("OpenVINO", kind, (first, second), dtype, macs, seconds) | {"kernel": kernel}


def by_torch(rows: int, width: int, dtype: str, threads: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    if dtype == "int8":
        left = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
        right = torch.randint(-128, 128, (width, width), dtype=torch.int8)
        call: Callable[[], Any] = lambda: torch._int_mm(left, right)  # noqa: E731
    else:
        kind = torch.float32 if dtype == "f32" else torch.bfloat16
        left, right = torch.randn(rows, width).to(kind), torch.randn(width, width).to(kind)
        call = lambda: left @ right  # noqa: E731
    return _row("torch", "matmul", (rows, width), dtype, rows * width * width, median_seconds(call))


def _row(engine: str, kind: str, shape: tuple[int, int], dtype: str, macs: int, seconds: float) -> dict[str, Any]:
    return {"engine": engine, "kind": kind, "shape": list(shape), "type": dtype, "seconds": round(seconds, 6),
            "gops": round(2 * macs / seconds / 1e9, 2)}  # fmt: skip


def measure(threads: int) -> dict[str, Any]:
    """Every row, and per type the best, whose kernels really were of that type."""
    rows = []
    for dtype in ("f32", "bf16", "int8"):
        rows += [by_openvino("conv", *shape, dtype, threads) for shape in CONVOLUTIONS]
        rows += [by_openvino("matmul", *shape, dtype, threads) for shape in PRODUCTS]
        rows += [by_torch(*shape, dtype, threads) for shape in PRODUCTS]
    return {"threads": threads, "rows": rows, "limit_gops": limits(rows)}


def limits(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The best figure of each type; a graph that computed in another type than it was asked for does not count."""
    kernels = {"f32": ("f32",), "bf16": ("bf16",), "int8": ("i8", "u8")}
    best: dict[str, float] = {}
    for row in rows:
        if row.get("kernel", kernels[row["type"]][0]) in kernels[row["type"]]:
            best[row["type"]] = max(best.get(row["type"], 0.0), row["gops"])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    print(json.dumps(measure(parser.parse_args().threads), indent=1))


if __name__ == "__main__":
    main()
