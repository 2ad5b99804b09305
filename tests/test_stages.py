"""The stage cache: made once per key, whole or not there, shared between processes, evicted by age."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from edgesd import stages
from edgesd.errors import RequestError, SetupError
from edgesd.recipe import Recipe
from edgesd.stages import Stages, key


class Counted:
    """A build that counts its calls and writes as many bytes as it is told."""

    def __init__(self, size=10):
        self.calls, self.size = 0, size

    def __call__(self, folder):
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "weights.bin").write_bytes(b"w" * self.size)


@pytest.fixture
def cache(tmp_path):
    return Stages(tmp_path / "stages")


def test_a_stage_is_built_once(cache):
    build = Counted()
    first = cache.run("unet-1", build)
    assert (first / "sub" / "weights.bin").read_bytes() == b"w" * 10
    assert cache.run("unet-1", build) == first
    assert Stages(cache.folder).run("unet-1", build) == first
    assert build.calls == 1
    cache.run("unet-2", build)
    assert build.calls == 2


def test_the_default_folder_is_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "mine"))
    assert Stages().entries() == []
    assert Stages().run("unet-1", Counted()).is_relative_to(tmp_path / "mine" / "stages")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_build_leaves_nothing_and_is_tried_again(cache, error):
    def build(folder):
        (folder / "half").write_text("half")
        raise error("stop")

    with pytest.raises(error, match="stop"):
        cache.run("unet-1", build)
    assert cache.entries() == []
    assert not [path for path in cache.folder.iterdir() if path.is_dir()]
    again = Counted()
    cache.run("unet-1", again)
    assert again.calls == 1


def test_a_full_disk_says_what_helps(cache):
    def build(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(SetupError, match="edgesd cache --clear"):
        cache.run("unet-1", build)


@pytest.mark.parametrize("damage", ["delete", "shorten", "listing"])
def test_a_stage_that_a_cleaner_ate_is_built_again(cache, damage):
    build = Counted()
    place = cache.run("unet-1", build)
    file = place / "sub" / "weights.bin"
    if damage == "delete":
        file.unlink()
    elif damage == "shorten":
        file.write_bytes(b"w")
    else:
        (place.parent / "stage.json").write_text("[")
    assert (cache.run("unet-1", build) / "sub" / "weights.bin").stat().st_size == 10
    assert build.calls == 2


def test_the_longest_unused_stages_go_first(tmp_path):
    for number in range(4):
        Stages(tmp_path).run(f"unet-{number}", Counted(100))
        os.utime(tmp_path / f"unet-{number}", (1000 + number, 1000 + number))
    os.utime(tmp_path / "unet-0", (5000, 5000))  # used again since
    small = Stages(tmp_path, limit_bytes=250)
    small.run("unet-3", Counted(100))
    assert {entry.key for entry in small.entries()} == {"unet-0", "unet-3"}


def test_a_stage_in_use_is_never_evicted(cache):
    for number in range(3):
        cache.run(f"unet-{number}", Counted(100))
    Stages(cache.folder, limit_bytes=0).run("other", Counted(100))
    assert len(cache.entries()) == 4
    assert Stages(cache.folder).clear() == 100  # whose user is gone
    assert cache.clear() == 300
    assert cache.entries() == []
    assert cache.clear() == 0


def test_entries_show_sizes_and_the_last_used_first(cache):
    cache.run("small-1", Counted(5))
    cache.run("large-1", Counted(500))
    os.utime(cache.folder / "small-1", (9e9, 9e9))
    assert [(entry.key, entry.bytes) for entry in cache.entries()] == [("small-1", 5), ("large-1", 500)]


def test_two_builders_of_one_stage_build_it_once(cache):
    started, release, slow = threading.Event(), threading.Event(), Counted()

    def build(folder):
        started.set()
        release.wait(30)
        slow(folder)

    first = threading.Thread(target=cache.run, args=("unet-1", build))
    first.start()
    started.wait(30)
    other = Stages(cache.folder)
    second = threading.Thread(target=other.run, args=("unet-1", slow))
    second.start()
    release.set()
    first.join(30)
    second.join(30)
    assert slow.calls == 1


def test_a_stage_may_ask_for_another(cache):
    def build(folder):
        below = cache.run("float-1", Counted())
        (folder / "copy").write_bytes((below / "sub" / "weights.bin").read_bytes())

    assert (cache.run("int8-1", build) / "copy").read_bytes() == b"w" * 10
    assert len(cache.entries()) == 2


KILLED = """
import sys; sys.path[:] = {path!r}
import os, signal
from pathlib import Path
from edgesd.stages import Stages
def whole(folder):
    (folder / "done").write_text("done")
def half(folder):
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
cache = Stages(Path({place!r}))
cache.run("first", whole)
cache.run("second", half)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_continues_where_it_was(cache):
    code = KILLED.format(path=sys.path, place=str(cache.folder))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    first, second = Counted(), Counted()
    assert (cache.run("first", first) / "done").read_text() == "done"
    assert first.calls == 0
    assert not list(cache.folder.glob(".second.new"))  # swept, although nobody asked for it again
    cache.run("second", second)
    assert second.calls == 1


# ---- keys ------------------------------------------------------------------------------------------------------


def test_a_key_is_the_same_for_the_same_and_new_for_anything_else():
    recipe = Recipe(target="openvino")
    first = key("unet", recipe, "a" * 64, libraries=("numpy", "pydantic"))
    assert first == key("unet", Recipe(target="openvino"), "a" * 64, libraries=("pydantic", "numpy"))
    others = [
        key("unet", Recipe(target="openvino", seed=1), "a" * 64, libraries=("numpy", "pydantic")),
        key("unet", recipe, "b" * 64, libraries=("numpy", "pydantic")),
        key("unet", recipe, "a" * 64, libraries=("numpy",)),
        key("unet", recipe, "a" * 64, libraries=("numpy", "no-such-library")),
        key("decoder", recipe, "a" * 64, libraries=("numpy", "pydantic")),
    ]
    assert len({first, *others}) == 6
    assert first.startswith("unet-")


def test_a_key_counts_edgesds_own_code(monkeypatch):
    first = key("unet")
    assert len(stages.code_version()) == 64
    monkeypatch.setattr(stages, "code_version", lambda: "other")
    assert key("unet") != first


def test_a_key_takes_only_what_has_a_stable_form():
    with pytest.raises(TypeError, match="no stable form"):
        key("unet", {1, 2})
    with pytest.raises(ValueError, match="JSON"):
        key("unet", float("nan"))
    with pytest.raises(RequestError, match="stage name"):
        key("../unet")


def test_the_listing_is_plain_json(cache):
    place = cache.run("unet-1", Counted(3))
    assert json.loads((place.parent / "stage.json").read_text()) == {"sub/weights.bin": 3}
