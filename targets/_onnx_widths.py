"""Several widths over one external data file: narrow ONNX graphs that cut the widest one's weights as they load.

onnxruntime folds constant operations when a session is made, so what runs, and what stays in memory, is the narrow
model. The operations (Slice, Cast, Floor, Mul, Add, …) are old and plain: a browser's build has them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from edgesd.compress.inherit import Correction
from edgesd.compress.layouts import WEIGHT_HIGH
from edgesd.errors import GateError
from edgesd.targets._sharing import Derived, derive

ALIGNMENT = 64


def share(wide: Path, narrow: Path, made: Path, corrections: Sequence[Correction]) -> tuple[Path, ...]:
    """Writes `made` (a .onnx beside `wide`) as the model of `narrow` on the weights of `wide`; the files it needs.

    corrections: of its int8 layers. What is in neither goes to a file of its own beside it. Raises GateError where the
    two graphs differ in more than their widths.
    """
    import onnx

    whole, small = onnx.load(wide, load_external_data=False), onnx.load(narrow, load_external_data=False)
    pairs = _counterparts(whole.graph, small.graph)
    tensors = {t.name: t for t in whole.graph.initializer}
    added = _Added(made.with_suffix(".data"))
    for tensor in small.graph.initializer:
        array = _array(tensor, narrow.parent)
        source = tensors.get(pairs.get(tensor.name, ""))
        if source is None or not source.external_data:
            found = None
        else:
            found = derive(_array(source, wide.parent), array, corrections)
        if found is None:
            added.store(tensor.name, array)
        else:
            added.cut(tensor.name, source, found, array)
    nodes = [*added.nodes, *small.graph.node]
    del small.graph.initializer[:], small.graph.node[:], small.graph.value_info[:]
    small.graph.initializer.extend(added.kept)
    small.graph.node.extend(nodes)
    added.place.write_bytes(added.own)
    onnx.save(small, made)
    shared = sorted({e.value for t in added.kept for e in t.external_data if e.key == "location"} - {added.place.name})
    return (made, *(made.parent / name for name in shared), *((added.place,) if added.own else ()))


def _counterparts(wide: Any, narrow: Any) -> dict[str, str]:
    """Narrow initializer -> wide initializer: what stands at the same input of the same node."""
    all_theirs, all_ours = _operations(wide), _operations(narrow)
    if [kind for kind, _ in all_theirs] != [kind for kind, _ in all_ours]:
        raise GateError("graphs of two widths that differ in their operations", "the same operations",
                        "Choose --width-mode separate")  # fmt: skip
    found: dict[str, str] = {}
    for (_, theirs), (_, ours) in zip(all_theirs, all_ours, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            found.setdefault(b, a)
    return found


def _operations(graph: Any) -> list[tuple[str, list[str]]]:
    """(type, inputs) of each node but those that quantize: which layers do is each width's own affair."""
    stored = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    between = ("QuantizeLinear", "DequantizeLinear")
    return [(n.op_type, [stored.get(i, i) for i in n.input]) for n in graph.node if n.op_type not in between]


def _array(tensor: Any, folder: Path) -> np.ndarray:
    import onnx

    return onnx.numpy_helper.to_array(tensor, base_dir=str(folder))


class _Added:
    """What stands in a narrow graph for its old initializers: others, and operations that cut the widest one's.

    place: the file of what the widest one has not; own: its bytes. Names are short, and small numbers stored once: the
    text of a graph weighs.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.own = place, bytearray()
        self.kept: list[Any] = []
        self.nodes: list[Any] = []
        self._numbers: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._names = (f"/{i}" for i in count())

    def store(self, name: str, array: np.ndarray) -> None:
        """An initializer with bytes of its own: in the graph where they are few, else at the end of the file."""
        import onnx

        tensor = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        self.kept.append(tensor)
        if array.nbytes <= 1024:
            return
        self.own.extend(bytes(-len(self.own) % ALIGNMENT))
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        _refer(tensor, self.place.name, len(self.own), len(raw))
        self.own.extend(raw)

    def cut(self, name: str, source: Any, found: Derived, narrow: np.ndarray) -> None:
        """The value `name`, equal to `narrow`, out of the wide tensor `source`."""
        import onnx

        tensor = onnx.TensorProto()
        tensor.CopyFrom(source)
        self.kept.append(tensor)
        if not found.cuts and found.codes is None:
            tensor.name = name
            return
        tensor.name = now = next(self._names)
        for pieces in found.starts():
            cut = [self._node("Slice", now, *(self._value([x]) for x in (b, e, axis))) for axis, b, e in pieces]
            now = cut[0] if len(cut) == 1 else self._node("Concat", *cut, axis=pieces[0][0])
        if found.codes is not None:
            whole = now if narrow.dtype == np.float32 else self._node("Cast", now, to=onnx.TensorProto.FLOAT)
            whole = whole if found.gain is None else self._node("Mul", whole, self._value(found.gain, np.float32))
            now = self._node("Add", whole, self._change(found, narrow))
            if found.gain is not None:
                ends = (self._value(end, np.float32) for end in (-WEIGHT_HIGH, WEIGHT_HIGH))
                now = self._node("Clip", self._node("Round", now), *ends)
            now = now if narrow.dtype == np.float32 else self._node("Cast", now, to=source.data_type)
        self.nodes[-1].output[0] = name

    def _change(self, found: Derived, narrow: np.ndarray) -> str:
        """The correction, float32, out of its 4-bit codes."""
        import onnx

        bytes_ = self._node("Cast", self._value(found.codes, np.uint8), to=onnx.TensorProto.FLOAT)
        high = self._node("Floor", self._node("Mul", bytes_, self._value(1 / 16, np.float32)))
        low = self._node("Sub", bytes_, self._node("Mul", high, self._value(16, np.float32)))
        both = self._node("Concat", high, low, axis=0)
        if narrow.size % 2:
            both = self._node("Slice", both, *(self._value([x]) for x in (0, narrow.size, 0)))
        steps = self._node("Sub", self._node("Reshape", both, self._value(narrow.shape)), self._value(8, np.float32))
        return self._node("Mul", steps, self._value(found.scale, np.float32))

    def _value(self, numbers: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(numbers, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._numbers:
            self._numbers[key] = next(self._names)
            self.store(self._numbers[key], array)
        return self._numbers[key]

    def _node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        import onnx

        made = next(self._names)
        self.nodes.append(onnx.helper.make_node(kind, list(inputs), [made], **attributes))
        return made


def _refer(tensor: Any, file: str, offset: int, length: int) -> None:
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
