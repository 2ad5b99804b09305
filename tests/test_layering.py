"""Who may import whom, read from the source: the rules of the house as a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VENDORS = {
    "onnx", "onnxruntime", "onnxscript", "openvino", "coremltools", "ai_edge_litert", "litert_torch", "nncf",
    "tensorflow",
}  # fmt: skip
TORCH = {"torch", "diffusers", "transformers", "accelerate"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("edgesd", "edgesd"), ("targets", "edgesd.targets"), ("calibration", "edgesd.calibration")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(p for p in parts if p != "__init__")])
            found[name] = path
    return found


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Dotted names a module imports; lazy=False leaves out those inside functions and `if TYPE_CHECKING`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom) and child.level == 0 and child.module is not None:
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


MODULES = modules()


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("edgesd.runtime")])
def test_the_runtime_never_needs_torch_or_a_vendor(name):
    every = imports(MODULES[name], lazy=True)
    assert not roots(every) & (TORCH | VENDORS)
    forbidden = ("compress", "packager", "models", "sampling", "targets", "calibration")
    assert not [i for i in every if i.startswith(tuple(f"edgesd.{room}" for room in forbidden))]


def test_the_ground_stands_alone():
    order = ["errors", "files", "recipe", "manifest", "bundle"]
    for position, name in enumerate(order):
        every = imports(MODULES[f"edgesd.{name}"], lazy=True)
        assert not roots(every) & (TORCH | VENDORS), name
        mine = {i for i in every if i.startswith("edgesd.") and i in MODULES}
        assert mine <= {f"edgesd.{lower}" for lower in order[:position]}, name


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("edgesd.targets.")])
def test_targets_import_vendors_inside_functions_and_never_each_other(name):
    # What a target's own module loads from inside its functions may have torch at its top; a vendor's SDK never.
    inner = name.count(".") > 2
    assert not roots(imports(MODULES[name], lazy=False)) & (VENDORS if inner else VENDORS | TORCH)
    shared = ("edgesd.targets._",)
    own = ".".join(name.split(".")[:3])
    others = [i for i in imports(MODULES[name], lazy=True) if i in MODULES and i.startswith("edgesd.targets.")]
    assert not [i for i in others if not i.startswith((*shared, own))]


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(("edgesd.compress", "edgesd.calibration"))])
def test_compression_knows_torch_but_not_diffusers(name):
    assert not roots(imports(MODULES[name], lazy=True)) & {"diffusers"}


def test_nobody_imports_the_command_line():
    for name, path in MODULES.items():
        assert name in ("edgesd.cli", "edgesd.__main__") or "edgesd.cli" not in imports(path, lazy=True), name


def test_targets_are_loaded_by_name_never_imported():
    for name, path in MODULES.items():
        if not name.startswith("edgesd.targets"):
            static = {i for i in imports(path, lazy=True) if i.startswith("edgesd.targets.") and i in MODULES}
            assert not static, f"{name} imports {static}"


def test_import_edgesd_is_light():
    code = "import sys, edgesd, edgesd.cli; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [m for m in sorted(TORCH | VENDORS | {"scipy", "matplotlib"}) if f"'{m}'" in loaded]


def test_opening_a_bundle_needs_no_torch():
    code = "import sys, edgesd.sources, edgesd.drawing; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["False", "False"]
