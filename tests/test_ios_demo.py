"""What the Swift package holds a copy of, and that its Xcode project is whole; its own tests are `make test-ios`."""

import json
import re
from pathlib import Path

import pytest

import edgesd
from edgesd import bundle
from edgesd.runtime.settings import Settings

IOS = Path(__file__).parents[1] / "ios_demo"
RECORDED = IOS / "EdgeSD" / "Tests" / "EdgeSDTests" / "recorded"


def test_the_app_ships_the_policies_of_python():
    ours = Path(edgesd.__file__).parent / "runtime" / "policies"
    theirs = IOS / "EdgeSD" / "Sources" / "EdgeSD" / "policies"
    assert {p.name: p.read_bytes() for p in theirs.iterdir()} == {p.name: p.read_bytes() for p in ours.iterdir()}


def test_the_recorded_run_is_a_bundle_of_todays_format():
    manifest = bundle.read(RECORDED).manifest
    settings = Settings.from_json(json.loads((RECORDED / "settings.json").read_text()))
    assert settings.sampler == manifest.samplers[0].name
    assert settings.changes


@pytest.mark.slow
def test_the_recorded_run_is_what_python_draws_today():
    import numpy as np
    from safetensors.numpy import load_file

    pipeline = edgesd.open_pipeline("shapes")
    settings = Settings.from_json(json.loads((RECORDED / "settings.json").read_text()))
    from edgesd.runtime.generate import sample

    *_, picture = sample(pipeline, settings)
    recorded = load_file(RECORDED / "picture.safetensors")
    assert np.abs(picture.image.astype(int) - recorded["image"]).max() <= 1


def test_the_xcode_project_names_only_what_is_there():
    text = (IOS / "EdgeSDDemo.xcodeproj" / "project.pbxproj").read_text()
    used = re.findall(r"ED5D[0-9]{20}", text)
    defined = set(re.findall(r"(ED5D[0-9]{20}) = \{", text))
    assert set(used) == defined
    assert "path = App;" in text
    assert "relativePath = EdgeSD;" in text
    assert "INFOPLIST_FILE = Info.plist;" in text
    for name in ("App/EdgeSDDemoApp.swift", "EdgeSD/Package.swift", "Info.plist"):
        assert (IOS / name).is_file()
