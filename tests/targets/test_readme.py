"""The target written out in targets/README.md is whole: it lowers, opens and agrees with torch."""

import re
import sys
import types
from pathlib import Path

import pytest
import tiny

from edgesd import targets
from edgesd.errors import SetupError
from edgesd.manifest import Axes

README = Path(targets.__file__).parent / "README.md"


def test_the_example_target_works_as_written(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    example = types.ModuleType("example_target")
    exec(compile(source, "example_target", "exec"), example.__dict__)
    monkeypatch.setitem(sys.modules, "example_target", example)
    monkeypatch.setitem(targets.TARGETS, "pt2", "example_target")
    target = targets.load("pt2", lowering=True)
    axes = Axes(size_px=tiny.SIZE_PX)
    manifest, components = tiny.lower_all(target, tmp_path, tiny.modules(), tiny.spec(), axes, ("vae_decoder",))
    inputs, truth = tiny.real_calls(components)["vae_decoder"]
    got = target.open(tmp_path, manifest).run("vae_decoder", inputs)
    assert tiny.snr_db(truth["image"], got["image"]) > 90
    assert any("conv" in kind for kind, _ in target.count_operations(tmp_path / "vae_decoder.pt2").counts)
    assert target.runtime_version().startswith("torch ")


def test_every_built_in_target_is_listed():
    table = README.read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in targets.TARGETS)


def test_a_missing_converter_says_which_extras_bring_it(monkeypatch):
    monkeypatch.setattr(targets, "missing_modules", lambda target, lowering=False: ["litert_torch"])
    with pytest.raises(SetupError, match=r"edgesd\[package,litert,litert-export\]"):
        targets.load("tflite", lowering=True)
    with pytest.raises(SetupError, match=r"edgesd\[litert\]"):
        targets.load("tflite")
