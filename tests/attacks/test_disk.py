"""Disks that are full or closed, two packagers at once, a clock that runs backwards: said, and nothing lost."""

import os
import re
import signal
import subprocess
import sys
import time

import inline
import pytest
import tiny
from kill_test import Forked, Packager
from PIL import Image

from edgesd import bundle, cli, targets
from edgesd.calibration import sets

THREE_PARTS = re.compile(r"^edgesd: .+\. Allowed: .+\. .+\.$", re.DOTALL)
PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder("sd1", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command here, with the test target and its stages in this process: (exit code, stderr)."""
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(targets.TARGETS, "torch", "torch_target")
    inline.install(monkeypatch.setattr)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["edgesd", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, capsys.readouterr().err.strip()

    return command


class Disk:
    """A file system of its own in memory."""

    def __init__(self, folder, size):
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")

    def _mount(self, *words):
        try:
            subprocess.run(["mount", *words, str(self.folder)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here ({error})")

    def fill(self, leave_bytes=0):
        """Writes a file that leaves so much room."""
        status = os.statvfs(self.folder)
        (self.folder / "filler").write_bytes(bytes(max(0, status.f_bavail * status.f_bsize - leave_bytes)))

    def free(self):
        (self.folder / "filler").unlink()

    def close(self):
        """Nobody writes here any more, root included."""
        self._mount("-o", "remount,ro")


@pytest.fixture
def disk(tmp_path):
    made = Disk(tmp_path / "disk", "64m")
    yield made
    subprocess.run(["umount", "-l", str(made.folder)], check=False)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.name != "filler"}  # fmt: skip


def commands(model, folder):
    """Every command that writes, as (words, what it must not lose). What it writes exists already where it may."""
    pack = ["package", model, "--target", "torch", "--precision", "fp32", "--sampler", "euler", "--steps", "2"]
    pack += ["-o", folder / "out"]
    return {
        "package": pack,
        "replace": [*pack[:-4], "--steps", "3", *pack[-2:], "--force"],
        "generate": ["generate", PROMPT, "-m", model, "--sampler", "euler", "--steps", "1", "-o", folder / "old.png"],
        "calibrate": ["calibrate", model, "--calls", "32", "--sampler", "euler", "--steps", "2", "-o", folder / "set"],
        "prune": ["prune", model, "--ratio", "0.2", "--importance", "l1", "--restore", "none", "--calls", "16",
                  "--calibration", folder.parent / "set", "-o", folder / "pruned"],
    }  # fmt: skip


@pytest.mark.parametrize("state", ["full", "closed"])
@pytest.mark.parametrize("verb", ["package", "replace", "generate", "calibrate", "prune"])
def test_a_disk_that_takes_nothing_is_said_and_nothing_old_is_lost(verb, state, run, model, disk, tmp_path):
    words = commands(model, disk.folder)
    if verb == "replace":
        assert run(*words["package"])[0] == 0
    if verb == "prune":
        record = [tmp_path / "set" if w == disk.folder / "set" else w for w in words["calibrate"]]
        assert run(*record)[0] == 0
    Image.new("RGB", (8, 8), "red").save(disk.folder / "old.png")
    before = contents(disk.folder)
    if state == "full":
        disk.fill(leave_bytes=12 << 10)
        if verb == "generate":
            disk.free()
            disk.fill()
    else:
        disk.close()
    code, said = run(*words[verb])
    assert code == 5, said
    assert THREE_PARTS.match(said.splitlines()[-1]), said
    assert re.search("no space left|MiB free" if state == "full" else "closed to this user", said)
    kept = contents(disk.folder)
    assert {path: kept.get(path) for path in before} == before
    assert not [path for path in kept if path.startswith(("out/", "pruned/", ".")) and path not in before]
    if state == "full":
        disk.free()
        assert run(*words[verb])[0] == 0
        if verb in ("package", "replace"):
            bundle.read(disk.folder / "out" / "model-torch.edgesd", verify=True)
        if verb == "calibrate":
            sets.open_set(disk.folder / "set")


def test_a_full_cache_disk_is_said_and_the_old_bundle_stays(run, model, disk, tmp_path, monkeypatch):
    words = commands(model, tmp_path)
    assert run(*words["package"])[0] == 0
    before = contents(tmp_path / "out")
    monkeypatch.setenv("EDGESD_CACHE", str(disk.folder))
    disk.fill(leave_bytes=100 << 10)
    code, said = run(*words["replace"])
    assert code == 5
    assert "no space left" in said
    assert THREE_PARTS.match(said.splitlines()[-1]), said
    assert "EDGESD_CACHE" in said
    assert contents(tmp_path / "out") == before


def test_a_cache_that_is_closed_is_said(run, model, disk, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESD_CACHE", str(disk.folder / "cache"))
    disk.close()
    code, said = run(*commands(model, tmp_path)["package"])
    assert code == 5
    assert THREE_PARTS.match(said.splitlines()[-1]), said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
def test_of_two_packagers_on_one_folder_one_wins_and_one_says_so(tmp_path):
    packager_ = Packager(Forked, tmp_path)
    first = packager_.start(2)
    while not list(packager_.out.parent.glob(".*.new")):
        assert first.process.exitcode is None, packager_.log.read_text()
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    packager_.log = tmp_path / "second.log"
    try:
        assert packager_.start(3).wait() == 2
    finally:
        os.kill(first.pid, signal.SIGCONT)
    said = packager_.log.read_text().strip().splitlines()[-1]
    assert "another edgesd is writing" in said
    assert THREE_PARTS.match(said), said
    assert first.wait() == 0
    assert packager_.steps() == 2
    assert packager_.leftovers() == []


def test_a_clock_that_runs_backwards_changes_nothing(run, model, tmp_path, monkeypatch):
    hours = iter(range(10**6, 0, -1))
    monkeypatch.setattr(time, "time", lambda: next(hours) * 3600.0)
    words = commands(model, tmp_path)
    assert run(*words["package"])[0] == 0
    for stage in (tmp_path / "cache" / "stages").iterdir():
        os.utime(stage, (4e9, 4e9))  # made in 2096, before the clock was set right
    code, said = run(*words["package"], "--force")
    assert code == 0
    assert said.count("cached") == 5
    bundle.read(tmp_path / "out" / "model-torch.edgesd", verify=True)
