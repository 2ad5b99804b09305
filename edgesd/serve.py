"""`edgesd serve`: the browser page and one bundle on localhost, and nothing else.

Headers that WebAssembly threads need (cross-origin isolation), byte ranges, right types. A name leads to a file only if
the bundle's manifest lists it, or it lies in the page's own folder; links and `..` lead nowhere.
"""

from __future__ import annotations

import mimetypes
import re
import sys
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edgesd import bundle
from edgesd.errors import RequestError, SetupError
from edgesd.files import open_regular

PAGE = "bundle"  # the path below which the bundle lies; the page asks for it there
CHUNK = 1 << 20
TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8", ".json": "application/json", ".wasm": "application/wasm",
    ".svg": "image/svg+xml", ".webmanifest": "application/manifest+json", ".onnx": "application/octet-stream",
}  # fmt: skip
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Accept-Ranges": "bytes",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Site:
    """What is served. page: folder of the built page. folder, listed: the bundle and the paths its manifest lists."""

    page: Path
    folder: Path
    listed: frozenset[str]

    def find(self, target: str) -> Path | None:
        """The file of a request's target, None where there is none: the caller opens it without following links."""
        path = unquote(urlsplit(target).path).lstrip("/")
        if path in ("", "index.html"):
            return self.page / "index.html"
        parts = path.split("/")
        if any(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._ -]*", part) is None for part in parts):
            return None
        if parts[0] == PAGE:
            name = "/".join(parts[1:])
            return self.folder / name if name in self.listed else None
        return self.page / path


def page_folder() -> Path:
    """Where the built page lies: in this checkout, or inside an installed edgesd. Raises SetupError where it is not."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "web_demo" / "dist", here / "web"):
        if (folder / "index.html").is_file():
            return folder
    source = here.parent / "web_demo" / "package.json"
    do = "Run: make web"
    if not source.is_file():
        do = "Build web_demo in edgesd's source (npm install && npm run build) and pass --page web_demo/dist"
    raise SetupError("the browser page is not built", "its files in web_demo/dist", do)


def site(source: Path, page: Path | None = None) -> Site:
    """A checked bundle and the page. Raises what `bundle.read` raises, RequestError for another target or no page."""
    opened = bundle.read(source)
    target = opened.manifest.target
    if target != "onnx-web":
        do = "Package the model with --target onnx-web"
        raise RequestError(f"a bundle for {target}", "onnx-web in a browser", do)
    folder = page_folder() if page is None else page.resolve()
    if not (folder / "index.html").is_file():
        raise RequestError(f"{folder} holds no index.html", "the folder of the built page", "Build it: npm run build")
    listed = {entry.path for entry in opened.manifest.files} | {bundle.MANIFEST}
    return Site(folder.resolve(), opened.folder, frozenset(listed))


def server(served: Site, host: str = "127.0.0.1", port: int = 8080) -> ThreadingHTTPServer:
    """A server that is bound and not yet running; port 0: any free one. Raises SetupError for a port that is taken."""
    try:
        made = ThreadingHTTPServer((host, port), partial(_Handler, served))
    except OSError as error:
        came = f"port {port} of {host} cannot be used ({error.strerror})"
        raise SetupError(came, "a free port", "Name another with --port (0 takes any free one)") from None
    made.daemon_threads = True
    return made


def address(made: ThreadingHTTPServer) -> str:
    """The URL for a browser on this machine: localhost counts as secure there, so storage and threads work."""
    host, port = made.server_address[0], made.server_address[1]
    return f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0', '::1') else str(host)}:{port}/"


def serve(source: Path, host: str, port: int, page: Path | None = None) -> None:
    """Serves until Ctrl-C. The address goes to stdout."""
    made = server(site(source, page), host, port)
    print(address(made), flush=True)
    print("Ctrl-C stops it", file=sys.stderr)
    try:
        made.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        made.server_close()


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of files."""

    protocol_version = "HTTP/1.1"
    server_version = "edgesd"
    sys_version = ""

    def __init__(self, served: Site, *args: object) -> None:
        self._site = served
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what went wrong is told in the page, and addresses are nobody's business."""

    def _answer(self, *, body: bool) -> None:
        found = self._site.find(self.path)
        root = (
            None if found is None else self._site.folder if found.is_relative_to(self._site.folder) else self._site.page
        )
        try:
            # A link anywhere on the way would lead out: the path that was asked for must be the real one.
            if found is None or root is None or found.resolve() != found:
                raise FileNotFoundError
            file = open_regular(found)
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND, body=body)
            return
        with file:
            size = file.seek(0, 2)
            span = _range(self.headers.get("Range"), size)
            if span is None:
                self._refuse(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"}, body=body
                )
                return
            self._send(file, found, span, size, body=body)

    def _send(self, file: BufferedReader, found: Path, span: tuple[int, int], size: int, *, body: bool) -> None:
        first, last = span
        partial_ = (first, last) != (0, size - 1) and size > 0
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial_ else HTTPStatus.OK)
        guessed = mimetypes.guess_type(found.name)[0]
        fallback = guessed if guessed is not None else "application/octet-stream"
        headers = {"Content-Type": TYPES.get(found.suffix, fallback), "Content-Length": str(max(0, last - first + 1))}
        if partial_:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if found.name == "sw.js":
            headers["Service-Worker-Allowed"] = "/"
        for name, value in (HEADERS | headers).items():
            self.send_header(name, value)
        self.end_headers()
        left = last - first + 1 if body else 0
        file.seek(first)
        try:
            while left > 0 and (data := file.read(min(CHUNK, left))):
                self.wfile.write(data)
                left -= len(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _refuse(self, status: HTTPStatus, more: dict[str, str] | None = None, *, body: bool) -> None:
        text = f"{status.value} {status.phrase}\n".encode()
        self.send_response(status)
        for name, value in (
            HEADERS | {"Content-Type": "text/plain", "Content-Length": str(len(text))} | ({} if more is None else more)
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(text)


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first, last) byte of one range (RFC 9110), the whole without a header that reads; None = beyond the end."""
    whole = (0, size - 1)
    matched = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header.strip()) if header is not None else None
    if matched is None or matched.group(0) == "bytes=-":
        return whole
    low, high = matched.groups()
    if low == "":  # the last so many bytes
        return (max(0, size - int(high)), size - 1) if int(high) > 0 else None
    first, last = int(low), min(int(high), size - 1) if high != "" else size - 1
    return (first, last) if first < size and first <= last else None
