"""A sampler as data: the banded recurrence that turns model outputs into the next UNet input, and its file.

With u_i the UNet's input at row i (already scaled as the UNet wants it), e_i its output and z_i standard normals:

    u_0     = init_scale * z_start
    u_{i+1} = sum_p input_coef[i,p] u_{i-p} + sum_q output_coef[i,q] e_{i-q} + noise_coef[i] z_i

and u_R, after the last row, is the finished latents. Because u is in the UNet's own scaling, every scheduler has
u_i = alpha_i x0 + sigma_i eps, which previews, re-noising and bridges rest on. A run that starts part-way has a
shorter history, so its first rows differ: `starts` holds these warm-up rows, the rest is shared (docs/sampling.md).

Public: SamplerTable, load_tables(path) -> Mapping[(name, steps), SamplerTable], save_tables(path, tables).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular

MAX_INPUTS, MAX_OUTPUTS = 4, 5
MAX_STEPS, MAX_BYTES = 1000, 64 << 20
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow", "edm")
FORMAT = "edgesd-tables-1"


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows, f32: input_coef [W,P], output_coef [W,Q], noise_coef [W]; column 0 is the newest."""

    input_coef: np.ndarray
    output_coef: np.ndarray
    noise_coef: np.ndarray


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """One sampler at one step count; all arrays f32, R rows (a row is one UNet call per picture, guidance apart).

    timestep, alpha, sigma [R]; input_coef [R,P], output_coef [R,Q], noise_coef [R]; draws [R] bool: a z_i is drawn
    there, even where its coefficient is 0 (that keeps diffusers' draw order). order: rows per step, the stride of
    possible starts. starts: start row -> its warm-up rows.
    """

    name: str
    steps: int
    prediction_type: str
    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    input_coef: np.ndarray
    output_coef: np.ndarray
    noise_coef: np.ndarray
    draws: np.ndarray
    init_scale: float
    order: int = 1
    starts: Mapping[int, Rows] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.timestep)

    def coefficients(self, row: int, start: int = 0) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """input_coef [P], output_coef [Q], noise_coef of a row in a run that began at row `start`."""
        warm = self.starts[start] if start else self
        at = row - start
        rows, at = (warm, at) if at < len(warm.noise_coef) else (self, row)
        return rows.input_coef[at], rows.output_coef[at], rows.noise_coef[at]

    def x0_coefficients(self, row: int) -> tuple[np.float32, np.float32]:
        """(skip, out) with x0 = skip * u + out * e, the prediction of the clean latents."""
        a, s = float(self.alpha[row]), float(self.sigma[row])
        match self.prediction_type:
            case "epsilon":
                skip, out = 1 / a, -s / a
            case "v_prediction":
                skip, out = a, -s
            case "sample":
                skip, out = 0.0, 1.0
            case "flow":  # the output is eps - x0; u / (a + s) is the straight line between them
                skip, out = 1 / (a + s), -s / (a + s)
            case _:  # edm (Karras et al. 2022, eq. 7), whose sigma_data is sqrt(1 - s^2) / a in this scaling
                skip, out = (1 - s * s) / a, s * (1 - s * s) ** 0.5 / a
        return np.float32(skip), np.float32(out)

    def start_row(self, strength: float) -> int:
        """The row image-to-image starts at, as diffusers' `get_timesteps`: strength 0..1, 1 = from pure noise.

        Raises RequestError when strength is out of range or leaves no step to do.
        """
        if not 0 < strength <= 1:
            raise RequestError(f"strength {strength}", "above 0, at most 1", "Choose a strength in that range")
        done = self.steps - min(int(self.steps * strength), self.steps)
        if done >= self.steps:
            raise RequestError(f"strength {strength} with {self.steps} steps leaves no step",
                               f"at least {1 / self.steps:.3g}", "Raise the strength or the steps")  # fmt: skip
        return done * self.order


def possible_starts(rows: int, steps: int, order: int) -> range:
    """The rows a run may start at besides 0."""
    return range(order, min(rows, steps * order), order)


def save_tables(path: Path | str, tables: Iterable[SamplerTable]) -> None:
    """Writes tables of any samplers and step counts to one safetensors file; same tables, same bytes."""
    Path(path).write_bytes(dump_tables(tables))


