"""`edgesd serve`: what a browser needs is there, and nothing outside the page and the bundle's listed files is."""

import http.client
import json
import os
import threading
from pathlib import Path

import pytest
from bundles import FILES, make

from edgesd import serve
from edgesd.errors import DataError, RequestError, SetupError


@pytest.fixture
def page(tmp_path) -> Path:
    folder = tmp_path / "page"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<title>edgesd</title>")
    (folder / "assets" / "app.js").write_text("1")
    (folder / "assets" / "ort.wasm").write_bytes(b"\0asm")
    (folder / "assets" / "ort.mjs").write_text("2")
    (folder / "assets" / "out.js").symlink_to(tmp_path / "secret")
    (folder / "away").symlink_to(tmp_path)
    (folder / ".hidden").write_text("no")
    (tmp_path / "secret").write_text("secret")
    return folder


@pytest.fixture
def ask(tmp_path, page):
    """ask(path, method, headers) -> (status, headers, body), of a server on a bundle and the page."""
    folder = make(tmp_path / "small.edgesd")
    running = serve.server(serve.site(folder, page), port=0)
    threading.Thread(target=running.serve_forever, daemon=True).start()

    def request(path: str, method: str = "GET", **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", running.server_address[1], timeout=10)
        connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        found = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return found

    yield request
    running.shutdown()
    running.server_close()


def test_a_page_is_isolated_and_typed(ask):
    for path, kind in (
        ("/", "text/html; charset=utf-8"), ("/assets/app.js?v=1", "text/javascript; charset=utf-8"),
        ("/assets/ort.mjs", "text/javascript; charset=utf-8"), ("/assets/ort.wasm", "application/wasm"),
        ("/bundle/manifest.json", "application/json"), ("/bundle/unet/unet.onnx", "application/octet-stream"),
    ):  # fmt: skip
        status, headers, body = ask(path)
        assert (status, headers["Content-Type"]) == (200, kind)
        assert int(headers["Content-Length"]) == len(body) > 0
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert json.loads(ask("/bundle/manifest.json")[2])["target"] == "onnx-web"
    assert ask("/bundle/unet/unet.onnx")[2] == FILES["unet/unet.onnx"]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=100-", 100, 499), ("bytes=0-9", 0, 9), ("bytes=490-9999", 490, 499), ("bytes=-20", 480, 499)],
)
def test_ranges(ask, asked, first, last):
    status, headers, body = ask("/bundle/unet/unet.onnx", Range=asked)
    assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{last}/500")
    assert body == FILES["unet/unet.onnx"][first : last + 1]


@pytest.mark.parametrize("asked", ["bytes=500-", "bytes=900-901", "bytes=9-3", "bytes=-0"])
def test_ranges_beyond_the_end_are_refused(ask, asked):
    status, headers, _ = ask("/bundle/unet/unet.onnx", Range=asked)
    assert (status, headers["Content-Range"]) == (416, "bytes */500")


@pytest.mark.parametrize("asked", ["bytes=0-1,3-4", "lines=1-2", "bytes=a-b", "bytes=-"])
def test_ranges_of_another_kind_give_the_whole(ask, asked):
    status, _, body = ask("/bundle/unet/unet.onnx", Range=asked)
    assert (status, body) == (200, FILES["unet/unet.onnx"])


def test_head_sends_no_body(ask):
    status, headers, body = ask("/bundle/unet/unet.onnx", method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, "500", b"")


@pytest.mark.parametrize(
    "path",
    [
        "/../secret", "/bundle/../../secret", "/%2e%2e/secret", "/bundle/%2e%2e/%2e%2e/secret", "/..%2fsecret",
        "//etc/passwd",
        "/bundle//etc/passwd", "/bundle/unet/../manifest.json", "/assets/out.js", "/away/secret", "/.hidden", "/assets",
        "/bundle", "/bundle/", "/bundle/unlisted.txt", "/bundle/unet", "/assets\\app.js", "/a%00b", "/" + "a" * 5000,
    ],
)  # fmt: skip
def test_nothing_else_is_there(ask, path):
    status, headers, body = ask(path)
    assert status == 404
    assert b"secret" not in body
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_an_unlisted_file_and_a_link_put_there_later_are_not_served(ask, tmp_path):
    folder = tmp_path / "small.edgesd"
    (folder / "extra.txt").write_text("later")
    os.remove(folder / "decoder.onnx")
    (folder / "decoder.onnx").symlink_to(tmp_path / "secret")
    assert ask("/bundle/extra.txt")[0] == 404
    assert ask("/bundle/decoder.onnx")[0] == 404


def test_other_methods_are_refused(ask):
    assert ask("/", method="POST")[0] == 501


def test_what_cannot_be_served_says_what_to_do(tmp_path, page, monkeypatch):
    with pytest.raises(RequestError, match=r"index\.html"):
        serve.site(make(tmp_path / "a.edgesd"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        serve.site(tmp_path / "empty", page)
    monkeypatch.setattr(serve, "__file__", str(tmp_path / "edgesd" / "serve.py"))
    with pytest.raises(SetupError, match=r"npm install && npm run build"):
        serve.page_folder()
    running = serve.server(serve.site(tmp_path / "a.edgesd", page), port=0)
    with pytest.raises(SetupError, match="--port"):
        serve.server(serve.site(tmp_path / "a.edgesd", page), port=running.server_address[1])
    running.server_close()


def test_bundles_of_other_targets_are_refused(tmp_path, page):
    folder = make(tmp_path / "a.edgesd")
    text = (folder / "manifest.json").read_text().replace('"onnx-web"', '"openvino"')
    (folder / "manifest.json").write_text(text)
    with pytest.raises(RequestError, match="--target onnx-web"):
        serve.site(folder, page)
