"""What is kept, what goes first, and what happens when the disk lies."""

import os

import numpy as np
import pytest

from edgesd.runtime.cache import TALLY, PromptCache, hit_rate, prompt_key, tally


def states(value: float = 1.0, count: int = 256) -> np.ndarray:
    return np.full((1, count // 4, 4), value, np.float32)


def never() -> np.ndarray:
    raise AssertionError("computed again")


def key(text: str) -> str:
    return prompt_key("model", "text_encoder", text)


def test_a_prompt_is_encoded_once():
    cache = PromptCache()
    first = cache.get(key("a"), states)
    assert cache.get(key("a"), never) is first
    assert cache.stats() == {
        "hits": 1, "misses": 1, "hit_rate": 0.5, "dropped": 0, "unsaved": 0, "entries": 1, "bytes": 1024
    }  # fmt: skip
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


def test_the_caller_keeps_its_own_array():
    mine = states()
    kept = PromptCache().get(key("a"), lambda: mine)
    mine[:] = 7
    assert (kept == 1).all()


def test_keys_tell_models_components_and_texts_apart():
    keys = {prompt_key(*parts) for parts in (("m", "c", "t"), ("m", "ct", ""), ("mc", "", "t"), ("m", "c", "t "))}
    assert len(keys) == 4


def test_least_recently_used_goes_first():
    cache = PromptCache(max_bytes=2 * 1024)
    for text in ("a", "b"):
        cache.get(key(text), states)
    cache.get(key("a"), never)
    cache.get(key("c"), states)
    assert cache.stats()["bytes"] == 2048
    cache.get(key("a"), never)
    cache.get(key("b"), lambda: states(2))
    assert cache.stats()["misses"] == 4


def test_an_entry_beyond_the_limit_is_given_but_not_kept():
    cache = PromptCache(max_bytes=1000)
    assert (cache.get(key("a"), states) == 1).all()
    assert cache.stats()["entries"] == 0
    assert (PromptCache(max_bytes=0).get(key("a"), states) == 1).all()


def test_hits_are_counted_over_all_runs(tmp_path):
    for expected in ((0, 1), (1, 1), (2, 1)):
        cache = PromptCache(folder=tmp_path)
        cache.get(key("a"), states)
        cache.close()
        assert tally(tmp_path) == expected
    for broken in (b"{", b"[]", b'{"hits": -1, "misses": 0}', b'{"hits": true, "misses": 0}', b" " * 5000):
        (tmp_path / TALLY).write_bytes(broken)
        assert tally(tmp_path) == (0, 0)
    assert (hit_rate(1, 2), hit_rate(0, 0)) == (0.3333, None)


def test_the_folder_outlives_the_process(tmp_path):
    folder = tmp_path / "deep" / "prompts"
    PromptCache(folder=folder).get(key("a"), states)
    later = PromptCache(folder=folder)
    assert (later.get(key("a"), never) == states()).all()
    assert later.stats()["hits"] == 1
    assert [p.suffix for p in folder.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:-5], lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: b"\xff" * 200]
)
def test_a_broken_file_is_dropped_and_made_anew(tmp_path, damage):
    PromptCache(folder=tmp_path).get(key("a"), states)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    cache = PromptCache(folder=tmp_path)
    assert (cache.get(key("a"), states) == states()).all()
    assert cache.stats()["dropped"] == cache.stats()["misses"] == 1
    assert (PromptCache(folder=tmp_path).get(key("a"), never) == states()).all()


def test_a_file_under_anothers_name_is_not_believed(tmp_path):
    PromptCache(folder=tmp_path).get(key("a"), states)
    (file,) = tmp_path.iterdir()
    file.rename(tmp_path / f"{key('b')}.safetensors")
    assert (PromptCache(folder=tmp_path).get(key("b"), lambda: states(2)) == 2).all()


def test_the_folder_stays_within_its_limit(tmp_path):
    cache = PromptCache(folder=tmp_path, max_disk_bytes=3000)
    for age, text in enumerate("abcd"):
        cache.get(key(text), states)
        for file in tmp_path.iterdir():
            if file.name.startswith(key(text)):
                os.utime(file, (1000 + age, 1000 + age))
    assert {p.stem for p in tmp_path.iterdir()} == {key("c"), key("d")}


def test_a_folder_that_cannot_be_written_costs_no_picture(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = PromptCache(folder=tmp_path / "file")
    assert (cache.get(key("a"), states) == 1).all()
    assert cache.stats()["unsaved"] == 1
    assert cache.stats()["dropped"] == 0
