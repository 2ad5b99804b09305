"""The table file: exact round trips, its size, and files that mean harm."""

import base64
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from edgesd.errors import DataError, EdgesdError, RequestError
from edgesd.runtime.loop import run
from edgesd.runtime.table import FORMAT, Rows, SamplerTable, dump_tables, load_tables, parse_tables, save_tables

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())
DATA = base64.b64decode(GOLDEN["file_base64"])


def table_from_json(entry: dict) -> SamplerTable:
    def array(key, value):
        return np.array(value, bool if key == "draws" else np.float32)

    plain = {k: array(k, v) if isinstance(v, list) else v for k, v in entry.items() if k != "starts"}
    plain["init_scale"] = float(np.float32(plain["init_scale"]))
    starts = {}
    for start, rows in entry["starts"].items():
        coefs = {k: array(k, v) for k, v in rows.items()}
        count, wide = len(coefs["noise_coef"]), {k: np.shape(plain[k])[1] for k in ("input_coef", "output_coef")}
        starts[int(start)] = Rows(**{k: v.reshape(count, wide[k]) if k in wide else v for k, v in coefs.items()})
    return SamplerTable(**plain, starts=starts)


TABLES = [table_from_json(entry) for entry in GOLDEN["tables"]]


def assert_same(a: SamplerTable, b: SamplerTable) -> None:
    for field in fields(SamplerTable):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=f"{a.name} {field.name}")
        elif field.name != "starts":
            assert x == y, field.name
    assert list(a.starts) == list(b.starts)
    for start in a.starts:
        for field in fields(Rows):
            np.testing.assert_array_equal(getattr(a.starts[start], field.name), getattr(b.starts[start], field.name))


def test_a_loaded_table_equals_the_compiled_one_bit_for_bit(tmp_path):
    save_tables(tmp_path / "tables.safetensors", TABLES)
    loaded = load_tables(tmp_path / "tables.safetensors")
    assert set(loaded) == {(t.name, t.steps) for t in TABLES}
    for table in TABLES:
        assert_same(loaded[table.name, table.steps], table)
    with pytest.raises(KeyError):
        loaded["ddim", 3]
    with pytest.raises(KeyError):
        loaded["no_such", 4]


def test_the_golden_file_reads_the_same_and_is_written_the_same():
    loaded = parse_tables(DATA)
    for table in TABLES:
        assert_same(loaded[table.name, table.steps], table)
    assert dump_tables(TABLES) == dump_tables(TABLES[::-1]) == DATA


def test_tables_compiled_today_are_the_golden_ones():
    pytest.importorskip("diffusers")
    from make_golden import SD
    from make_golden import TABLES as WHICH

    from edgesd.sampling.compile import compile_table

    for (name, steps, config), want in zip(WHICH, TABLES, strict=True):
        got = compile_table(name, {**({} if "_class_name" in config else SD), **config}, steps)
        for key in ("timestep", "alpha", "sigma", "input_coef", "output_coef", "noise_coef"):
            np.testing.assert_allclose(getattr(got, key), getattr(want, key), rtol=1e-5, atol=1e-6, err_msg=name)


def test_three_samplers_at_every_step_count_fit_in_400_kb(tmp_path):
    pytest.importorskip("diffusers")
    from samplers import SD

    from edgesd.sampling.compile import compile_tables

    tables = [t for name in ("dpmpp_2m_karras", "euler_a", "unipc") for t in compile_tables(name, SD, range(1, 51))]
    data = dump_tables(tables)
    assert len(data) <= 400_000
    loaded = parse_tables(data)
    assert len(loaded) == 150
    for table in tables[::7]:
        assert_same(loaded[table.name, table.steps], table)


def changed(**parts):
    """The golden file with arrays (name with __ for /) or the head replaced."""
    arrays = load_tensors(DATA)
    head = json.loads(DATA[8 : 8 + int.from_bytes(DATA[:8], "little")])["__metadata__"]
    heads = json.loads(head[FORMAT])
    for key, change in parts.items():
        sampler, _, part = key.partition("__")
        if part in heads[sampler]:
            heads[sampler][part] = change
        else:
            arrays[f"{sampler}/{part}"] = change(arrays[f"{sampler}/{part}"].copy())
    return dump_tensors(arrays, {FORMAT: json.dumps(heads)})


def put(index, value):
    def change(array):
        array.flat[index] = value
        return array

    return change


