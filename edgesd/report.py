"""`edgesd report`: one page about one or several bundles, whole in itself: pictures, sizes, dB, coverage, origin.

The page carries its pictures inside, loads nothing and runs no script; what comes from a bundle is shown as text.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgesd.errors import RequestError
from edgesd.files import write_whole
from edgesd.runtime.image import psnr_db
from edgesd.sheet import Section, Sheet, duration, size

MAX_BUNDLES, MAX_PROMPTS = 12, 16
Progress = Callable[[str, int, int], None]

SECURITY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } caption { text-align: left; font-weight: 600; padding: .4rem 0; }
img { image-rendering: auto; max-width: 16rem; width: 100%; border-radius: 4px; display: block; }
.chart { max-width: 100%; } small { opacity: .75; } .pictures td { min-width: 8rem; max-width: 16rem; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
"""


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture of one bundle. psnr_db: against the first bundle's of the same prompt and seed, None for itself."""

    image: np.ndarray
    seconds: float
    psnr_db: float | None


def report(
    folders: Sequence[Path], out: Path, *, prompts: Sequence[str] = (), seed: int = 0, steps: int | None = None,
    progress: Progress = lambda *_: None,
) -> Sheet:  # fmt: skip
    """Writes the page about these bundles to `out`; the first one is what the others' pictures are held against.

    prompts: what each draws, with noise seeds seed, seed + 1, …; none given: the bundles' own golden prompt, and for
    the embedded model a few captions of its world. Raises RequestError (no bundle, another suffix), DataError (broken).
    """
    if not 1 <= len(folders) <= MAX_BUNDLES or len(prompts) > MAX_PROMPTS:
        came = f"{len(folders)} bundles and {len(prompts)} prompts"
        raise RequestError(came, f"1 to {MAX_BUNDLES} bundles, up to {MAX_PROMPTS} prompts", "Name fewer")
    if out.suffix.lower() not in (".html", ".htm") or not out.absolute().parent.is_dir():
        raise RequestError(f"a report at {out}", "a name that ends in .html in an existing folder", "Change -o")
    from edgesd.inspection import inspect

    sheets = [inspect(folder) for folder in folders]
    names = _distinct([sheet.data["bundle"] for sheet in sheets])
    chosen = tuple(prompts) if prompts else _prompts(folders[0], sheets[0].data["model"]["name"])
    drawn = _draw(folders, chosen, seed, steps, progress)
    page = _page(names, sheets, chosen, seed, drawn, folders)
    write_whole(out, page.encode())
    rows = tuple(
        (name, size(s.data["bytes"]), *_pictures_said(row)) for name, s, row in zip(names, sheets, drawn, strict=True)
    )
    data = {
        "report": str(out), "prompts": list(chosen), "seed": seed,
        "bundles": [
            {"bundle": n, "bytes": s.data["bytes"], "seconds": [round(d.seconds, 4) for d in row],
             "psnr_db": [d.psnr_db for d in row]}
            for n, s, row in zip(names, sheets, drawn, strict=True)
        ],
    }  # fmt: skip
    columns = ("bundle", "size", "a picture", f"PSNR against {names[0]}")
    return Sheet(data, (Section("Report", columns, rows, f"{out}: open it in any browser"),))


def _pictures_said(row: Sequence[Drawn]) -> tuple[str, str]:
    against = [d.psnr_db for d in row if d.psnr_db is not None]
    return duration(float(np.median([d.seconds for d in row]))), f"{np.mean(against):.1f} dB" if against else ""


def _distinct(names: list[str]) -> list[str]:
    """Names that tell bundles of one name in different folders apart."""
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _prompts(folder: Path, model: str) -> tuple[str, ...]:
    from edgesd import bundle, golden
    from edgesd.shapes.world import held_out_captions

    opened = bundle.read(folder)
    own = golden.read(opened).facts.prompt if opened.manifest.golden is not None else "a red apple on a table"
    captions = held_out_captions(5) if model.startswith("shapes") and opened.manifest.prompts is None else []
    return (own, *captions)


def _draw(
    folders: Sequence[Path], prompts: Sequence[str], seed: int, steps: int | None, progress: Progress
) -> list[list[Drawn]]:
    from edgesd.runtime.generate import generate
    from edgesd.sources import open_pipeline

    rows: list[list[Drawn]] = []
    for folder in folders:
        pipeline, row = open_pipeline(str(folder)), []
        given: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
        for i, prompt in enumerate(prompts):
            began = time.perf_counter()
            image = generate(pipeline, prompt, seed=seed + i, **given)[0].image
            seconds = time.perf_counter() - began
            first = rows[0][i].image if rows else None
            comparable = first is not None and first.shape == image.shape
            row.append(Drawn(image, seconds, psnr_db(first, image) if comparable else None))  # type: ignore[arg-type]
            progress("drawing", len(rows) * len(prompts) + i + 1, len(folders) * len(prompts))
        rows.append(row)
    return rows


