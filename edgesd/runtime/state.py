"""Where a run begins: noise, a picture, another table's run (the bridge), or a file (pause and resume)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular, write_whole
from edgesd.runtime.table import MAX_INPUTS, MAX_OUTPUTS, SamplerTable

MAX_STATE_BYTES = 1 << 30
FORMAT = "edgesd-state-1"


@dataclass(frozen=True, eq=False)
class State:
    """All that a run needs to go on at `row`: inputs (u_row first) and outputs (e_{row-1} first), [B,C,h,w] f32.

    start: the row the run began at, which decides its warm-up. At row == table.rows inputs[0] is the result.
    """

    row: int
    start: int
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...] = ()


def init_latents(table: SamplerTable, noise: np.ndarray) -> np.ndarray:
    """The UNet's input at row 0 from standard normals [B,C,h,w]."""
    return np.float32(table.init_scale) * noise


def add_noise(table: SamplerTable, row: int, x0: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """x0 at the noise of a row, as the UNet's input there; at row == table.rows, after the last, x0 itself."""
    return x0 if row == table.rows else table.alpha[row] * x0 + table.sigma[row] * noise


def bridge(table: SamplerTable, row: int, sample: np.ndarray, model_output: np.ndarray, other: SamplerTable) -> State:
    """Leaves `table` after the UNet's call at `row` and enters `other` at its nearest lower noise level.

    x0 and eps come from that call and are mixed anew at the other table's alpha and sigma (a DDIM step), which then
    begins with that row's warm-up. Where no row of `other` lies lower, the State is its end and holds x0.
    """
    skip, out = table.x0_coefficients(row)
    x0 = skip * sample + out * model_output
    level = float(table.sigma[row]) / max(float(table.alpha[row]), 1e-30)
    for entry in (0, *sorted(other.starts)):
        if float(other.sigma[entry]) < level * (1 - 1e-6) * float(other.alpha[entry]):
            eps = (sample - table.alpha[row] * x0) / table.sigma[row]
            return State(entry, entry, (add_noise(other, entry, x0, eps),))
    return State(other.rows, 0, (x0,))


@dataclass(frozen=True, eq=False)
class Saved:
    """What a file holds: a state, the table it is of, whose it is. told: text kept with it; last: see `save_state`."""

    state: State
    sampler: str
    steps: int
    owner: str
    told: str = ""
    last: tuple[np.ndarray, np.ndarray] | None = None


def save_state(
    path: Path | str, table: SamplerTable, state: State, owner: str = "", told: str = "",
    last: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Writes a run's state, at most twelve tensors, so that it appears whole or not at all. owner: whose run it is.

    told: what the caller wants back. last: the UNet's input and output of the last row, to bridge from.
    """
    arrays = {f"input_{i}": array for i, array in enumerate(state.inputs)}
    arrays |= {f"output_{i}": array for i, array in enumerate(state.outputs)}
    arrays |= {f"last_{i}": array for i, array in enumerate(last if last is not None else ())}
    arrays["row"] = np.array([state.row, state.start], np.int32)
    head = {"format": FORMAT, "sampler": table.name, "steps": str(table.steps), "owner": owner, "told": told}
    write_whole(Path(path), dump_tensors({k: np.ascontiguousarray(v) for k, v in arrays.items()}, head))


def load_state(path: Path | str, table: SamplerTable, owner: str = "") -> State:
    """Reads a state for `table`. RequestError when it is another table's or owner's; DataError when it is broken."""
    return fitting(read_state(path), table, owner)


def read_state(path: Path | str) -> Saved:
    """Reads what `save_state` wrote, whosever it is. DataError when it is broken."""
    try:
        with open_regular(Path(path)) as file:
            data = file.read(MAX_STATE_BYTES + 1)
        arrays = load_tensors(data)
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if len(data) > MAX_STATE_BYTES or head["format"] != FORMAT:
            raise ValueError("too large, or no state file")
        steps, told = int(head["steps"]), head.get("told", "")
        texts = (head["sampler"], head["owner"], told)
        row, start = (int(n) for n in arrays.pop("row"))
        inputs = _numbered(arrays, "input", MAX_INPUTS)
        outputs = _numbered(arrays, "output", MAX_OUTPUTS)
        last = _numbered(arrays, "last", 2)
        alike = len({a.shape for a in (*inputs, *outputs, *last)}) == 1
        if arrays or not inputs or len(last) not in (0, 2) or not alike or not all(isinstance(t, str) for t in texts):
            raise ValueError("arrays that do not belong together")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"the saved run does not read ({str(error)[:120]})", "a file that edgesd saved on pause",
                        "Draw the picture anew") from None  # fmt: skip
    ends = (last[0], last[1]) if last else None
    return Saved(State(row, start, inputs, outputs), texts[0][:64], steps, texts[1], told, ends)


def fitting(saved: Saved, table: SamplerTable, owner: str = "") -> State:
    """The state, if it is of this table and owner; errors as of `load_state`."""
    state, whose = saved.state, f"{saved.steps} steps of {saved.sampler}"
    row, start, inputs, outputs = state.row, state.start, state.inputs, state.outputs
    if whose != f"{table.steps} steps of {table.name}":
        raise RequestError(f"a run of {whose}", f"{table.steps} steps of {table.name}", "Resume with the same settings")
    if saved.owner != owner:
        raise RequestError("the saved run of another picture", "the same prompt, seed, settings and model",
                           "Say the same as before, or name another file")  # fmt: skip
    # A run that began at `start` has seen this many inputs and outputs by now; with fewer it would go on wrongly.
    seen = row - start
    needed = min(seen + 1, table.input_coef.shape[1]), min(seen, table.output_coef.shape[1] - 1)
    allowed = 0 <= start <= row <= table.rows and (start == 0 or start in table.starts)
    if not allowed or (len(inputs), len(outputs)) != needed:
        raise DataError("the saved run does not fit its table", f"rows 0 to {table.rows}", "Draw the picture anew")
    return state


def _numbered(arrays: dict[str, np.ndarray], kind: str, most: int) -> tuple[np.ndarray, ...]:
    """Takes kind_0, kind_1 ... out of `arrays`; ValueError for a wrong type, shape or number."""
    found: list[np.ndarray] = []
    while (array := arrays.pop(f"{kind}_{len(found)}", None)) is not None and len(found) < most:
        if array.dtype != np.float32 or array.ndim != 4 or not array.size or not np.isfinite(array).all():
            raise ValueError(f"{kind} {len(found)} is no finite float32 [B,C,h,w]")
        found.append(array)
    return tuple(found)
