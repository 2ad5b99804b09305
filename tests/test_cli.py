"""The command line: one clear line, the right exit code, no partial file; results on stdout, the rest on stderr."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from edgesd import cli

PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["edgesd", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return stopped.value.code, said.out, said.err

    return command


def test_generate_saves_and_repeats_to_the_pixel(run, tmp_path):
    code, out, _ = run("generate", PROMPT, "--steps", 2, "--seed", 0, "--json", "-o", "first.png")
    told = json.loads(out)["pictures"][0]
    assert (code, told["settings"]["seed"], told["calls"]) == (0, 0, 4)
    code, _, _ = run("generate", "--from", "first.png", "-o", "again.png")
    assert code == 0
    assert np.array_equal(Image.open("first.png"), Image.open("again.png"))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".png") == ["again.png", "first.png"]


def test_count_numbers_the_files_and_each_repeats_alone(run):
    assert run("generate", PROMPT, "--steps", 1, "--seed", 5, "--count", 2, "-o", "p.png")[0] == 0
    assert run("generate", "--from", "p-2.png", "-o", "second.png")[0] == 0
    assert np.array_equal(Image.open("p-2.png"), Image.open("second.png"))
    assert not np.array_equal(Image.open("p-1.png"), Image.open("p-2.png"))


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["generate", ""], "empty prompt"),
        (["generate", "x", "-m", "nothing-here"], "nothing-here"),
        (["generate", "x", "--sampler", "wishful"], "wishful"),
        (["generate", "x", "--steps", "0"], "0 steps"),
        (["generate", "x", "--seed", "-1"], "seed -1"),
        (["generate", "x", "--seed", str(2**53)], "seed"),
        (["generate", "x", "--count", "0"], "0 pictures"),
        (["generate", "x", "-o", "picture.jpg"], ".png"),
        (["generate", "x", "--mask", "m.png"], "mask without a picture"),
        (["generate", "x", "--nonsense"], "--nonsense"),
        (["package", "--target", "toaster"], "toaster"),
        (["package", "--target", "openvino", "--precision", "fp64"], "fp64"),
        (["package", "--target", "coreml", "--palette", "6"], "a palette of 6 bits in int8"),
        (["package", "--target", "openvino", "--size-px", "100x100"], "100x100"),
        (["package", "--target", "openvino", "--steps", "9-3"], "9-3"),
        (["package", "--target", "openvino", "--sampler", "wishful"], "wishful"),
        (["inspect", "nothing-here"], "nothing-here"),
    ],
)
def test_bad_requests_exit_2_with_one_line(run, tmp_path, words, phrase):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert phrase in err
    assert len(err.strip().splitlines()) == 1
    assert not [p for p in tmp_path.iterdir() if p.name != "cache"]


def test_a_corrupt_picture_exits_4(run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"not a picture")
    code, _, err = run("generate", "--from", "broken.png")
    assert code == 4
    assert "broken.png" in err


def test_a_truncated_weight_file_exits_4(run, tmp_path):
    import shutil

    from edgesd.models.load import embedded_folder

    shutil.copytree(embedded_folder(), tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    code, _, err = run("generate", "x", "-m", "model")
    assert code == 4
    assert "unet" in err
    weights.unlink()
    assert run("generate", "x", "-m", "model")[0] == 4


def test_a_full_disk_is_said_and_leaves_nothing(run, monkeypatch, tmp_path):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    code, _, err = run("generate", PROMPT, "--steps", 1, "-o", "x.png")
    assert code == 5
    assert "no space" in err.lower()
    assert not list(tmp_path.glob("*.png*")) + list(tmp_path.glob(".*png*"))


def test_the_schema_and_the_samplers_are_json(run):
    assert json.loads(run("manifest-schema")[1])["title"] == "Manifest"
    listed = json.loads(run("samplers", "--json")[1])
    assert "dpmpp_2m_karras" in json.dumps(listed)


def test_every_verb_has_help(run):
    for command in cli.app.registered_commands:
        name = command.name if command.name is not None else command.callback.__name__
        code, out, _ = run(name, "--help")
        assert code == 0
        assert name in out


def test_ctrl_c_while_the_command_line_still_loads_is_clean_too(monkeypatch, capsys):
    from edgesd.__main__ import main

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("edgesd.cli.main", interrupted)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_leaves_no_file(tmp_path):
    words = [sys.executable, "-m", "edgesd", "generate", PROMPT, "--steps", "900", "-o", str(tmp_path / "x.png")]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, env={**os.environ, "EDGESD_CACHE": str(tmp_path)}
    )
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.png"))


def test_a_run_that_was_stopped_goes_on_from_its_state_file(run, tmp_path, monkeypatch):
    words = ("generate", PROMPT, "--steps", 5, "--seed", 8)
    assert run(*words, "-o", "whole.png")[0] == 0
    from edgesd import kept as room

    keep, kept = room.save_state, []

    def stop_after_three(*arguments):
        keep(*arguments)
        kept.append(arguments)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(room, "save_state", stop_after_three)
    assert run(*words, "-o", "stopped.png", "--state", "run.state")[0] == 130
    assert not (tmp_path / "stopped.png").exists()
    assert run("generate", PROMPT, "--steps", 5, "--seed", 9, "--state", "run.state")[0] == 2
    assert run(*words, "-o", "stopped.png", "--state", "run.state")[0] == 0
    assert len(kept) == 5
    assert not (tmp_path / "run.state").exists()
    assert np.array_equal(Image.open("whole.png"), Image.open("stopped.png"))
