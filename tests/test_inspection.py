import json
import os

import pytest
from rich.console import Console

from edgesd import diagnosis, inspection, sheet
from edgesd.errors import DataError, RequestError, SetupError


def shown(found, width=160):
    json.dumps(found.to_json(), allow_nan=False)
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(found.table())
    return console.export_text()


def test_inspect_shows_every_variant_and_counts_operations(small_bundle):
    found = inspection.inspect(small_bundle)
    data = found.to_json()
    assert len(data["variants"]) == 9
    unet = next(v for v in data["variants"] if v["component"] == "unet")
    assert unet["operations"] == {"Conv": {"float32": 3}, "MatMul": {"float32": 2, "int8": 1}}
    assert (unet["params"], unet["macs"], unet["bytes"]) == (12, 34, 2)
    assert data["bytes"] == sum(p.stat().st_size for p in small_bundle.rglob("*") if p.is_file()) - (
        (small_bundle / "manifest.json").stat().st_size
    )
    assert data["samplers"] == [{"name": "dpmpp_2m_karras", "steps": [2, 3], "counts": 2}]
    text = shown(found)
    assert "fp32 2 rows" in text
    assert "MatMul 1 int8" in text
    assert "Apache-2.0" in text


def test_inspect_without_the_targets_packages_shows_the_rest(small_bundle, fake_target, monkeypatch):
    monkeypatch.setattr(fake_target, "modules", ("a_package_that_is_not_there",))
    found = inspection.inspect(small_bundle)
    assert {v["operations"] is None for v in found.to_json()["variants"]} == {True}
    assert "operations not counted" in shown(found)


def test_bench_measures_in_a_child(fake_target, tmp_path):
    idle = {name: [(fake_target.FP32, {"idle": True})] for name in fake_target.COMPONENTS}
    found = inspection.bench(fake_target.make(tmp_path / "idle.edgesd", idle), runs=2, threads=1)
    data = found.to_json()
    assert set(data["components"]) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    for figures in (*data["components"].values(), data["cold_load"], data["warm_load"]):
        assert 0 < figures["min"] <= figures["median"] <= figures["max"]
        assert figures["runs"] == 2
    assert data["peak_memory_bytes"] > 20 << 20
    assert data["options"] == {"threads": 1}
    assert "unet, a call" in shown(found)


def test_bench_refuses_figures_that_mean_nothing(small_bundle, fake_target, monkeypatch):
    monkeypatch.setattr(fake_target, "speed_is_meaningful", lambda: False, raising=False)
    with pytest.raises(SetupError, match="says nothing about its speed"):
        inspection.bench(small_bundle)


def test_bench_wants_a_run_and_a_bundle(small_bundle, tmp_path):
    with pytest.raises(RequestError, match="0 runs"):
        inspection.bench(small_bundle, runs=0)
    with pytest.raises(DataError, match="unfinished"):
        inspection.bench(tmp_path)


def test_doctor_knows_what_is_here_and_what_brings_the_rest(fake_target, monkeypatch):
    present = diagnosis._installed
    monkeypatch.setattr(diagnosis, "_installed", lambda name: None if name == "openvino" else present(name))
    monkeypatch.setattr(fake_target, "modules", ("a_package_that_is_not_there",))
    found = inspection.doctor()
    data = found.to_json()
    assert data["extras"]["openvino"] == {
        "installed": False,
        "missing": ["openvino"],
        "install": 'pip install "edgesd[openvino]"',
    }
    assert data["packages"]["numpy"] == present("numpy")
    assert {"onnx-web", "openvino", "tflite", "coreml", "fake"} <= set(data["targets"])
    assert not data["targets"]["fake"]["open"]
    assert "pip install" in data["targets"]["fake"]["needs"]
    assert data["memory"]["free_bytes"] <= data["memory"]["bytes"]
    assert 'pip install "edgesd[openvino]"' in shown(found)


def test_a_plug_in_that_breaks_does_not_break_doctor(fake_target, monkeypatch):
    def broken():
        raise RuntimeError("half an SDK")

    monkeypatch.setattr(fake_target, "runtime_version", broken)
    assert "half an SDK" in inspection.doctor().to_json()["targets"]["fake"]["needs"]


def test_samplers_lists_unet_calls():
    found = inspection.samplers(7)
    by_name = {one["name"]: one for one in found.to_json()["samplers"]}
    assert by_name["ddim"]["calls"] == 7
    assert by_name["euler_a"]["stochastic"]
    assert "karras" in next(line for line in shown(found).splitlines() if line.startswith("dpmpp_2m "))


def test_names_from_a_bundle_are_text_never_markup():
    found = sheet.Sheet({}, (sheet.Section("[red]t[/red]", ("[b]c[/b]",), (("[link=x]y[/link]",),)),))
    text = shown(found)
    assert "[red]t[/red]" in text
    assert "[link=x]y[/link]" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_900, "1.0 MB"), (13_200_000, "13.2 MB"),
                        (5_000_000_000, "5.00 GB"), (250_000, "250 kB")],
)  # fmt: skip
def test_sizes_for_people(count, text):
    assert sheet.size(count) == text
