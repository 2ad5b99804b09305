"""Bundles on disk: whole or not there, read with nothing on trust, hashed once and again only when something moved."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundles import FILES, fill, make, manifest

from edgesd import bundle, files
from edgesd.errors import DataError, RequestError, SetupError
from edgesd.manifest import FORMAT, Axes, Manifest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    place = tmp_path / "cache"
    monkeypatch.setenv("EDGESD_CACHE", str(place))
    return place


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def good(here):
    return make(here / "small-onnx-web.edgesd")


def fill_and_raise(folder: Path, error: BaseException) -> None:
    fill(folder, b"new")
    raise error


def rewrite_in_place(path: Path, data: bytes) -> None:
    """Other bytes of the same length under the old modification time: all that a forger can do to a file."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- reading ---------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(good):
    opened = bundle.read(good)
    assert opened.folder == good
    assert opened.manifest.model.name == "small"
    assert {entry.path for entry in opened.manifest.files} == set(FILES)
    for path, data in FILES.items():
        assert opened.path(path).read_bytes() == data


def test_hashes_are_computed_once_and_again_on_request(good, cache):
    assert bundle.read(good).hashed
    assert not bundle.read(good).hashed
    assert bundle.read(good, verify=True).hashed
    assert not bundle.read(good).hashed
    assert [path.parent.name for path in cache.rglob("*.json")] == ["receipts"]
    assert {str(p.relative_to(good)) for p in good.rglob("*") if p.is_file()} == {*FILES, "manifest.json"}


def test_a_file_changed_behind_the_receipt_is_hashed_and_refused(good):
    bundle.read(good)
    rewrite_in_place(good / "decoder.onnx", FILES["decoder.onnx"].upper())
    with pytest.raises(DataError, match=r"decoder\.onnx does not have the sha256"):
        bundle.read(good)


def test_a_receipt_belongs_to_one_manifest(good):
    bundle.read(good)
    text = (good / "manifest.json").read_text()
    rewrite_in_place(good / "manifest.json", text.replace('"small"', '"smell"').encode())
    assert bundle.read(good).hashed


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"{}", b"[" * 100_000])
def test_a_damaged_receipt_only_costs_time(good, cache, damage):
    bundle.read(good)
    (receipt,) = cache.rglob("*.json")
    receipt.write_bytes(damage)
    assert bundle.read(good).hashed
    assert not bundle.read(good).hashed


def test_a_cache_that_cannot_be_written_only_costs_time(good, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "file" / "inside"))
    assert bundle.read(good).hashed
    assert bundle.read(good).hashed


def test_a_link_to_the_bundle_is_the_bundle(good, here):
    (here / "latest").symlink_to(good)
    assert bundle.read(here / "latest").folder == good