def dump_tables(tables: Iterable[SamplerTable]) -> bytes:
    """The bytes of a table file. Per sampler, the arrays of all step counts lie end to end (docs/sampling.md)."""
    groups: dict[str, list[SamplerTable]] = {}
    for table in tables:
        groups.setdefault(table.name, []).append(table)
    arrays: dict[str, np.ndarray] = {}
    heads = {}
    for name, group in groups.items():
        group.sort(key=lambda table: table.steps)
        kinds, counts = {(t.prediction_type, t.order) for t in group}, {t.steps for t in group}
        if len(kinds) > 1 or len(counts) < len(group):
            raise RequestError(f"tables of {name} of two kinds or one step count twice", "one table per step count",
                               "Write them to two files")  # fmt: skip
        p, q = (max(getattr(t, key).shape[1] for t in group) for key in ("input_coef", "output_coef"))
        heads[name] = {"prediction_type": group[0].prediction_type, "order": group[0].order, "inputs": p, "outputs": q}
        warm = [rows for t in group for _, rows in sorted(t.starts.items())]
        parts: dict[str, np.ndarray] = {
            "steps": np.array([t.steps for t in group], np.int32),
            "rows": np.array([t.rows for t in group], np.int32),
            "init_scale": np.array([t.init_scale for t in group], np.float32),
            "draws": np.concatenate([t.draws for t in group]).astype(np.uint8),
            "input_coef": np.concatenate([_widen(t.input_coef, p) for t in group]),
            "output_coef": np.concatenate([_widen(t.output_coef, q) for t in group]),
            "warm_rows": np.array([len(rows.noise_coef) for rows in warm], np.uint8),
            "warm_coef": np.concatenate([np.empty(0, np.float32), *(_pack(rows, p, q) for rows in warm)]),
        }
        parts |= {key: np.concatenate([getattr(t, key) for t in group]) for key in _PER_ROW}
        arrays |= {f"{name}/{key}": value for key, value in parts.items()}
    # One metadata entry: safetensors writes several in any order, and the same tables must give the same bytes.
    return dump_tensors(arrays, {FORMAT: json.dumps(heads, sort_keys=True)})


_PER_ROW = ("timestep", "alpha", "sigma", "noise_coef")


