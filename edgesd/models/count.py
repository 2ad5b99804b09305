"""What a model costs: parameters and multiply-accumulates, counted on shapes alone, nothing computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """params: parameters (tied ones once). bytes: theirs in memory. macs: multiply-accumulates of one call.

    by_module: macs by dotted module name, a module's own matrix products and its children's together; the root is "".
    MACs are those of convolutions, linears and attention's two products; biases, norms and activations count nothing.
    """

    params: int
    bytes: int
    macs: int
    by_module: dict[str, int]


def count(module: nn.Module, inputs: Sequence[torch.Tensor]) -> Cost:
    """The cost of `module(*inputs)`; of inputs only shapes and dtypes matter, the module is not changed.

    The same as the sum over Conv, Gemm and MatMul nodes of the exported ONNX graph at these static shapes.
    """
    parameters = dict(module.named_parameters())
    tensors = {**parameters, **dict(module.named_buffers())}
    # Fake rather than meta tensors: constants that a module keeps as plain attributes may take part as they are.
    # Fused attention would hide its two products from the counter.
    unfused = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), unfused:
        shapes: dict[str, torch.Tensor] = {name: fake.from_tensor(tensor.detach()) for name, tensor in tensors.items()}
        with FlopCounterMode(display=False) as counter:
            torch.func.functional_call(module, shapes, tuple(fake.from_tensor(x) for x in inputs))
    root = type(module).__name__
    flops = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    return Cost(
        params=sum(p.numel() for p in parameters.values()),
        bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
        macs=counter.get_total_flops() // 2,
        by_module={name.removeprefix(root).removeprefix("."): n // 2 for name, n in flops.items() if name != "Global"},
    )
