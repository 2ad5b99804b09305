"""The report: whole in itself, honest about its bundles, harmless whatever they are called, clean in a real browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from edgesd.errors import RequestError
from edgesd.report import _flat, _table, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(small_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    prompts = ("a red circle on a white background", "a <b>bold</b> star & more")
    sheet = report([small_bundle, small_bundle], out, prompts=prompts, seed=5, steps=2)
    return out, sheet


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for key, value in attrs if key in ("src", "href") and value]


def test_the_page_loads_nothing_and_runs_nothing(page):
    links = Links()
    links.feed(page[0].read_text())
    assert all(link.startswith("data:") for link in links.found)
    assert "script" not in links.tags
    assert links.tags.count("img") >= 4


def test_pictures_of_equal_bundles_are_equal_and_said_so(page):
    _, sheet = page
    first, second = sheet.data["bundles"]
    assert first["psnr_db"] == [None, None]
    assert second["psnr_db"] == [100.0, 100.0]
    assert first["bundle"] != second["bundle"]


def test_what_comes_from_outside_is_shown_as_text(page):
    text = page[0].read_text()
    assert "<b>bold" not in text
    assert "a &lt;b&gt;bold&lt;/b&gt; star &amp; more" in text
    assert "<i>" not in _table(("<i>",), [("<i>x",)])


def test_sizes_errors_tables_and_origin_are_there(page, small_bundle):
    text = page[0].read_text()
    for wanted in ("vae_decoder", "Sampler tables", "Provenance", "seed 5", "seed 6", small_bundle.name):
        assert wanted in text


def test_nested_figures_are_named_by_their_path():
    assert _flat({"a": {"b": [1.23456, "x"]}}) == [("a · b [0]", "1.235"), ("a · b [1]", "x")]


@pytest.mark.parametrize(("folders", "name"), [(0, "r.html"), (1, "r.pdf"), (1, "nowhere/r.html"), (13, "r.html")])
def test_what_cannot_be_written_is_refused_before_any_work(small_bundle, tmp_path, folders, name):
    with pytest.raises(RequestError):
        report([small_bundle] * folders, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it_without_a_word_of_complaint(page, tmp_path):
    shot = tmp_path / "report.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--window-size=1000,1400")  # fmt: skip
    ran = subprocess.run([CHROMIUM, *flags, page[0].as_uri()], capture_output=True, text=True, timeout=120)
    assert shot.stat().st_size > 20_000
    assert not re.findall(r"CONSOLE.*", ran.stderr)
