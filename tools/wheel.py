"""Build a wheel that can be given away, and try it: what `make wheel` runs.

The wheel is for x86-64 with AVX2 (our kernels choose AVX-512 at run time), carries the manylinux tag of the oldest
glibc that it runs on, and is kept in dist/ if all of this works: `auditwheel show`; an installation in a fresh
environment without a compiler on the PATH that answers with the demo model; the same on an emulated Haswell, if
qemu-user is installed, and a named error on an emulated CPU without AVX2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "wheel"
DIST = ROOT / "dist"
CHAT = ["-m", "pyllama_dsv4", "chat", "-n", "4", "--seed", "1"]


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


def build() -> Path:
    """Build, tag and return the wheel."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    say("building the wheel: minutes, as the first time")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(WHEELS), str(ROOT)]
    expect(run([*command, "-Ccmake.define.PYLLAMA_DSV4_PORTABLE=ON"], cwd=ROOT), "pip wheel")
    (plain,) = WHEELS.glob("*.whl")
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(DIST), str(plain)]
    expect(run(repair), "auditwheel repair")
    wheel = max(DIST.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    print(expect(run([sys.executable, "-m", "auditwheel", "show", str(wheel)]), "auditwheel show").strip())
    return wheel


def try_out(wheel: Path) -> None:
    """Install the wheel where nothing else is, and let it answer."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "env" / "bin" / "python"
        expect(run([sys.executable, "-m", "venv", str(python.parent.parent)]), "venv")
        expect(run([str(python), "-m", "pip", "install", "-q", str(wheel)]), "pip install")
        environment = {
            "PATH": str(python.parent),  # no compiler, no git
            "HOME": folder,
            "XDG_CACHE_HOME": f"{folder}/cache",
            "LANG": os.environ.get("LANG", "C.UTF-8"),
        }
        say("in a fresh environment without a compiler")
        answer = expect(run([str(python), *CHAT], cwd=folder, env=environment, input="Hello\n"), "chat")
        print(
            expect(
                run([str(python), "-m", "pyllama_dsv4", "--version"], cwd=folder, env=environment),
                "--version",
            )
        )

        qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
        if qemu is None:
            say("qemu-x86_64 is not installed: other CPUs were not tried")
            return
        say("on an emulated Haswell")
        expect(
            run([qemu, "-cpu", "Haswell", str(python), *CHAT], cwd=folder, env=environment, input="Hello\n"),
            "Haswell",
        )
        say("on an emulated Nehalem, which has no AVX2")
        result = run(
            [qemu, "-cpu", "Nehalem", str(python), *CHAT], cwd=folder, env=environment, input="Hello\n"
        )
        if result.returncode == 0 or "avx2" not in result.stderr or "Traceback" in result.stderr:
            fail(
                f"expected a named error about avx2, got exit code {result.returncode}: {result.stderr[-2000:]}"
            )
        print(result.stderr.strip())
        if not answer.strip():
            fail("the answer is empty")


def main() -> None:
    wheel = build()
    try:
        try_out(wheel)
    except SystemExit:
        wheel.unlink()
        raise
    say(f"{wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
