"""Statistics, tables and plots from a bench.json; its figures are invented."""

import json

import pytest
import tables

from edgesd.errors import RequestError


def by_name(rows):
    return {row["name"]: row for row in rows}


def test_a_ratio_is_made_within_its_round(data):
    rows = by_name(tables.compared(data, "unet"))
    row = rows["edgesd-openvino-int8-p25"]
    assert row["ratio"] == {"median": 10.0, "min": 10.0, "max": 10.0, "runs": 2}  # though one round was twice as slow
    assert (row["seconds"]["median"], row["seconds"]["min"], row["seconds"]["runs"]) == (0.8, 0.4, 6)
    assert rows["diffusers-fp32"]["ratio"]["median"] == 1.0


def test_a_round_that_only_one_was_in_makes_no_ratio(data):
    data["visits"] = [v for v in data["visits"] if (v["name"], v["round"]) != ("diffusers-fp32", 1)]
    row = by_name(tables.compared(data, "unet"))["edgesd-openvino-int8-p25"]
    assert (row["ratio"]["runs"], row["seconds"]["runs"]) == (1, 6)


def test_what_failed_keeps_its_row_and_its_reason(data):
    assert by_name(tables.compared(data, "unet"))["genai-native"]["failed"] == "ImportError: no such | thing"
    made = {"part": "make", "name": "optimum-fp16", "options": {}, "round": 0, "failed": "no network"}
    data["visits"].append(made)
    row = by_name(tables.compared(data, "unet"))["genai-native"]
    assert row["failed"] == "optimum-fp16 was not made: no network"
    text = tables.markdown(data)
    line = next(line for line in text.splitlines() if "openvino-genai" in line)
    assert "no network" in line


def test_the_goals_are_judged_by_the_median_and_empty_ones_say_so(data):
    found = tables.goals(data)
    verdicts = [g["verdict"] for g in found]
    assert verdicts == ["met", "met", "not met", "not measured"]
    assert found[1]["figure"]["median"] == 2.0
    # 200 Gops a call in 0.5 s and 1 s, with 1000 and 500 Gops as the limit, whose median is 750
    assert found[2]["figure"]["max"] == pytest.approx(200 / 0.5 / 750)


def test_goals_are_for_the_model_and_size_they_were_set_for(data):
    data["settings"]["size_px"] = [256, 256]
    assert [g["verdict"] for g in tables.goals(data)] == ["met", "met", "not met"]  # the memory goal is for 512 px
    data["settings"]["model_name"] = "small"
    assert tables.goals(data) == []
    assert "## Goals" not in tables.markdown(data)


def test_memory_is_a_goal_to_stay_below(data):
    one = {"part": "picture", "name": "edgesd-openvino-frugal", "options": {}, "round": 0, "seconds": [1.0],
           "first_s": 1.0, "cold_s": 1.0, "load_s": 1.0, "peak_bytes": 1_100_000_000, "bytes": 5}  # fmt: skip
    data["visits"].append(one)
    assert tables.goals(data)[3]["verdict"] == "met"
    one["peak_bytes"] = 1_300_000_000
    assert tables.goals(data)[3]["verdict"] == "not met"


def test_packaging_is_compared_pair_by_pair(data):
    def made(name, seconds, peak):
        return {"part": "package", "name": name, "options": {}, "round": 0, "wall_s": seconds, "peak_bytes": peak}

    data["visits"] += [made("optimum-fp16", 90.0, 8 * 10**9), made("edgesd-openvino-fp16", 60.0, 2 * 10**9)]
    data["visits"].append({**made("optimum-hybrid", 0, 0), "failed": "no data set"})
    pair, half = tables.packaged(data)
    assert (pair["time_ratio"]["median"], pair["memory_ratio"]["median"]) == (1.5, 4.0)
    assert (half["theirs_failed"], half["time_ratio"]) == ("no data set", None)
    assert half["ours_failed"] == "not reached yet"
    assert [g["verdict"] for g in tables.goals(data)[4:]] == ["not met", "met", "not measured", "not measured"]


def test_points_of_a_curve_keep_their_axis(data):
    for value, seconds in ((4, 1.0), (8, 2.0)):
        data["visits"].append({"part": "scaling", "name": "diffusers-fp32", "options": {"steps": value}, "round": 0,
                               "seconds": [seconds], "first_s": 1.0, "peak_bytes": 5})  # fmt: skip
    data["visits"].append({"part": "scaling", "name": "diffusers-fp32", "options": {}, "round": 0, "failed": "why"})
    points = tables.curves(data)
    assert [(p["axis"], p["value"]) for p in points] == [("steps", 4), ("steps", 8), ("size_px", [512, 512])]
    assert points[1]["seconds"]["median"] == 2.0
    assert points[2]["failed"] == "why"


def test_a_bar_in_a_cell_does_not_end_it():
    assert tables.table(("a",), [("x | y",)])[-1] == "| x \\| y |"


def test_report_writes_tables_and_plots_from_the_json_alone(data, tmp_path):
    pytest.importorskip("matplotlib")
    import bench

    (tmp_path / "bench.json").write_text(json.dumps(data))
    sample = {"at_s": 10.0, "seconds_per_step": None, "celsius": 50.0, "battery": None}
    run = {"bundle": "b", "device": "d", "samples": [sample, sample | {"seconds_per_step": 1.0}]}
    (tmp_path / "phone.json").write_text(json.dumps(run))
    asked = bench.arguments().parse_args(
        ["report", str(tmp_path), "-o", str(tmp_path / "out"), "--sustained", str(tmp_path / "phone.json")]
    )
    assert bench.report(asked) == 0
    text = (tmp_path / "out/bench.md").read_text()
    assert "10.00 x" in text
    assert "random weights" in text
    for plot in ("bench_unet", "bench_sustained"):
        assert (tmp_path / f"out/{plot}.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bench.json").write_text(json.dumps({"format": "edgesd-bench-9"}))
    with pytest.raises(RequestError, match="edgesd-bench-9"):
        bench.report(asked)


def test_another_machine_or_settings_want_another_folder(tmp_path, data):
    import bench

    facts = {"settings": data["settings"], "machine": data["machine"], "versions": {"own": {"torch": "1"}, "peers": {}}}
    bench.same_run(tmp_path, facts)
    bench.same_run(tmp_path, facts | {"versions": {"own": {"torch": "1"}, "peers": {"torch": "1"}}})
    other = facts | {"versions": {"own": {"torch": "2"}, "peers": {"torch": "1"}}}
    with pytest.raises(RequestError, match=r"versions\.own"):
        bench.same_run(tmp_path, other)
    with pytest.raises(RequestError, match=r"settings\.steps"):
        bench.same_run(tmp_path, facts | {"settings": data["settings"] | {"steps": 9}, "versions": {"peers": {}}})


def test_names_that_are_none_are_refused(capsys):
    import bench

    parser = bench.arguments()
    assert parser.parse_args(["measure", "w", "--parts", "unet,loop"]).parts == ["unet", "loop"]
    with pytest.raises(SystemExit):
        parser.parse_args(["measure", "w", "--contenders", "nobody"])
    assert "is none of" in capsys.readouterr().err
