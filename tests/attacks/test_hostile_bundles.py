"""Bundles that someone spoiled: each is refused with the right kind of error, a useful phrase, and in no time.

An attack is a function that spoils the whole bundle `folder`; its name says how. Most spoil the manifest's JSON.
"""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bundles import FILES, document, fill, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgesd import bundle
from edgesd.errors import DataError
from edgesd.manifest import MAX_BUNDLE_BYTES, MAX_MANIFEST_BYTES, MAX_VALUES, Manifest, dump, parse

Attack = Callable[[Path], Any]
LIMIT_S = 5.0
ATTACKS: list[Any] = []


def expect(phrase: str) -> Callable[[Attack], Attack]:
    def add(attack: Attack) -> Attack:
        ATTACKS.append(pytest.param(attack, phrase, id=attack.__name__))
        return attack

    return add


def put(folder: Path, data: bytes | str) -> None:
    (folder / "manifest.json").write_bytes(data if isinstance(data, bytes) else data.encode())


def edit(folder: Path, *where: str | int, to: Any) -> None:
    """Sets one value of the manifest, e.g. edit(folder, "files", 0, "path", to="../x")."""
    raw = json.loads((folder / "manifest.json").read_text())
    at = raw
    for step in where[:-1]:
        at = at[step]
    at[where[-1]] = to
    put(folder, json.dumps(raw))


def rename_listed(folder: Path, to: str) -> None:
    """Lists and uses decoder.onnx under another name."""
    text = (folder / "manifest.json").read_text().replace('"decoder.onnx"', json.dumps(to))
    put(folder, text)


# ---- paths -----------------------------------------------------------------------------------------------------


@expect("must be relative")
def parent_path(folder):
    (folder.parent / "decoder.onnx").write_bytes(FILES["decoder.onnx"])
    rename_listed(folder, "../decoder.onnx")


@expect("must be relative")
def parent_path_in_the_middle(folder):
    rename_listed(folder, "unet/../../decoder.onnx")


@expect("must be relative")
def absolute_path(folder):
    rename_listed(folder, "/etc/passwd")


@expect("must be relative")
def drive_path(folder):
    rename_listed(folder, "C:decoder.onnx")


@expect("must be relative")
def backslash_path(folder):
    rename_listed(folder, "..\\decoder.onnx")


@expect("must be relative")
def empty_part(folder):
    rename_listed(folder, "unet//decoder.onnx")


@expect("must be relative")
def dot_part(folder):
    rename_listed(folder, "./decoder.onnx")


@expect("must be relative")
def null_byte_in_path(folder):
    rename_listed(folder, "decoder.onnx\0.png")


@expect("must be relative")
def newline_at_the_end_of_a_path(folder):
    rename_listed(folder, "decoder.onnx\n")


@expect("must be relative")
def look_alike_letters(folder):
    rename_listed(folder, "dеcoder.onnx")  # a Cyrillic e


@expect("must be relative")
def hidden_file(folder):
    rename_listed(folder, ".bashrc")


@expect("must be relative")
def home_path(folder):
    rename_listed(folder, "~/decoder.onnx")


@expect("must be relative")
def trailing_dot(folder):
    rename_listed(folder, "decoder.onnx.")


@expect("device")
def windows_device(folder):
    rename_listed(folder, "unet/NUL.onnx")


@expect("512")
def path_without_end(folder):
    rename_listed(folder, "/".join(["a"] * 4000))


@expect("at least 1")
def empty_path(folder):
    rename_listed(folder, "")


# ---- kinds of file ---------------------------------------------------------------------------------------------


def replace_decoder(folder: Path) -> Path:
    (folder / "decoder.onnx").unlink()
    return folder / "decoder.onnx"


@expect("is a link")
def symlink_out(folder):
    outside = folder.parent / "outside"
    outside.write_bytes(FILES["decoder.onnx"])  # the right bytes: it is the link that is refused
    replace_decoder(folder).symlink_to(outside)


@expect("is a link")
def symlink_inside(folder):
    (folder / "tokenizer.json").write_bytes(FILES["tokenizer.json"])
    replace_decoder(folder).symlink_to("tokenizer.json")


@expect("is a link")
def symlink_to_itself(folder):
    replace_decoder(folder).symlink_to("decoder.onnx")


@expect("is a link")
def hard_link_out(folder):
    outside = folder.parent / "outside"
    outside.write_bytes(FILES["decoder.onnx"])
    os.link(outside, replace_decoder(folder))


@expect("'unet' is in")
def folder_is_a_symlink(folder):
    (folder / "unet").rename(folder.parent / "unet")
    (folder / "unet").symlink_to(folder.parent / "unet")


