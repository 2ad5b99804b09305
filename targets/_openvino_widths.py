"""Several widths over one weights file: narrow IR graphs that cut the widest one's constants as they are compiled.

OpenVINO folds constant operations when a model is compiled, so what runs is the narrow model. An IR's constants are
places in its .bin, and any number of .xml may point into one: what the wide graph does not hold is appended.
"""

from __future__ import annotations

import hashlib
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgesd.compress.inherit import Correction
from edgesd.compress.layouts import WEIGHT_HIGH
from edgesd.errors import GateError
from edgesd.targets._openvino_graph import stored_weight
from edgesd.targets._sharing import Derived, derive

ALIGNMENT = 64


def share(wide: Path, narrow: Path, made: Path, corrections: Sequence[Correction]) -> tuple[Path, ...]:
    """Writes `made` (an .xml beside `wide`) as the model of `narrow` on the weights of `wide`; the files it needs.

    corrections: of its int8 layers. Raises GateError where the two graphs differ in more than their widths.
    """
    import openvino as ov

    core = ov.Core()
    whole, small = core.read_model(wide), core.read_model(narrow)
    theirs, ours = _weights(whole), _weights(small)
    if [kind for kind, _ in theirs] != [kind for kind, _ in ours]:
        raise GateError("graphs of two widths that differ in their operations", "the same operations",
                        "Choose --width-mode separate")  # fmt: skip
    numbers = _Numbers()
    for (_, source), (_, constant) in zip(theirs, ours, strict=True):
        array, from_ = np.array(constant.data), np.array(source.data)
        found = derive(from_, array, corrections)
        if found is not None and (found.cuts or found.codes is not None):
            constant.output(0).replace(_cut(from_, found, array, numbers).output(0))
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        graph = Path(scratch) / "model.xml"
        ov.serialize(small, graph)
        _point(graph, graph.with_suffix(".bin"), wide, made)
    return made, wide.with_suffix(".bin")


def _weights(model: Any) -> list[tuple[str, Any]]:
    """(operation, its weight's constant) of all products with a weight, in order of execution.

    What quantizes activations in between is each width's own affair.
    """
    found = ((op.get_type_name(), stored_weight(op)) for op in model.get_ordered_ops())
    return [(kind, weight[0]) for kind, weight in found if weight is not None]


class _Numbers:
    """Small constants of a graph, each once: a layer of an IR takes half a kilobyte of text."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *values: float) -> Any:
        from openvino import opset13 as ops

        dtype = np.float32 if isinstance(values[0], float) else np.int64
        key = (dtype, *values)
        if key not in self._made:
            self._made[key] = ops.constant(np.array(values, dtype))
        return self._made[key]


def _cut(wide: np.ndarray, found: Derived, narrow: np.ndarray, numbers: _Numbers) -> Any:
    """The operations that make the narrow constant."""
    from openvino import opset13 as ops

    now = ops.constant(wide)
    for pieces in found.starts():
        cut = [ops.slice(now, numbers(start), numbers(end), numbers(1), numbers(axis)) for axis, start, end in pieces]
        now = cut[0] if len(cut) == 1 else ops.concat(cut, pieces[0][0])
    if found.codes is None or found.scale is None:
        return now
    # By arithmetic: a constant of type i4 would be taken for a compressed weight, and not folded as this one must be.
    bytes_ = ops.convert(ops.constant(found.codes), "f32")
    high = ops.floor(ops.multiply(bytes_, numbers(1 / 16)))
    low = ops.subtract(bytes_, ops.multiply(high, numbers(16.0)))
    both = ops.concat([high, low], 0)
    both = both if narrow.size % 2 == 0 else ops.slice(both, numbers(0), numbers(narrow.size), numbers(1), numbers(0))
    steps = ops.subtract(ops.reshape(both, numbers(*narrow.shape), False), numbers(8.0))
    change = ops.multiply(steps, ops.constant(found.scale))
    if found.gain is not None:
        # Integers that become floats and are multiplied pass for a weight being dequantized, and are not folded: so by
        # way of another integer.
        now = ops.multiply(ops.convert(ops.convert(now, "i32"), "f32"), ops.constant(found.gain))
    elif narrow.dtype != np.float32:
        now = ops.convert(now, "f32")
    total = ops.add(now, change)
    if found.gain is not None:
        return ops.convert(ops.clamp(ops.round(total, "half_to_even"), -WEIGHT_HIGH, WEIGHT_HIGH), "i8")
    return total if narrow.dtype == np.float32 else ops.convert(total, "f16")


def _point(graph: Path, weights: Path, wide: Path, made: Path) -> None:
    """Writes `graph` to `made` with constants where the wide .bin has their bytes, appended where it has not."""
    shared = wide.with_suffix(".bin")
    data = bytearray(shared.read_bytes())
    places = {_digest(data[at : at + size]): at for _, at, size in _constants(ElementTree.parse(wide))}
    tree, own = ElementTree.parse(graph), weights.read_bytes()
    for element, at, size in _constants(tree):
        piece = own[at : at + size]
        digest = _digest(piece)
        if digest not in places:
            data.extend(bytes(-len(data) % ALIGNMENT))
            places[digest] = len(data)
            data.extend(piece)
        element.set("offset", str(places[digest]))
    _shorten(tree)
    tree.write(made)
    shared.write_bytes(data)


def _shorten(tree: ElementTree.ElementTree) -> None:
    """Takes out what only people read: indentation, names of layers and tensors within, shapes of layers' inputs."""
    for element in tree.iter():
        element.text = element.text if element.text is not None and element.text.strip() else None
        element.tail = None
    layers = {layer.get("id"): layer for layer in tree.iter("layer")}
    border = {
        edge.get("from-layer") for edge in tree.iter("edge") if layers[edge.get("to-layer")].get("type") == "Result"
    }
    border |= {at for at, layer in layers.items() if layer.get("type") in ("Parameter", "Result")}
    for at, layer in layers.items():
        for port in layer.findall("input/port"):
            port[:] = []
        if at not in border:
            layer.set("name", f"n{at}")
            for port in layer.findall("output/port"):
                port.attrib.pop("names", None)


def _constants(tree: ElementTree.ElementTree) -> list[tuple[ElementTree.Element, int, int]]:
    """(data element, offset, size) of every constant of an IR."""
    found = [layer.find("data") for layer in tree.iter("layer") if layer.get("type") == "Const"]
    return [(e, int(e.get("offset", "0")), int(e.get("size", "0"))) for e in found if e is not None]


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.sha256(data).digest()
