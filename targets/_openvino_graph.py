"""Where an OpenVINO graph keeps the weight of a product."""

from __future__ import annotations

from typing import Any

# What lies between a stored weight and the product it takes part in, cut and corrected or not.
_ON_THE_WAY = (
    "Add", "Clamp", "Concat", "Convert", "FakeQuantize", "Multiply", "Reshape", "Round", "Slice", "Subtract",
    "Transpose",
)  # fmt: skip


def stored_weight(op: Any) -> tuple[Any, bool] | None:
    """(constant, whether it is int8 where the product begins) behind a convolution or linear; None for other operations
    and for products of two activations."""
    if op.get_type_name() not in ("Convolution", "MatMul"):
        return None
    node, is_int8 = op.input_value(1).get_node(), False
    while node.get_type_name() in _ON_THE_WAY:
        node = node.input_value(0).get_node()
        is_int8 = is_int8 or str(node.get_output_element_type(0)) in ("<Type: 'int8_t'>", "<Type: 'uint8_t'>")
    return (node, is_int8) if node.get_type_name() == "Constant" else None
