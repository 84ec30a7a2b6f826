"""Build wheels that can be given away, and try them: what `make wheel` runs. wheel.py [--unit-tests] [PYTHON ...]

PYTHON is a version (3.12) or a path; without one, a wheel is built for the Python that runs this. A wheel is for one
version, because numpy's binding has no stable interface; the engine is compiled once, and for the next version comes
from ccache.

A wheel is for x86-64 with AVX2 (our kernels choose AVX-512 at run time), carries the manylinux tag of the oldest
glibc that it runs on, and is kept in dist/ if all of this works: `auditwheel show`; an installation in a fresh
environment without a compiler on the PATH that answers with the demo model; the same on an emulated Haswell, if
qemu-user is installed, and a named error on an emulated CPU without AVX2; with --unit-tests those of tests/unit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
CHAT = ["-m", "pyllama_dsv4", "chat", "-n", "4", "--seed", "1"]
OLDEST = (3, 10)
_WHO = "import sys; print(sys.implementation.name, *sys.version_info[:2])"


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"error: {text}")


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert isinstance(result, subprocess.CompletedProcess)
    return result


def expect(result: subprocess.CompletedProcess[str], what: str) -> str:
    if result.returncode != 0:
        fail(f"{what}: exit code {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return str(result.stdout)


@dataclass(frozen=True)
class Python:
    """An interpreter to build for.

    Attributes:
        path: Of its program.
        version: Major and minor.
    """

    path: Path
    version: tuple[int, int]

    @property
    def tag(self) -> str:
        """As wheels name it, ``cp312``."""
        return f"cp{self.version[0]}{self.version[1]}"


def find_python(name: str) -> Python:
    """Return the interpreter that `name` means: a path, or a version on the PATH or among pyenv's.

    Raises:
        SystemExit: there is none, or the package does not run on it.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    if os.sep in name:
        candidates = [Path(name)]
    else:
        found = shutil.which(f"python{name}")
        candidates = [Path(found)] if found else []
        candidates += sorted(pyenv.glob(f"{name}*/bin/python{name}"))
    for path in candidates:
        if not path.is_file():
            continue
        result = run([str(path), "-c", _WHO])  # a shim of pyenv's may be on the PATH and not work
        if result.returncode != 0:
            continue
        implementation, major, minor = result.stdout.split()
        version = (int(major), int(minor))
        if implementation != "cpython" or version < OLDEST:
            fail(
                f"{path} is {implementation} {major}.{minor}; CPython {OLDEST[0]}.{OLDEST[1]} or newer is needed"
            )
        return Python(path, version)
    fail(
        f"no Python '{name}' on the PATH or in {pyenv}; give its path: make wheel PYTHONS=/opt/python/bin/python3"
    )
    raise AssertionError


def build(python: Python, folder: Path) -> Path:
    """Build, tag and return the wheel for an interpreter. `folder` is for what only the build needs."""
    wheels = WHEELS / python.tag
    shutil.rmtree(wheels, ignore_errors=True)
    log = folder / "ccache.log"
    environment = {**os.environ, "CCACHE_STATSLOG": str(log)}
    program = folder / "build" / "bin" / "python"
    expect(run([str(python.path), "-m", "venv", str(program.parent.parent)]), "venv")
    pip = [str(program), "-m", "pip", "--disable-pip-version-check"]
    expect(run([*pip, "install", "-q", "-U", "pip"]), "pip install -U pip")
    say(f"building the wheel for Python {python.version[0]}.{python.version[1]}")
    start_s = time.monotonic()
    command = [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    portable = "-Ccmake.define.PYLLAMA_DSV4_PORTABLE=ON"
    expect(run([*command, portable], cwd=ROOT, env=environment), "pip wheel")
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    counts = Counter(
        re.findall(r"^(cache_miss|direct_cache_hit|preprocessed_cache_hit)$", text, re.MULTILINE)
    )
    n_compiled = counts["cache_miss"]
    n_taken = counts.total() - n_compiled
    print(f"{time.monotonic() - start_s:.0f} s: {n_compiled} files compiled, {n_taken} taken from ccache")
    (plain,) = wheels.glob("*.whl")
    repaired = wheels / "repaired"
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(repaired), str(plain)]
    expect(run(repair), "auditwheel repair")
    (wheel,) = repaired.glob("*.whl")
    if not re.search(rf"-{python.tag}-{python.tag}-manylinux\w+_x86_64\.whl$", wheel.name):
        fail(f"the wheel is called {wheel.name}, which is not for {python.tag} on manylinux")
    print(expect(run([sys.executable, "-m", "auditwheel", "show", str(wheel)]), "auditwheel show").strip())
    return wheel


def try_out(python: Python, wheel: Path, folder: Path, *, unit_tests: bool) -> None:
    """Install the wheel where nothing else is, and let it answer."""
    program = folder / "env" / "bin" / "python"
    expect(run([str(python.path), "-m", "venv", str(program.parent.parent)]), "venv")
    expect(run([str(program), "-m", "pip", "install", "-q", str(wheel)]), "pip install")
    environment = {
        "PATH": str(program.parent),  # no compiler, no git
        "HOME": str(folder),
        "XDG_CACHE_HOME": f"{folder}/cache",
        "LANG": os.environ.get("LANG", "C.UTF-8"),
    }
    say("in a fresh environment without a compiler")
    options: dict[str, object] = {"cwd": folder, "env": environment, "input": "Hello\n"}
    answer = expect(run([str(program), *CHAT], **options), "chat")
    if not answer.strip():
        fail("the answer is empty")
    print(expect(run([str(program), "-m", "pyllama_dsv4", "--version"], **options), "--version"))
    emulate(program, options)
    if unit_tests:
        say("unit tests")
        expect(run([str(program), "-m", "pip", "install", "-q", f"{wheel}[test]"]), "pip install")
        # the script, not python -m: that would put the sources before what is installed
        pytest = [str(program.with_name("pytest")), "-q", "-p", "no:cacheprovider", "tests/unit"]
        text = expect(run(pytest, cwd=ROOT), "pytest tests/unit")
        print(text.strip().splitlines()[-1])


def emulate(program: Path, options: dict[str, object]) -> None:
    """Let the installed wheel answer on the oldest CPU that it is for, and refuse an older one."""
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if qemu is None:
        say("qemu-x86_64 is not installed: other CPUs were not tried")
        return
    say("on an emulated Haswell")
    expect(run([qemu, "-cpu", "Haswell", str(program), *CHAT], **options), "Haswell")
    say("on an emulated Nehalem, which has no AVX2")
    result = run([qemu, "-cpu", "Nehalem", str(program), *CHAT], **options)
    if result.returncode == 0 or "avx2" not in result.stderr or "Traceback" in result.stderr:
        fail(f"expected a named error about avx2, got exit code {result.returncode}: {result.stderr[-2000:]}")
    print(result.stderr.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description="Build wheels for other machines, and try them.")
    parser.add_argument("--unit-tests", action="store_true", help="run tests/unit on every wheel")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="versions (3.12) or paths")
    args = parser.parse_args()
    pythons = [find_python(name) for name in args.pythons or [sys.executable]]
    kept = []
    for python in pythons:
        with tempfile.TemporaryDirectory() as folder:
            wheel = build(python, Path(folder))
            try_out(python, wheel, Path(folder), unit_tests=args.unit_tests)
        DIST.mkdir(exist_ok=True)
        kept.append(Path(shutil.copy(wheel, DIST)))
    for path in kept:
        say(f"{path.relative_to(ROOT)}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