def _widen(coef: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(coef, ((0, 0), (0, columns - coef.shape[1])))


def _pack(rows: Rows, p: int, q: int) -> np.ndarray:
    """Warm-up row k has seen k+1 inputs and outputs, so only that triangle is kept: inputs, outputs, noise."""
    wide = _widen(rows.input_coef, p), _widen(rows.output_coef, q)
    return np.concatenate(
        [np.r_[wide[0][k, : k + 1], wide[1][k, : k + 1], z].astype(np.float32) for k, z in enumerate(rows.noise_coef)]
        or [np.empty(0, np.float32)]
    )


def _unpack(flat: np.ndarray, count: int, p: int, q: int) -> Rows:
    rows = Rows(*(np.zeros(shape, np.float32) for shape in ((count, p), (count, q), (count,))))
    at = 0
    for k in range(count):
        i, o = min(k + 1, p), min(k + 1, q)
        rows.input_coef[k, :i], rows.output_coef[k, :o] = flat[at : at + i], flat[at + i : at + i + o]
        rows.noise_coef[k] = flat[at + i + o]
        at += i + o + 1
    return rows


def _packed_size(count: np.ndarray, p: int, q: int) -> np.ndarray:
    """Floats that `count` warm-up rows take."""
    sizes = np.cumsum([0] + [min(k + 1, p) + min(k + 1, q) + 1 for k in range(256)])
    return sizes[count]


def load_tables(path: Path | str) -> TableFile:
    """Reads a table file as a mapping (name, steps) -> SamplerTable. Raises DataError for anything malformed."""
    try:
        with open_regular(Path(path)) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _broken(f"the sampler tables do not read ({error.strerror})") from None
    return parse_tables(data)


def parse_tables(data: bytes) -> TableFile:
    """The same from bytes."""
    if len(data) > MAX_BYTES:
        raise _broken(f"sampler tables of more than {MAX_BYTES} bytes")
    try:
        arrays = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        heads = json.loads(header["__metadata__"][FORMAT])
        groups = {name: _Group(name, head, arrays) for name, head in heads.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(f"the sampler tables do not parse ({type(error).__name__}: {str(error)[:120]})") from None
    if not groups:
        raise _broken(f"the file holds no sampler tables of format {FORMAT}")
    return TableFile(groups)


def _broken(came: str) -> DataError:
    return DataError(came, "what docs/sampling.md describes", "Get the bundle again, or package the model again")


class TableFile(Mapping[tuple[str, int], SamplerTable]):
    """The tables of one file, made when asked for."""

    def __init__(self, groups: dict[str, _Group]) -> None:
        self._groups = groups

    def __getitem__(self, key: tuple[str, int]) -> SamplerTable:
        name, steps = key
        return self._groups[name].table(steps)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return ((name, int(steps)) for name, group in self._groups.items() for steps in group.parts["steps"])

    def __len__(self) -> int:
        return sum(len(group.parts["steps"]) for group in self._groups.values())


_DTYPES: dict[str, type] = {"steps": np.int32, "rows": np.int32, "init_scale": np.float32, "draws": np.uint8,
           "input_coef": np.float32, "output_coef": np.float32, "warm_rows": np.uint8, "warm_coef": np.float32,
           **dict.fromkeys(_PER_ROW, np.float32)}  # fmt: skip


class _Group:
    """One sampler's arrays, checked whole on construction (ValueError says what is wrong)."""

    def __init__(self, name: str, head: dict, arrays: Mapping[str, np.ndarray]) -> None:
        self.name, self.prediction_type, self.order = name, head["prediction_type"], head["order"]
        self.p, self.q = head["inputs"], head["outputs"]
        self.parts = {key: arrays[f"{name}/{key}"] for key in _DTYPES}
        for ok, what in self._checks():
            if not ok:
                raise ValueError(f"{name[:64]}: {what}")

    def _checks(self) -> Iterator[tuple[bool, str]]:
        """Lazily, so that each check may rely on those before it."""
        part = self.parts
        yield self.prediction_type in PREDICTION_TYPES, "prediction type"
        sizes = (self.order, self.p, self.q)
        yield all(type(n) is int for n in sizes) and 1 <= self.order <= 4, "order"
        yield 1 <= self.p <= MAX_INPUTS and 1 <= self.q <= MAX_OUTPUTS, "more past inputs or outputs than allowed"
        yield all(part[key].dtype == dtype for key, dtype in _DTYPES.items()), "an array's type"
        yield all(np.isfinite(array).all() for array in part.values()), "numbers that are not finite"
        steps, rows = part["steps"], part["rows"]
        yield steps.ndim == 1 and 1 <= len(steps) <= MAX_STEPS and rows.shape == steps.shape, "steps and rows"
        yield bool(steps[0] >= 1 and steps[-1] <= MAX_STEPS and (np.diff(steps) > 0).all()), "step counts must rise"
        yield bool((rows >= 1).all() and (rows <= 8 * MAX_STEPS).all()), "row counts"
        total = int(rows.sum())
        yield part["init_scale"].shape == steps.shape, "init_scale"
        yield all(part[key].shape == (total,) for key in (*_PER_ROW, "draws")), "an array's length"
        yield part["input_coef"].shape == (total, self.p), "a band's shape"
        yield part["output_coef"].shape == (total, self.q), "a band's shape"
        yield bool((part["draws"] <= 1).all() and (part["alpha"] >= 0).all() and (part["sigma"] >= 0).all()), "a sign"
        yield bool((part["alpha"] + part["sigma"] > 0).all()), "a row without signal and noise"
        yield self.prediction_type != "epsilon" or bool((part["alpha"] > 0).all()), "alpha 0 with epsilon prediction"
        counts = [len(possible_starts(int(r), int(n), self.order)) for r, n in zip(rows, steps, strict=True)]
        yield part["warm_rows"].shape == (sum(counts),), "the number of starts"
        packed = _packed_size(part["warm_rows"], self.p, self.q)
        yield part["warm_coef"].shape == (int(packed.sum()),), "the number of warm-up coefficients"
        self._row_at = np.r_[0, np.cumsum(rows)]
        self._start_at = np.r_[0, np.cumsum(counts)]
        self._coef_at = np.r_[0, np.cumsum(packed)]
        room = [r - s for r, n in zip(rows, steps, strict=True) for s in possible_starts(int(r), int(n), self.order)]
        yield bool((part["warm_rows"] <= np.array(room, int)).all()), "a warm-up longer than its run"

    def table(self, steps: int) -> SamplerTable:
        part = self.parts
        at = int(np.searchsorted(part["steps"], steps))
        if at == len(part["steps"]) or part["steps"][at] != steps:
            raise KeyError((self.name, steps))
        rows = slice(self._row_at[at], self._row_at[at + 1])
        # A short run has a shorter memory than its sampler's widest band: columns it never uses are left off again.
        band = [part[key][rows] for key in ("input_coef", "output_coef")]
        p, q = (max(1, *(np.flatnonzero(coef.any(axis=0)) + 1)) if coef.any() else 1 for coef in band)
        starts = {}
        for number, start in enumerate(possible_starts(int(part["rows"][at]), steps, self.order), self._start_at[at]):
            flat = part["warm_coef"][self._coef_at[number] : self._coef_at[number + 1]]
            warm = _unpack(flat, int(part["warm_rows"][number]), self.p, self.q)
            starts[start] = Rows(warm.input_coef[:, :p], warm.output_coef[:, :q], warm.noise_coef)
        return SamplerTable(
            name=self.name, steps=steps, prediction_type=self.prediction_type, order=self.order, starts=starts,
            init_scale=float(part["init_scale"][at]), draws=part["draws"][rows].astype(bool),
            input_coef=band[0][:, :p], output_coef=band[1][:, :q],
            **{key: part[key][rows] for key in _PER_ROW},
        )  # fmt: skip
