"""What the browser's readers follow is what Python says today."""

import importlib.util
import json
from pathlib import Path

import pytest

WEB = Path(__file__).resolve().parent.parent / "web_demo"


def schemas() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("schemas", WEB / "scripts" / "schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.schemas()


@pytest.mark.parametrize("name", ["manifest", "policy", "golden"])
def test_the_checked_in_schema_is_current(name):
    written = json.loads((WEB / "src" / "runtime" / "generated" / f"{name}.schema.json").read_text())
    do = "python web_demo/scripts/schemas.py && npm --prefix web_demo run generate"
    assert written == json.loads(schemas()[f"{name}.schema.json"]), f"run: {do}"


def test_the_lock_file_names_no_registry():
    assert "resolved" not in (WEB / "package-lock.json").read_text()
