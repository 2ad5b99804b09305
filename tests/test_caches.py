"""What is kept between runs is counted, limited and cleared; other files stay."""

from edgesd import caches
from edgesd.runtime.cache import add_tally
from edgesd.stages import Stages, key


def test_cache_counts_and_clears(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))
    Stages().run(key("tables", 1), lambda folder: (folder / "made").write_bytes(b"x" * 500))
    (tmp_path / "cache/prompts").mkdir()
    (tmp_path / "cache/prompts/one.safetensors").write_bytes(b"x" * 70)
    add_tally(tmp_path / "cache/prompts", {"hits": 3, "misses": 1})
    other = tmp_path / "cache/not-ours.txt"
    other.write_text("kept")
    kept = caches.cache().to_json()["caches"]
    assert kept["stages"] == {"entries": 1, "bytes": 500, "max_bytes": 20 << 30}
    assert kept["prompts"] == {
        "entries": 1, "bytes": 70, "max_bytes": 256 << 20, "hits": 3, "misses": 1, "hit_rate": 0.75
    }  # fmt: skip
    assert kept["pictures"]["hit_rate"] is None
    (section,) = caches.cache().sections
    assert ["3 of 4 (75%)" in row for row in section.rows] == [False, True, False, False]
    assert caches.cache(clear=True).to_json()["caches"] == kept
    after = caches.cache().to_json()["caches"]
    assert {one["bytes"] for one in after.values()} == {0}
    assert after["prompts"]["hit_rate"] is None
    assert other.exists()
