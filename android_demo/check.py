"""Compiles the Kotlin runtime and runs its tests on this machine's JVM; draws whole pictures; checks the app's sources.

    python android_demo/check.py [FOLDER]

FOLDER (default build/android) keeps the compiler and a bundle between runs. The Kotlin compiler comes out of the PyPI
package kotlin-jupyter-kernel; java must be there. The app is compiled against stubs (android_demo/stubs): its syntax
and types, not its behaviour. Exit code 0: all passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = "kotlin-jupyter-kernel==0.19.0.944"
JAVA = ("java", "-Xmx1500m", "-XX:TieredStopAtLevel=1")


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "build" / "android").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    jars, classes, app = compiler(folder), folder / "classes", folder / "app"
    standard = next(jars.glob("kotlin-stdlib-*.jar"))
    compile_kotlin(jars, [HERE / "edgesd" / "src"], classes, [standard])
    compile_kotlin(jars, [HERE / "app" / "src", HERE / "stubs"], app, [standard, classes])
    print("the app's sources compile against stubs", flush=True)
    server = [sys.executable, str(HERE / "serve.py")]
    path = os.pathsep.join(map(str, (classes, standard)))
    golden = HERE.parent / "tests" / "golden"
    return subprocess.run([*JAVA, "-cp", path, "edgesd.MainKt", str(golden), str(bundle(folder)), *server]).returncode


def compiler(folder: Path) -> Path:
    """The folder of the compiler's jars, fetched once."""
    jars = folder / COMPILER
    if not jars.is_dir():
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), COMPILER]
        subprocess.run(fetch, check=True)
        part = jars.with_name("jars.part")
        part.mkdir(exist_ok=True)
        wheel = next(folder.glob("kotlin_jupyter_kernel-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("run_kotlin_kernel/jars/"):
                    (part / Path(name).name).write_bytes(archive.read(name))
        part.rename(jars)
        wheel.unlink()
    return jars


def compile_kotlin(jars: Path, sources: list[Path], into: Path, classpath: list[Path]) -> None:
    files = [str(path) for source in sources for path in sorted(source.rglob("*.kt"))]
    joined = os.pathsep.join(map(str, classpath))
    command = [*JAVA, "-cp", f"{jars}/*", "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-nowarn"]
    options = ["-no-stdlib", "-no-reflect", "-jvm-target", "17", "-cp", joined, "-d", str(into)]
    subprocess.run([*command, *options, *files], check=True)


def bundle(folder: Path) -> Path:
    """A tflite bundle of the embedded model, made once for its weights. Without int8, where the last bit of a sum that
    another language rounds otherwise can change an integer, and with it the noise of the whole picture."""
    made = folder / "shapes-tflite.edgesd"
    manifest, weights = made / "manifest.json", (HERE.parent / "edgesd" / "models" / "shapes").glob("*/*")
    if not manifest.is_file() or manifest.stat().st_mtime < max(path.stat().st_mtime for path in weights):
        command = [sys.executable, "-m", "edgesd.cli", "package", "--target", "tflite", "--profile", "quality"]
        subprocess.run([*command, "-o", str(folder), "--force"], check=True, stdout=subprocess.DEVNULL)
    return made


if __name__ == "__main__":
    sys.exit(main())
