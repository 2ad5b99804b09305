"""Several widths over one external data file: narrow ONNX graphs that cut the widest one's weights as they load.

onnxruntime folds constant operations when a session is made, so what runs, and what stays in memory, is the narrow
model. The operations (Slice, Cast, Floor, Mul, Add, …) are old and plain: a browser's build has them all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgesd.errors import GateError
from edgesd.targets._sharing import Derived, derive

ALIGNMENT = 64


def share(wide: Path, narrow: Path, made: Path) -> tuple[Path, ...]:
    """Writes `made` (a .onnx beside `wide`) as the model of `narrow` on the weights of `wide`; the files it needs.

    What is in neither goes to a file of its own beside it. Raises GateError where the two graphs differ in more than
    their widths.
    """
    import onnx

    whole, small = onnx.load(wide, load_external_data=False), onnx.load(narrow, load_external_data=False)
    pairs = _counterparts(whole.graph, small.graph)
    tensors = {t.name: t for t in whole.graph.initializer}
    own, nodes, kept = bytearray(), [], []
    place = made.with_suffix(".data")
    for tensor in small.graph.initializer:
        array = _array(tensor, narrow.parent)
        source = tensors.get(pairs.get(tensor.name, ""))
        found = None if source is None or not source.external_data else derive(_array(source, wide.parent), array)
        if found is None:
            kept.append(_own(tensor.name, array, own, place.name))
        else:
            kept += _cut(tensor.name, source, found, array, own, place.name, nodes)
    del small.graph.initializer[:]
    small.graph.initializer.extend(kept)
    old = list(small.graph.node)
    del small.graph.node[:]
    small.graph.node.extend([*nodes, *old])
    place.write_bytes(own)
    onnx.save(small, made)
    shared = sorted({e.value for t in kept for e in t.external_data if e.key == "location"} - {place.name})
    return (made, *(made.parent / name for name in shared), *((place,) if own else ()))


def _counterparts(wide: Any, narrow: Any) -> dict[str, str]:
    """Narrow initializer -> wide initializer: what stands at the same input of the same node."""
    if [n.op_type for n in wide.node] != [n.op_type for n in narrow.node]:
        raise GateError("graphs of two widths that differ in their operations", "the same operations",
                        "Choose --width-mode separate")  # fmt: skip
    found: dict[str, str] = {}
    for theirs, ours in zip(wide.node, narrow.node, strict=True):
        for a, b in zip(theirs.input, ours.input, strict=True):
            found.setdefault(b, a)
    return found


def _array(tensor: Any, folder: Path) -> np.ndarray:
    import onnx

    return onnx.numpy_helper.to_array(tensor, base_dir=str(folder))


def _own(name: str, array: np.ndarray, own: bytearray, file: str) -> Any:
    """An initializer with bytes of its own: in the graph where they are few, else at the end of `own`."""
    import onnx

    tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    if array.nbytes <= 1024:
        return tensor
    own.extend(bytes(-len(own) % ALIGNMENT))
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    _refer(tensor, file, len(own), len(raw))
    own.extend(raw)
    return tensor


def _refer(tensor: Any, file: str, offset: int, length: int) -> None:
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def _cut(
    name: str, source: Any, found: Derived, array: np.ndarray, own: bytearray, file: str, nodes: list[Any]
) -> list[Any]:
    """Initializers and (into `nodes`) the operations that make the value `name` of the wide tensor `source`."""
    import onnx

    tensor = onnx.TensorProto()
    tensor.CopyFrom(source)
    if not found.cuts and found.codes is None:
        tensor.name = name
        return [tensor]
    tensor.name = now = f"{name}/wide"
    kept, counts = [tensor], iter(range(1000))

    def value(numbers: Any, dtype: Any = np.int64) -> str:
        made = f"{name}/{next(counts)}"
        kept.append(_own(made, np.asarray(numbers, dtype), own, file))
        return made

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        made = f"{name}/{next(counts)}"
        nodes.append(onnx.helper.make_node(kind, list(inputs), [made], **attributes))
        return made

    for pieces in found.starts():
        cut = [node("Slice", now, value([start]), value([end]), value([axis])) for axis, start, end in pieces]
        now = cut[0] if len(cut) == 1 else node("Concat", *cut, axis=pieces[0][0])
    if found.codes is not None and found.scale is not None:
        float32 = onnx.TensorProto.FLOAT
        bytes_ = node("Cast", value(found.codes, np.uint8), to=float32)
        high = node("Floor", node("Mul", bytes_, value(1 / 16, np.float32)))
        low = node("Sub", bytes_, node("Mul", high, value(16, np.float32)))
        both = node("Concat", high, low, axis=0)
        both = node("Slice", both, value([0]), value([array.size]), value([0])) if array.size % 2 else both
        steps = node("Sub", node("Reshape", both, value(array.shape)), value(8, np.float32))
        change = node("Mul", steps, value(found.scale, np.float32))
        whole = now if array.dtype == np.float32 else node("Cast", now, to=float32)
        now = node("Add", whole, change)
        now = now if array.dtype == np.float32 else node("Cast", now, to=source.data_type)
    nodes[-1].output[0] = name
    return kept
