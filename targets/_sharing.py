"""One weight as a slice of another: how a narrow model's tensors come out of the widest one's, which are stored once.

A narrow tensor is the leading share of the wide one on each axis that is shorter (or of each of two halves: a gated
layer's values and gates lie side by side), plus, where the width was restored, a correction of 4 bits an element with
one scale an output channel (edgesd/compress/widths.py rounds corrections so). `derive` finds both by looking. What was
added to integers cannot be seen once they are rounded: int8 corrections are given (edgesd/compress/inherit.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from edgesd.compress.inherit import Correction, corrected
from edgesd.compress.widths import LEVELS

SMALL = 256  # elements below which a tensor of its own costs less than a slice's description
BLOCKS = (1, 2)


@dataclass(frozen=True, eq=False)
class Derived:
    """cuts: per axis that is shorter, (axis, kept in each block, length of a block, blocks). codes: u8, two 4-bit
    values a byte, the first half of the flattened tensor in the high bits, each plus 8; scale: f32, of the narrow
    tensor's number of axes; both None where the slice is all. gain: what the slice is multiplied with, likewise, of an
    int8 tensor; else None.
    """

    cuts: tuple[tuple[int, int, int, int], ...]
    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    gain: np.ndarray | None = None

    def starts(self) -> list[list[tuple[int, int, int]]]:
        """For each cut in turn, (axis, start, end) of the pieces that are joined along that axis."""
        return [
            [(axis, b * length, b * length + kept) for b in range(blocks)] for axis, kept, length, blocks in self.cuts
        ]

    def steps(self) -> np.ndarray:
        """The correction in steps of its scale, flat, with what fills its last byte: -7..7."""
        assert self.codes is not None
        return np.concatenate([self.codes >> 4, self.codes & 15]).astype(np.int8) - 8


def derive(wide: np.ndarray, narrow: np.ndarray, corrections: Sequence[Correction] = ()) -> Derived | None:
    """How `narrow` comes out of `wide`: integers exactly, floats to their dtype's rounding; None where it does not, or
    is small, or is neither a float nor an int8 tensor. corrections: of the narrow model's int8 layers, in any order."""
    if wide.dtype != narrow.dtype or wide.ndim != narrow.ndim or narrow.size < SMALL:
        return None
    if narrow.dtype.kind != "f" and narrow.dtype != np.int8:
        return None
    shorter = [axis for axis in range(narrow.ndim) if narrow.shape[axis] != wide.shape[axis]]
    other = None
    for blocks in product(BLOCKS, repeat=len(shorter)):
        cuts = tuple(
            (axis, narrow.shape[axis] // n, wide.shape[axis] // n, n) for axis, n in zip(shorter, blocks, strict=True)
        )
        if any(kept * n != narrow.shape[axis] or length * n != wide.shape[axis] or kept > length
               for axis, kept, length, n in cuts):  # fmt: skip
            continue
        found = Derived(cuts)
        piece = cut(wide, found)
        if np.array_equal(piece, narrow):
            return found
        if other is None:
            is_int8 = narrow.dtype == np.int8
            other = _given(found, piece, narrow, corrections) if is_int8 else _corrected(found, piece, narrow)
    return other


def cut(wide: np.ndarray, derived: Derived) -> np.ndarray:
    """The slice of a wide tensor."""
    for pieces in derived.starts():
        wide = np.concatenate([np.take(wide, range(start, end), axis) for axis, start, end in pieces], pieces[0][0])
    return wide


def rebuilt(wide: np.ndarray, derived: Derived) -> np.ndarray:
    """The narrow tensor: what the graph's constant operations compute."""
    piece = cut(wide, derived)
    if derived.codes is None or derived.scale is None:
        return piece
    steps = derived.steps()[: piece.size].astype(np.float32).reshape(piece.shape)
    if derived.gain is not None:
        return corrected(piece, Correction(steps, derived.gain, derived.scale))
    return (piece.astype(np.float32) + steps * derived.scale).astype(piece.dtype)


def _corrected(found: Derived, piece: np.ndarray, narrow: np.ndarray) -> Derived | None:
    delta = narrow.astype(np.float32) - piece.astype(np.float32)
    loose = 2e-3 if narrow.dtype == np.float16 else 1e-5
    for axis in (0, narrow.ndim - 1):
        others = tuple(i for i in range(narrow.ndim) if i != axis)
        scale = np.abs(delta).max(axis=others, keepdims=True) / LEVELS
        steps = np.rint(delta / np.where(scale > 0, scale, 1))
        energy = (steps**2).sum(axis=others, keepdims=True)
        scale = (delta * steps).sum(axis=others, keepdims=True) / np.where(energy > 0, energy, 1)  # less rounding
        if np.abs(steps).max() > LEVELS:
            continue
        made = Derived(found.cuts, _packed(steps), scale.astype(np.float32))
        if np.abs(rebuilt_from(piece, made) - narrow.astype(np.float32)).max() <= loose * np.abs(narrow).max():
            return made
    return None


def rebuilt_from(piece: np.ndarray, derived: Derived) -> np.ndarray:
    """`rebuilt` in float32 from a slice that is cut already."""
    return rebuilt(piece.astype(np.float32), Derived((), derived.codes, derived.scale))


def _packed(steps: np.ndarray) -> np.ndarray:
    codes = np.pad((steps.ravel() + 8).astype(np.uint8), (0, steps.size % 2))
    half = codes.size // 2
    return codes[:half] << 4 | codes[half:]


def _given(found: Derived, piece: np.ndarray, narrow: np.ndarray, corrections: Sequence[Correction]) -> Derived | None:
    turned = [one.transposed() for one in corrections if narrow.ndim == 2]
    for one in (*corrections, *turned):
        if one.steps.shape == narrow.shape and np.array_equal(corrected(piece, one), narrow):
            return Derived(found.cuts, _packed(one.steps), one.ratio, one.gain)
    return None