@pytest.mark.parametrize("hostile", [
    lambda: b"", lambda: DATA[:100], lambda: DATA[:-4], lambda: b"\xff" * 64, lambda: dump_tensors({}),
    lambda: dump_tensors({"a": np.zeros(3)}, {FORMAT: "[]"}),
    lambda: dump_tensors({"a": np.zeros(3)}, {FORMAT: "{}"}),
    lambda: dump_tensors(load_tensors(DATA), {"edgesd-tables-2": "{}"}),
    lambda: changed(ddim__timestep=put(1, np.nan)), lambda: changed(ddim__input_coef=put(0, np.inf)),
    lambda: changed(pndm__warm_coef=put(2, np.nan)), lambda: changed(ddim__init_scale=put(0, np.nan)),
    lambda: changed(ddim__rows=put(0, 5)), lambda: changed(ddim__rows=put(0, -1)),
    lambda: changed(ddim__rows=put(0, 2**31 - 1)),
    lambda: changed(dpmpp_2m_karras__steps=lambda a: a[::-1].copy()), lambda: changed(ddim__steps=put(0, 0)),
    lambda: changed(ddim__steps=put(0, 2000)), lambda: changed(ddim__steps=lambda a: a.astype(np.float32)),
    lambda: changed(ddim__steps=lambda a: a.reshape(1, 1)), lambda: changed(ddim__steps=lambda a: a[:0]),
    lambda: changed(ddim__alpha=lambda a: a[:-1]), lambda: changed(ddim__alpha=put(0, -1)),
    lambda: changed(ddim__alpha=put(0, 0)), lambda: changed(ddim__draws=put(0, 2)),
    lambda: changed(pndm__warm_rows=put(0, 200)), lambda: changed(pndm__warm_rows=lambda a: a[:-1]),
    lambda: changed(pndm__warm_coef=lambda a: a[:-1]), lambda: changed(unipc_3__warm_rows=put(-1, 3)),
    lambda: changed(ddim__input_coef=lambda a: a.reshape(2, 2)),
    lambda: changed(ddim__output_coef=lambda a: a.astype(np.float64)),
    lambda: changed(ddim__prediction_type="magic"), lambda: changed(ddim__order=0), lambda: changed(ddim__order=True),
    lambda: changed(ddim__inputs=5), lambda: changed(ddim__outputs=0), lambda: changed(ddim__inputs=1.0),
    lambda: changed(ddim__order=2), lambda: changed(ddim__prediction_type=["epsilon"]),
])  # fmt: skip
def test_broken_and_hostile_files_are_data_errors(hostile, tmp_path):
    path = tmp_path / "tables.safetensors"
    path.write_bytes(hostile())
    with pytest.raises(DataError) as caught:
        load_tables(path)
    assert len(str(caught.value)) < 600


def test_what_is_no_file_is_a_data_error(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError):
            load_tables(path)


@given(st.integers(0, len(DATA) - 1), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_any_flipped_byte_is_refused_or_still_runs(at, byte):
    data = DATA[:at] + bytes([byte]) + DATA[at + 1 :]
    try:
        loaded = parse_tables(data)
        tables = [loaded[key] for key in loaded]
    except DataError:
        return
    u = np.ones((1, 1, 2, 2), np.float32)
    with np.errstate(all="ignore"):
        for table in tables:
            for start in (0, *list(table.starts)[:1]):
                assert len(list(run(table, lambda u, row: u, u, lambda row: u, start))) == table.rows - start


def test_one_sampler_in_two_kinds_is_not_written():
    for other in (TABLES[0], replace(TABLES[0], steps=9, prediction_type="sample")):
        with pytest.raises(EdgesdError):
            dump_tables([TABLES[0], other])


def test_x0_coefficients_undo_every_prediction_type():
    """(skip, out) must give x0 back from u = alpha x0 + sigma eps and what a model of that type says."""
    x0, eps = 0.7, -1.3
    base = TABLES[0]
    for a, s in ((0.8, 0.6), (0.1, np.sqrt(0.99))):
        table = replace(base, alpha=np.float32([a]), sigma=np.float32([s]))
        u = a * x0 + s * eps
        for kind, says in (("epsilon", eps), ("v_prediction", a * eps - s * x0), ("sample", x0)):
            skip, out = replace(table, prediction_type=kind).x0_coefficients(0)
            assert skip * u + out * says == pytest.approx(x0, abs=1e-5)
    flow = replace(base, prediction_type="flow", alpha=np.float32([0.3]), sigma=np.float32([0.7]))
    skip, out = flow.x0_coefficients(0)
    assert skip * (0.3 * x0 + 0.7 * eps) + out * (eps - x0) == pytest.approx(x0, abs=1e-6)
    data, noise = 0.5, 2.0  # Karras et al. 2022, table 1: D = c_skip x + c_out F, and u = c_in x
    c_in = 1 / np.hypot(noise, data)
    edm = replace(base, prediction_type="edm", alpha=np.float32([c_in]), sigma=np.float32([noise * c_in]))
    skip, out = edm.x0_coefficients(0)
    assert skip * c_in == pytest.approx(data**2 / (noise**2 + data**2), rel=1e-5)
    assert out == pytest.approx(noise * data / np.hypot(noise, data), rel=1e-5)


def test_a_start_that_is_no_row_is_refused():
    heun = next(t for t in TABLES if t.name == "heun")
    u = np.ones((1, 1, 2, 2), np.float32)
    for start in (1, 3, 99, -1):
        with pytest.raises(RequestError, match="start"):
            list(run(heun, lambda u, row: u, u, lambda row: u, start))
