"""The cumulative ablation's report, from invented blocks; nothing is drawn."""

import json

import ablation
import pytest


@pytest.fixture
def work(tmp_path):
    def block(name, index, right, seconds, peak):
        path = ablation.block_file(tmp_path, name, index)
        path.parent.mkdir(exist_ok=True)
        told = {"right": [True] * right + [False] * (32 - right), "seconds": [seconds] * 32}
        told |= {"calls": [40] * 32, "peak_bytes": peak}
        path.write_text(json.dumps(told))

    for index in range(2):
        block("peer", index, 24, 2.0 * (index + 1), 10**9)
        block("bundle", index, 16, 0.5 * (index + 1), 10**8)
    block("bundle", 2, 0, 9.0, 9**9)  # a block that the line before it has not drawn yet
    return tmp_path


def test_lines_are_held_against_the_one_they_add_to_over_blocks_of_both(work):
    peer, bundle = ablation.rows(work)
    assert (peer["captions"], bundle["captions"]) == (64, 64)
    assert (peer["alignment"], bundle["alignment"], bundle["difference"]) == (0.75, 0.5, -0.25)
    assert bundle["interval"][1] < 0
    assert bundle["seconds"] == {"median": 0.75, "min": 0.5, "max": 1.0, "runs": 2}
    assert "difference" not in peer
    assert "| 4.00 x |" in ablation.table([peer, bundle])


def test_every_line_adds_to_one_before_it():
    names = list(ablation.LINES)
    assert all(line.after is None or line.after in names[: names.index(name)] for name, line in ablation.LINES.items())
    folders = {
        line.flags: ablation.bundle_folder(ablation.DOCS, line) for line in ablation.LINES.values() if line.flags
    }
    assert len(set(folders.values())) == len(folders)
