"""`edgesd package` killed at any moment: the old bundle or the new one, whole; the next run goes on where it was.

In CI the command runs in processes forked with torch imported (and its stages in itself, so that a kill is total);
the slow test runs it as people do. Which stages a run took from the cache is read off its own lines.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import tiny

from edgesd import bundle

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork")
STAGES = ("reference", "text_encoder/", "unet/", "vae_decoder/", "vae_encoder/", "validate")
IMPORTED = [
    "torch._dynamo", "transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_tiny",
    "diffusers.models.unets.unet_2d_condition", "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "edgesd.packager", "edgesd.sources", "edgesd.models.count", "edgesd.models.modules", "edgesd.sampling.compile",
]  # fmt: skip
MOVE_IN_S = 0.05  # what comes after the last line: sealing, syncing, two renames


def command(words, log, environment):
    """In a forked process: `edgesd` with the test target, no children."""
    import inline

    from edgesd import cli, targets

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    targets.TARGETS["torch"] = "torch_target"
    inline.install()
    sys.argv = ["edgesd", *words]
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        cli.main()


class Forked:
    """The command in a fork of a process that has imported all of it."""

    target, pause_s = "torch", 0.001

    def __init__(self, words, log, environment):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.process = context.Process(target=command, args=(words, log, environment))
        self.process.start()
        self.pid = self.process.pid

    def wait(self):
        self.process.join(300)
        return self.process.exitcode


class Spawned:
    """The command as a person starts it."""

    target, pause_s = "openvino", 0.01

    def __init__(self, words, log, environment):
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgesd", *words],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
            )
        self.pid = self.process.pid

    def wait(self):
        return self.process.wait(900)


class Packager:
    """Runs of one command on one output folder and one cache, each told apart by its count of steps."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        self.source = tiny.folder("sd1", folder / "model")
        self.out = folder / "out" / f"model-{kind.target}.edgesd"
        for name in ("temp", "cache"):
            (folder / name).mkdir()
        self.log = folder / "log"

    def start(self, steps):
        words = ["package", self.source, "--target", self.kind.target, "--precision", "fp32", "--sampler", "euler"]
        words += ["--steps", str(steps), "-o", str(self.out.parent), "--force"]
        environment = {"EDGESD_CACHE": str(self.folder / "cache"), "TMPDIR": str(self.folder / "temp")}
        self.log.write_bytes(b"")
        return self.kind(words, self.log, environment)

    def lines(self):
        """Stages done so far, as the command says them: (stage, what was noted of it)."""
        said = self.log.read_text(errors="replace").splitlines()
        parts = [line.split(": ", 1)[1].split() for line in said if line.startswith(f"{self.kind.target}: ")]
        return [(words[0], words[1]) for words in parts if words[0].startswith(STAGES)]

    def stop(self, steps, after, delay_s, number=signal.SIGKILL):
        """Starts a run and signals it `delay_s` after its stage number `after` (0: after its start); its exit code."""
        run = self.start(steps)
        while len(self.lines()) < after and not (exited := _exited(run)):
            time.sleep(self.kind.pause_s)
        time.sleep(0 if after and exited else delay_s)
        _signal(run.pid, number)
        return run.wait()

    def steps(self):
        """The bundle that stands there, every hash of it computed, by its count of steps."""
        return bundle.read(self.out, verify=True).manifest.samplers[0].steps[0]

    def leftovers(self):
        temporary = [p for p in (self.folder / "temp").iterdir() if not p.name.startswith("pymp-")]
        beside = [p for p in self.out.parent.iterdir() if p != self.out]
        cache = self.folder / "cache" / "stages"
        stages = [p for p in cache.glob(".*") if p.suffix != ".lock" or not (cache / p.name[1:-5]).exists()]
        return temporary + beside + stages


def _exited(run):
    return run.process.exitcode is not None if isinstance(run, Forked) else run.process.poll() is not None


def _signal(pid, number):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_at_many_moments(kind, moments, folder):
    packager = Packager(kind, folder)
    assert packager.start(1).wait() == 0, packager.log.read_text()  # the old bundle; files and imports are warm now
    shutil.rmtree(folder / "cache" / "stages")
    began = time.perf_counter()
    assert packager.start(1).wait() == 0, packager.log.read_text()
    fresh_s, fresh = time.perf_counter() - began, packager.lines()
    assert [name for name, note in fresh if note != "cached"] == [name for name, _ in fresh]
    assert len(fresh) == len(STAGES)
    random.seed(moments)
    seconds, saved, replaced = [], [], 0
    for index in range(moments):
        steps, after = 2 + index, index % (len(STAGES) + 1)
        before = packager.steps()
        shutil.rmtree(folder / "cache" / "stages")
        packager.stop(steps, after, random.uniform(0, MOVE_IN_S if after == len(STAGES) else fresh_s / len(STAGES)))
        done = {name for name, _ in packager.lines() if name != "validate"}
        standing = packager.steps()
        assert standing in (before, steps)
        replaced += standing == steps
        began = time.perf_counter()
        assert packager.start(steps).wait() == 0, packager.log.read_text()
        seconds.append(time.perf_counter() - began)
        reused = {name for name, note in packager.lines() if note == "cached"}
        assert reused >= done, "a finished stage was done again"
        assert len(done) >= after - 1
        assert packager.steps() == steps
        assert packager.leftovers() == []
        saved.append(len(reused))
    print(
        f"\nfresh {fresh_s:.1f} s, after a kill {min(seconds):.1f} to {max(seconds):.1f} s; "
        f"stages of 5 not done again: {saved}; {replaced} of {moments} kills came after the move"
    )


def test_package_is_killed_at_10_moments(tmp_path):
    kill_at_many_moments(Forked, 10, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_package_is_killed_at_50_moments(tmp_path):
    kill_at_many_moments(Spawned, 50, tmp_path)


@pytest.mark.parametrize("after", [1, 5])
def test_ctrl_c_keeps_the_old_bundle_and_what_was_finished(after, tmp_path):
    packager = Packager(Forked, tmp_path)
    assert packager.start(1).wait() == 0
    shutil.rmtree(tmp_path / "cache" / "stages")
    code = packager.stop(2, after, 0.0, signal.SIGINT)
    assert code == 130, packager.log.read_text()
    assert packager.log.read_text().splitlines()[-1].startswith("edgesd: interrupted")
    assert "Traceback" not in packager.log.read_text()
    assert packager.steps() == 1
    assert packager.leftovers() == []
    assert packager.start(2).wait() == 0
    assert len([note for _, note in packager.lines() if note == "cached"]) >= after
    assert packager.steps() == 2