def test_a_path_is_checked_when_it_is_asked_for(good, tmp_path):
    opened = bundle.read(good)
    with pytest.raises(RequestError, match="no file of"):
        opened.path("../cache")
    with pytest.raises(RequestError, match="no file of"):
        opened.path("manifest.json")
    (tmp_path / "elsewhere.onnx").write_bytes(FILES["decoder.onnx"])
    (good / "decoder.onnx").unlink()
    with pytest.raises(DataError, match="missing"):
        opened.path("decoder.onnx")
    (good / "decoder.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(DataError, match="is a link"):
        opened.path("decoder.onnx")
    (good / "unet").rename(tmp_path / "unet")
    (good / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(DataError, match="leads out"):
        opened.path("unet/unet.onnx")


def test_what_desktops_leave_behind_breaks_nothing(good):
    for name in (".DS_Store", "unet/.DS_Store", "Thumbs.db", "._decoder.onnx"):
        (good / name).write_text("")
    assert bundle.read(good).manifest.target == "onnx-web"


@pytest.mark.parametrize(
    ("spoil", "kind", "phrase"),
    [
        (lambda p: None, RequestError, "does not exist"),
        (lambda p: p.mkdir(), DataError, "an unfinished bundle, or no bundle at all"),
        (lambda p: p.write_bytes(b"PK\x03\x04"), RequestError, "Unpack it"),
        (lambda p: (p.mkdir(), (p / "model_index.json").write_text("{}")), DataError, "edgesd package"),
    ],
)
def test_what_is_no_bundle_is_named(here, spoil, kind, phrase):
    place = here / "thing.zip"
    spoil(place)
    with pytest.raises(kind, match=phrase):
        bundle.read(place)


# ---- writing ---------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_unless_forced(good):
    before = (good / "manifest.json").read_bytes()
    with pytest.raises(RequestError, match="--force"):
        make(good, salt=b"new")
    assert (good / "manifest.json").read_bytes() == before
    make(good, salt=b"new", force=True)
    assert bundle.read(good).path("decoder.onnx").read_bytes().endswith(b"new")
    assert os.listdir(good.parent) == [good.name]


def test_force_replaces_bundles_and_nothing_else(here):
    (here / "photos").mkdir()
    (here / "photos" / "cat.jpg").write_text("cat")
    (here / "photos" / "manifest.json").write_text('{"name": "a web app"}')
    (here / "file.edgesd").write_text("mine")
    for name in ("photos", "file.edgesd"):
        with pytest.raises(RequestError, match="bundles only"):
            make(here / name, force=True)
    assert (here / "photos" / "cat.jpg").read_text() == "cat"
    make(good := here / "plain-name")
    make(good, salt=b"again", force=True)
    assert bundle.read(good).path("decoder.onnx").read_bytes().endswith(b"again")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_bundle_and_nothing_else(good, here, error):
    for place, left in ((good, [good.name]), (here / "fresh.edgesd", [good.name])):
        with pytest.raises(error, match="stop"), bundle.writing(place, force=True) as folder:
            fill_and_raise(folder, error("stop"))
        assert os.listdir(here) == left
    assert bundle.read(good).path("decoder.onnx").read_bytes() == FILES["decoder.onnx"]


def test_a_full_disk_is_said_and_leaves_nothing(good, here):
    for number, phrase in (
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "closed to this user"),
    ):
        for place in (good, here / "other.edgesd"):
            with pytest.raises(SetupError, match=phrase), bundle.writing(place, force=True) as folder:
                fill_and_raise(folder, OSError(number, os.strerror(number)))
    assert os.listdir(here) == [good.name]
    assert bundle.read(good).hashed


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(here):
    here.chmod(0o500)
    with pytest.raises(SetupError, match="closed to this user"):
        make(here / "small.edgesd")
    here.chmod(0o700)


def test_a_folder_below_a_file_is_said(here):
    (here / "file").write_text("mine")
    with pytest.raises(RequestError, match="is a file"):
        make(here / "file" / "small.edgesd")


def test_an_unsealed_folder_is_not_moved_in(here):
    with pytest.raises(DataError, match="not finished"), bundle.writing(here / "small.edgesd") as folder:
        fill(folder)
    assert os.listdir(here) == []


def test_a_manifest_must_list_what_is_there(tmp_path):
    fill(tmp_path)
    listed = manifest(tmp_path)
    (tmp_path / "extra").write_text("unlisted")
    with pytest.raises(DataError, match="'extra' is in"):
        bundle.seal(tmp_path, listed)
    (tmp_path / "extra").unlink()
    (tmp_path / "decoder.onnx").write_text("longer or shorter")
    with pytest.raises(DataError, match=r"decoder\.onnx has 17 bytes"):
        bundle.seal(tmp_path, listed)
    (tmp_path / "decoder.onnx").unlink()
    with pytest.raises(DataError, match=r"decoder\.onnx is missing"):
        bundle.seal(tmp_path, listed)
    assert not (tmp_path / "manifest.json").exists()


def test_a_bundle_can_be_validated_and_sealed_again_before_anybody_sees_it(here):
    place = here / "small.edgesd"
    with bundle.writing(place) as folder:
        fill(folder)
        bundle.seal(folder, manifest(folder))
        first = bundle.read(folder).manifest
        assert not place.exists()
        bundle.seal(folder, Manifest.model_validate({**first.model_dump(), "quality": {"passed": True}}))
    assert bundle.read(place).manifest.quality == {"passed": True}


def test_two_writers_one_wins(good):
    with bundle.writing(good, force=True) as folder:
        with pytest.raises(RequestError, match="another edgesd is writing"):
            make(good, salt=b"second", force=True)
        assert bundle.read(good).path("decoder.onnx").read_bytes() == FILES["decoder.onnx"]
        fill(folder, b"first")
        bundle.seal(folder, manifest(folder))
    assert bundle.read(good).path("decoder.onnx").read_bytes().endswith(b"first")
    assert os.listdir(good.parent) == [good.name]


# ---- kills -----------------------------------------------------------------------------------------------------


def test_a_kill_between_the_two_renames_is_put_right_by_reader_and_writer(good):
    aside = good.with_name(f".{good.name}.old")
    good.rename(aside)
    assert bundle.read(good).manifest.model.name == "small"
    assert not aside.exists()
    good.rename(aside)
    with pytest.raises(RequestError, match="--force"):
        make(good)
    assert bundle.read(good).manifest.model.name == "small"


def test_a_writer_waits_out_nobody_who_is_dead(good):
    (good.with_name(f".{good.name}.lock")).write_text("")
    stale = good.with_name(f".{good.name}.new")
    stale.mkdir()
    (stale / "half").write_text("half")
    make(good, salt=b"new", force=True)
    assert os.listdir(good.parent) == [good.name]


WRITER = """
import sys; sys.path[:] = {path!r}
from pathlib import Path
from bundles import make
print("ready", flush=True)
for turn in range(10_000):
    make(Path({place!r}), salt=b"turn %d" % turn, force=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_writer_killed_at_any_moment_leaves_a_whole_bundle(good):
    chance = random.Random(5)
    for _ in range(10):
        code = WRITER.format(path=sys.path, place=str(good))
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 0.06))
            writer.kill()
        opened = bundle.read(good)  # hashes: all files of one turn, or the read fails
        salts = {opened.path(path).read_bytes()[len(data) :] for path, data in FILES.items()}
        assert len(salts) == 1
    make(good, salt=b"last", force=True)
    assert os.listdir(good.parent) == [good.name]


DYING_WRITER = """
import os, shutil, signal, sys; sys.path[:] = {path!r}
from pathlib import Path
from bundles import make
def dying(real, after):
    def call(*args, **kwargs):
        call.left -= 1
        if call.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    call.left = after
    return call
os.rename, shutil.rmtree = dying(os.rename, {renames}), dying(shutil.rmtree, {removals})
make(Path({place!r}), salt=b"new", force=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize(("renames", "removals", "survivor"), [(0, 9, b""), (1, 9, b""), (9, 0, b"new")])
def test_a_writer_killed_at_its_worst_moments(good, renames, removals, survivor):
    code = DYING_WRITER.format(path=sys.path, place=str(good), renames=renames, removals=removals)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    decoder = bundle.read(good).path("decoder.onnx").read_bytes()
    assert decoder == FILES["decoder.onnx"] + survivor
    make(good, salt=b"last", force=True)
    assert os.listdir(good.parent) == [good.name]


# ---- hashes and places -----------------------------------------------------------------------------------------


def test_a_tree_hash_sees_names_contents_and_links_and_no_hidden_files(tmp_path):
    tree = tmp_path / "model"
    (tree / "unet").mkdir(parents=True)
    (tree / "unet" / "weights.bin").write_bytes(b"w")
    (tree / "config.json").write_text("{}")
    first = files.hash_tree(tree)
    (tree / ".git").mkdir()
    (tree / ".git" / "index").write_text("x")
    (tree / "loop").symlink_to(tree)
    assert files.hash_tree(tree) == first
    blob = tmp_path / "blob"
    (tree / "unet" / "weights.bin").rename(blob)
    (tree / "unet" / "weights.bin").symlink_to(blob)
    assert files.hash_tree(tree) == first
    blob.write_bytes(b"W")
    assert files.hash_tree(tree) != first
    assert files.hash_tree(tree, suffixes=(".json",)) == files.hash_tree(tree, suffixes=("config.json",))
    assert files.hash_tree(blob) != files.hash_tree(tree / "config.json")
    with pytest.raises(RequestError, match="does not exist"):
        files.hash_tree(tree / "nothing")


def test_a_moved_file_changes_the_tree_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"y")
    first = files.hash_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")
    assert files.hash_tree(tmp_path) != first


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGESD_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "edgesd"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "edgesd"


def test_the_format_page_names_every_field_of_the_manifest():
    page = (Path(__file__).parent.parent / "docs" / "bundle.md").read_text()
    for name in (*Manifest.model_fields, *Axes.model_fields):
        assert f"`{name}`" in page
    assert f"format {FORMAT}" in page
