"""benchmarks/alignment.py: rows are told apart, blocks are not drawn twice, and figures reach alignment.json."""

import importlib.util
import json
from pathlib import Path

import pytest

from edgesd.errors import RequestError

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "alignment.py"
spec = importlib.util.spec_from_file_location("alignment", SCRIPT)
alignment = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alignment)
Row = alignment.Row


def line(row, caption, right):
    return json.dumps(row.told() | {"caption": caption, **dict.fromkeys(alignment.PARTS, right)}) + "\n"


def test_rows_are_read_and_written_alike():
    assert alignment.parse_row("15:1>0.75@0.5/0.8") == Row(15, 1.0, 0.8, (0.5, 0.75))
    for row in (Row(20), Row(15, 0.5), Row(15, 1.0, 1.0, (0.4, 0.5))):
        assert alignment.row_of(json.loads(json.dumps(row.told()))) == row
    assert alignment.parse_block("32:64") == range(32, 64)
    with pytest.raises(RequestError, match="row 'wide'"):
        alignment.parse_row("wide")


def test_only_what_is_missing_is_drawn(tmp_path, monkeypatch):
    out, drawn = tmp_path / "lines.jsonl", []
    out.write_text(line(Row(20), 2, True))
    monkeypatch.setattr(alignment, "resolve", lambda spec, caption, **given: given)

    def sample(pipeline, settings, cache):
        drawn.append((settings["num_inference_steps"], settings["seed"]))
        yield alignment.Picture(None, None, None, 0, 0, (), ())

    verdict = {part: True for part in alignment.PARTS[1:]}
    monkeypatch.setattr(alignment, "sample", sample)
    monkeypatch.setattr(alignment, "judge", lambda *_: verdict)
    monkeypatch.setattr(alignment, "asdict", dict)
    pipeline = type("Pipeline", (), {"spec": None})
    alignment.measure(pipeline, [Row(20), Row(15)], range(1, 3), out)
    assert drawn == [(20, 1), (15, 1), (15, 2)]
    alignment.measure(pipeline, [Row(20), Row(15)], range(3), out)
    assert drawn[3:] == [(20, 0), (15, 0)]


def test_a_summary_compares_pairwise_and_replaces_what_saw_fewer_captions(tmp_path):
    one, two, into = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "alignment.json"
    narrow = Row(20, 0.5)
    one.write_text("".join(line(Row(20), i, True) for i in range(4)))
    two.write_text("".join(line(narrow, i, i > 1) for i in range(4)) + line(Row(15), 0, False))
    told = {alignment.row_of(entry): entry for entry in alignment.summary([one, two])}
    assert (told[narrow]["all"], told[narrow]["difference"], told[narrow]["captions"]) == (0.5, -0.5, 4)
    measured = [Row(15).told() | {"captions": 128, "all": 0.7}, Row(20).told() | {"all": 0.1},
                Row(20, 0.75).told() | {"all": 0.6}]  # fmt: skip
    into.write_text(json.dumps({"model": "shapes", "measured": measured}))
    alignment.merge(list(told.values()), into)
    now = {alignment.row_of(e): e["all"] for e in json.loads(into.read_text())["measured"]}
    assert now == {Row(20): 1.0, narrow: 0.5, Row(15): 0.7, Row(20, 0.75): 0.6}
