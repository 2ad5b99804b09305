"""The wheel holds what git tracks of the packages, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"edgesd/": "edgesd/", "targets/": "edgesd/targets/", "calibration/": "edgesd/calibration/"}


def test_wheel_contents_equal_the_tracked_files(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    listed = subprocess.run(["git", "ls-files", *PLACES], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]
    copy = tmp_path / "source"
    for name in [*tracked, "pyproject.toml", "README.md", "LICENSE"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    inside = {n for n in names if ".dist-info/" not in n}
    expected = {new + t[len(old) :] for t in tracked for old, new in PLACES.items() if t.startswith(old)}
    assert inside == expected