# ---- the page --------------------------------------------------------------------------------------------------


def _page(
    names: list[str], sheets: Sequence[Sheet], prompts: Sequence[str], seed: int, drawn: list[list[Drawn]],
    folders: Sequence[Path],
) -> str:  # fmt: skip
    title = "edgesd report: " + ", ".join(names)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f'<meta http-equiv=Content-Security-Policy content="{SECURITY}">',
        f"<title>{escape(title)}</title><link rel=icon href=data:,><style>{STYLE}</style><h1>{escape(title)}</h1>",
        "<h2>Pictures from the same seeds</h2>", _pictures(names, prompts, seed, drawn),
        "<h2>Sizes and errors</h2>", _figures(names, sheets),
    ]  # fmt: skip
    for name, sheet, folder in zip(names, sheets, folders, strict=True):
        parts += [f"<h2>{escape(name)}</h2>", *_policies(folder)]
        parts += [_section(s, open_=i == 0) for i, s in enumerate(sheet.sections)]
        parts += _quality(sheet.data["quality"])
    return "\n".join(parts) + "\n"


def _pictures(names: list[str], prompts: Sequence[str], seed: int, drawn: list[list[Drawn]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for i, prompt in enumerate(prompts):
        cells = "".join(f"<td>{_picture(names[k], prompt, row[i])}</td>" for k, row in enumerate(drawn))
        lines.append(f"<tr><th scope=row>{escape(prompt)}<br><small>seed {seed + i}</small></th>{cells}</tr>")
    return f"<div class=wide><table class=pictures><tr><th></th>{head}</tr>{''.join(lines)}</table></div>"


def _picture(name: str, prompt: str, drawn: Drawn) -> str:
    buffer = io.BytesIO()
    Image.fromarray(drawn.image).save(buffer, "PNG", optimize=True)
    against = "" if drawn.psnr_db is None else f", {drawn.psnr_db:.1f} dB"
    return (
        f'<img alt="{escape(f"{name}: {prompt}")}" src="{_data(buffer.getvalue())}">'
        f"<small>{escape(duration(drawn.seconds))}{against}</small>"
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figures(names: list[str], sheets: Sequence[Sheet]) -> str:
    """One line a variant of every bundle, so that bundles can be compared down a column."""
    rows = []
    for name, sheet in zip(names, sheets, strict=True):
        first = sheet.sections[0]
        rows += [(name, *row) for row in first.rows]
    return _table(("bundle", *sheets[0].sections[0].columns), rows)


def _section(section: Section, *, open_: bool) -> str:
    note = f"<p><small>{escape(section.note)}</small></p>" if section.note else ""
    shown = " open" if open_ else ""
    body = _table(section.columns, section.rows)
    return f"<details{shown}><summary>{escape(section.title)}</summary>{body}{note}</details>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _policies(folder: Path) -> list[str]:
    """Charts of the policies that a bundle brings, where matplotlib is here."""
    import tempfile

    from edgesd import bundle
    from edgesd.charts import draw_policy
    from edgesd.errors import SetupError
    from edgesd.sources import bundled_policy

    opened, made = bundle.read(folder), []
    with tempfile.TemporaryDirectory() as scratch:
        for entry in opened.manifest.policies:
            chart = Path(scratch) / "policy.png"
            try:
                draw_policy(bundled_policy(opened, entry.name), chart)
            except SetupError as error:
                return [f"<p><small>No policy charts: {escape(str(error))}</small></p>"]
            alt, image = escape(f"policy {entry.name}"), _data(chart.read_bytes())
            made.append(f'<img class=chart alt="{alt}" src="{image}">')
    return [f"<details><summary>Policies</summary>{''.join(made)}</details>"] if made else []


def _quality(quality: dict[str, Any]) -> list[str]:
    """What was measured when the bundle was made, as it stands in the manifest."""
    rows = [(key, value) for key, value in _flat(quality) if not isinstance(value, dict | list)]
    return [_section(Section("Measured when it was made", ("figure", ""), tuple(rows)), open_=False)] if rows else []


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name} · {key}" if name else str(key))]
    if isinstance(value, list):
        return [pair for i, inner in enumerate(value) for pair in _flat(inner, f"{name} [{i}]")]
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value))]