@expect("not a regular file")
def fifo(folder):
    os.mkfifo(replace_decoder(folder))


@expect("not a regular file")
def unix_socket(folder):
    here = os.getcwd()
    os.chdir(folder)  # a socket's name may have 107 characters
    try:
        replace_decoder(folder)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("decoder.onnx")
    finally:
        os.chdir(here)


@expect("not a regular file")
def device(folder):
    try:
        os.mknod(replace_decoder(folder), 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero never ends
    except PermissionError:
        pytest.skip("only root makes devices")


@expect("'decoder.onnx' is in|not a regular file")
def folder_in_place_of_a_file(folder):
    replace_decoder(folder).mkdir()


@expect("is missing|'unet' is in")
def file_in_place_of_a_folder(folder):
    for path in (folder / "unet").iterdir():
        path.unlink()
    (folder / "unet").rmdir()
    (folder / "unet").write_text("")


@expect("is a link or no regular file")
def manifest_is_a_symlink(folder):
    (folder / "manifest.json").rename(folder.parent / "real.json")
    (folder / "manifest.json").symlink_to(folder.parent / "real.json")


@expect("is a link or no regular file")
def manifest_is_a_fifo(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


@expect("is a link or no regular file")
def manifest_is_a_folder(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


@expect("'extra.bin' is in")
def unlisted_file(folder):
    (folder / "extra.bin").write_bytes(b"load me")


@expect(r"is in .* and not in its manifest")
def unlisted_deep_folders(folder):
    (folder / "unet" / "/".join(["deep"] * 200)).mkdir(parents=True)


@expect(r"'unet/\\x1b\[2Jcleared' is in")
def unlisted_name_that_clears_the_screen(folder):
    (folder / "unet" / "\x1b[2Jcleared").write_text("")


# ---- sizes and hashes ------------------------------------------------------------------------------------------


@expect("decoder.onnx is missing")
def missing_file(folder):
    replace_decoder(folder)


@expect(r"decoder.onnx has 349 bytes. Allowed: 350")
def truncated_file(folder):
    (folder / "decoder.onnx").write_bytes(FILES["decoder.onnx"][:-1])


@expect("has 351 bytes")
def longer_file(folder):
    (folder / "decoder.onnx").write_bytes(FILES["decoder.onnx"] + b"\0")


@expect("does not have the sha256")
def one_flipped_bit(folder):
    data = bytearray(FILES["unet/unet.onnx.data"])
    data[5000] ^= 1
    (folder / "unet" / "unet.onnx.data").write_bytes(data)


@expect("does not have the sha256")
def hash_of_another_file(folder):
    edit(folder, "files", 0, "sha256", to="0" * 64)


@expect("should match pattern")
def hash_in_upper_case(folder):
    edit(folder, "files", 0, "sha256", to="A" * 64)


@expect("bytes together, more than")
def sparse_file_of_a_petabyte(folder):
    os.truncate(folder / "decoder.onnx", MAX_BUNDLE_BYTES * 10)
    raw = json.loads((folder / "manifest.json").read_text())
    number = next(i for i, entry in enumerate(raw["files"]) if entry["path"] == "decoder.onnx")
    edit(folder, "files", number, "bytes", to=MAX_BUNDLE_BYTES * 10)


@expect("greater than or equal to 0")
def negative_size(folder):
    edit(folder, "files", 0, "bytes", to=-1)


@expect("beyond 2\\^53")
def size_beyond_2_53(folder):
    edit(folder, "files", 0, "bytes", to=2**53)


@expect("valid integer")
def size_as_text(folder):
    edit(folder, "files", 0, "bytes", to="350")


@expect("valid integer")
def size_as_truth_value(folder):
    edit(folder, "files", 0, "bytes", to=True)


# ---- shapes and references -------------------------------------------------------------------------------------

UNET = ("components", 0, "variants", 0)


@expect("elements, more than")
def shape_that_overflows(folder):
    edit(folder, *UNET, "inputs", 0, "shape", to=[1 << 24] * 8)


@expect("less than or equal to")
def dimension_that_overflows(folder):
    edit(folder, *UNET, "inputs", 0, "shape", to=[1 << 31])


@expect("greater than or equal to 1")
def dimension_of_zero(folder):
    edit(folder, *UNET, "inputs", 0, "shape", to=[1, 0])


@expect("at most 8")
def shape_of_a_thousand_axes(folder):
    edit(folder, *UNET, "inputs", 0, "shape", to=[1] * 1000)


@expect("dtype")
def object_dtype(folder):
    edit(folder, *UNET, "inputs", 0, "dtype", to="object")


@expect("is used but not listed")
def variant_uses_an_unlisted_file(folder):
    edit(folder, *UNET, "files", to=["unet/unet.onnx", "other.bin"])


@expect("is used but not listed")
def golden_is_unlisted(folder):
    edit(folder, "golden", to="golden/other.json")


@expect("is used but not listed")
def policy_is_unlisted(folder):
    edit(folder, "policies", to=[{"name": "mine", "file": "policies/mine.json"}])


@expect("policy is listed twice")
def policy_listed_twice(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    edit(folder, "policies", to=[{"name": "mine", "file": raw["files"][0]["path"]}] * 2)


@expect("policies.0.name")
def policy_named_like_a_path(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    edit(folder, "policies", to=[{"name": "../mine", "file": raw["files"][0]["path"]}])


@expect("listed twice")
def file_listed_twice(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    edit(folder, "files", to=[*raw["files"], raw["files"][0]])


@expect("listed twice")
def names_that_differ_in_case_only(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    edit(folder, "files", to=[*raw["files"], {**raw["files"][0], "path": raw["files"][0]["path"].upper()}])


@expect("lists itself")
def manifest_lists_itself(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    edit(folder, "files", to=[*raw["files"], {**raw["files"][0], "path": "manifest.json"}])


@expect("component is listed twice")
def component_listed_twice(folder):
    raw = json.loads((folder / "manifest.json").read_text())
    edit(folder, "components", to=[raw["components"][0]] * 2)


@expect("at least 1 item")
def no_components(folder):
    edit(folder, "components", to=[])


# ---- JSON ------------------------------------------------------------------------------------------------------


def spliced(folder: Path, extra: str) -> None:
    put(folder, (folder / "manifest.json").read_text().rstrip().removesuffix("}") + f", {extra}}}")


@expect("does not parse")
def manifest_is_empty(folder):
    put(folder, b"")


@expect("does not parse")
def manifest_is_cut(folder):
    put(folder, (folder / "manifest.json").read_bytes()[:700])


@expect("does not parse")
def manifest_is_not_json(folder):
    put(folder, b"<html>404</html>")


@expect("has no format")
def manifest_is_a_list(folder):
    put(folder, b"[]")


@expect("'quality' appears twice")
def duplicate_key(folder):
    spliced(folder, '"quality": {}')


@expect("appears twice")
def duplicate_key_deep_inside(folder):
    edit(folder, "quality", to={"note": 1})
    text = (folder / "manifest.json").read_text()
    put(folder, text.replace('"note": 1', '"note": 1, "note": 2'))


@expect("appears twice")
def duplicate_key_after_many_others(folder):
    keys = ",".join(f'"{n}":0' for n in range(MAX_VALUES - 1000))
    put(folder, '{"format":"1.0","quality":{' + keys + ',"x":0,"x":0}}')


@expect("appears twice")
def duplicate_key_of_megabytes(folder):
    key = "k" * (6 << 20)
    put(folder, f'{{"{key}":0,"{key}":0}}')


@expect("NaN is not a number")
def not_a_number(folder):
    edit(folder, "quality", to={"psnr_db": math.nan})


@expect("Infinity is not a number")
def infinity(folder):
    edit(folder, "model", "latent", "scaling_factor", to=math.inf)


@expect("does not parse")
def number_that_overflows_to_infinity(folder):
    spliced(folder, '"later_field": 1e999')


@expect("beyond 2\\^53")
def integer_of_a_million_digits(folder):
    spliced(folder, '"later_field": ' + "9" * 1_000_000)


@expect("does not parse")
def half_a_surrogate_pair(folder):
    spliced(folder, '"later_field": "\\ud800"')


@expect("does not parse")
def bad_utf8(folder):
    put(folder, b'{"format": "1.0\xff"}')


@expect("does not parse")
def utf16(folder):
    put(folder, (folder / "manifest.json").read_text().encode("utf-16"))


@expect("does not parse")
def byte_order_mark(folder):
    put(folder, b"\xef\xbb\xbf" + (folder / "manifest.json").read_bytes())


@expect("does not parse")
def lists_in_lists(folder):
    spliced(folder, '"quality2": ' + "[" * 5_000_000 + "]" * 5_000_000)


@expect("does not parse")
def objects_in_objects(folder):
    put(folder, '{"a":' * 100_000 + "1" + "}" * 100_000)


@expect(f"up to {MAX_MANIFEST_BYTES}")
def manifest_of_many_megabytes(folder):
    spliced(folder, '"later_field": "' + "x" * MAX_MANIFEST_BYTES + '"')


@expect("up to 262144")
def a_million_files(folder):
    edit(folder, "files", to=[0] * 1_000_000)


@expect("files")
def more_files_than_may_be(folder):
    edit(folder, "files", to=[{}] * (MAX_VALUES - 1000))


@expect("provenance.libraries")
def more_bad_values_than_may_be(folder):
    edit(folder, "provenance", "libraries", to={str(n): 0 for n in range(MAX_VALUES - 1000)})


@expect("valid dictionary|object")
def components_are_numbers(folder):
    edit(folder, "components", to=[1, 2, 3])


@expect(r"components\.0\.name: Input should be 'text_encoder'")
def unknown_component(folder):
    edit(folder, "components", 0, "name", to="\x1b[31mroot")


@expect("[^\x1b]libraries")
def key_that_steers_the_terminal(folder):
    edit(folder, "provenance", "libraries", to={"\x1b]0;owned\x07": 1})


# ---- versions --------------------------------------------------------------------------------------------------


@expect("Install the edgesd that made it")
def newer_major(folder):
    edit(folder, "format", to="2.0")


@expect("bundle format")
def format_without_a_minor(folder):
    edit(folder, "format", to="1")


@expect("has no format")
def format_is_a_number(folder):
    edit(folder, "format", to=1.0)


@expect("noise.version: Input should be 1")
def noise_of_a_later_version(folder):
    edit(folder, "noise", to={"version": 2})


@expect("features this edgesd lacks: w4a8")
def unknown_critical_feature(folder):
    edit(folder, "critical", to=["w4a8"])


@expect("features this edgesd lacks")
def critical_is_text(folder):
    edit(folder, "critical", to="w4a8")


@expect("features this edgesd lacks")
def many_critical_features(folder):
    edit(folder, "critical", to=["x" * 10] * (MAX_VALUES - 1000))


@expect(r"features this edgesd lacks: \(not a name\)")
def critical_is_nested(folder):
    put(folder, '{"format": "1.0", "critical": [' + "[" * 200 + "]" * 200 + "]}")


# ---- the tests -------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))
    return make(tmp_path / "out" / "small.edgesd")


@pytest.mark.timeout(60)  # a read that waits (on a pipe, on a device) burns no time of its own
@pytest.mark.parametrize(("attack", "phrase"), ATTACKS)
def test_an_attack_is_refused(whole, attack, phrase):
    bundle.read(whole)  # the receipt of the whole bundle must not vouch for the spoiled one
    attack(whole)
    start = time.process_time()
    with pytest.raises(DataError, match=phrase) as caught:
        bundle.read(whole)
    assert time.process_time() - start < LIMIT_S
    assert len(str(caught.value)) < 1000 + len(str(whole))
    assert all(c.isprintable() for c in str(caught.value))
    assert caught.value.do


def test_a_newer_minor_with_unknown_fields_is_read(whole):
    edit(whole, "format", to="1.7")
    edit(whole, "later_field", to={"anything": [1, 2.5, None, "é", "\U0001f600"]})
    edit(whole, "components", 0, "variants", 0, "axes", "tile", to=[64, 64])
    assert bundle.read(whole).manifest.format == "1.7"


# ---- mutations -------------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["../x", "1.0", "9.9", "unet", "decoder.onnx", "float32", "a" * 5000]),
    st.just([]),
    st.just({}),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    fill(folder)
    return document(folder)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    return [at] * bool(at) + [place for key, item in inside for place in places(item, (*at, key))]


def checked(data: bytes) -> Manifest | None:
    """The manifest, or None where it is refused. Fails on anything but a DataError, and on a hang."""
    start = time.process_time()
    found = None
    with suppress(DataError):
        found = parse(data)
    assert time.process_time() - start < LIMIT_S
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_means_what_it_says(original, data):
    raw = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(raw)))
        at = raw
        for step in place[:-1]:
            at = at[step]
        if data.draw(st.booleans()):
            at[place[-1]] = data.draw(VALUES)
        elif isinstance(at, dict):
            del at[place[-1]]
        else:
            at.insert(place[-1], copy.deepcopy(at[place[-1]]))
        if not places(raw):
            break
    found = checked(json.dumps(raw).encode())
    if found is not None:  # accepted: every file it names is a plain path inside, and it survives a round trip
        for entry in found.files:
            assert not os.path.isabs(entry.path)
            assert ".." not in entry.path.split("/")
            assert entry.bytes >= 0
        assert parse(dump(found)) == found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_never_crash_the_parser(original, data):
    raw = bytearray(json.dumps(original).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=12))
    checked(bytes(raw))


def test_the_unspoiled_manifest_is_accepted(original):
    assert checked(json.dumps(original).encode()) is not None
