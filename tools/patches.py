#!/usr/bin/env python3
"""Maintain the patch series against the pinned llama.cpp: start, export, verify, readme.

Owns the text format of ``patches/`` (headers, diffs, ``series``, the generated ``README.md``) and the scratch
git tree in which patches are edited. Leaves fetching, and applying for a build, to ``buildutils/vendor.py``.
Needs Python and git only, no compiler; the result never depends on the user's git settings.

How to change a patch::

    tools/patches.py start                     # build/patches: the pristine pin, then one commit per patch
    cd build/patches                           # edit
    git commit -a --fixup=:/'ggml: register'   # or a new commit whose message carries the header fields
    GIT_SEQUENCE_EDITOR=: git rebase -i --autosquash pristine
    cd - && tools/patches.py export && tools/patches.py verify

A new commit needs the fields of ``FIELDS`` below its subject line, and ``Patch-File: <topic>.patch``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
SCRATCH = ROOT / "build" / "patches"

FIELDS = ("Subject", "Purpose", "Kind", "Why-a-patch", "Upstream", "Drop-when", "Native", "Tests")
OPTIONAL_FIELDS = ("Relies-on",)
KINDS = ("hook", "backport", "fix")
FILE_FIELD = "Patch-File"  # in commit messages only: which file of the series a commit is

BASE_TAG = "pristine"  # the first commit of a scratch tree
START_REF = "refs/patches/start"  # what the last start read, or the last export wrote

AUTHOR = "pyllama-dsv4 patches"
EMAIL = "patches@invalid"
DATE = "2000-01-01T00:00:00+00:00"

BUDGET_LINE = re.compile(r"#\s*budget:\s*(\S+)\s+(\d+)\s*(.*)")
FIELD_LINE = re.compile(r"([A-Z][A-Za-z-]*):(?: (.*))?")
PATCH_NAME = re.compile(r"[a-z0-9][a-z0-9-]*\.patch")
SUBJECT = re.compile(r"[a-z0-9./_-]+: \S.*")

# Every choice that a user's configuration could make differently is spelled out.
DIFF_OPTIONS = (
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--no-renames",
    "--full-index",
    "--unified=3",
    "--inter-hunk-context=0",
    "--diff-algorithm=myers",
    "--indent-heuristic",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)


class PatchError(Exception):
    """A patch, the series or the scratch tree is not as it must be; the message says what and what to do."""


@dataclass(frozen=True)
class Patch:
    """One patch: its file name, its header fields and its diff.

    Attributes:
        name: File name in ``patches/``.
        header: Field name to text; continuation lines are joined by newlines.
        diff: The unified diff, from the first ``diff --git`` line to the end.
    """

    name: str
    header: dict[str, str]
    diff: bytes

    def to_bytes(self) -> bytes:
        """Return the bytes of the file: fields in their fixed order, an empty line, the diff."""
        lines = []
        for field in (*FIELDS, *OPTIONAL_FIELDS):
            if field in self.header:
                lines.append(f"{field}: " + self.header[field].replace("\n", "\n  "))
        return ("\n".join(lines) + "\n\n").encode() + self.diff

    def to_message(self) -> str:
        """Return the commit message that carries this patch in a scratch tree."""
        fields = [f for f in (*FIELDS[1:], *OPTIONAL_FIELDS) if f in self.header]
        body = "".join(f"{f}: " + self.header[f].replace("\n", "\n  ") + "\n" for f in fields)
        return f"{self.header.get('Subject', '')}\n\n{body}{FILE_FIELD}: {self.name}\n"


@dataclass(frozen=True)
class Series:
    """The order of application and the budget, as written in ``patches/series``.

    Attributes:
        names: Patch file names in order.
        per_patch: Most added lines for one patch.
        total: Most added lines for all patches together.
        raised: Larger limits of single patches; each has a reason in the file.
        lines: The lines of the file, to write it back without losing comments.
    """

    names: tuple[str, ...]
    per_patch: int
    total: int
    raised: dict[str, int]
    lines: tuple[str, ...]


# --- git ----------------------------------------------------------------------------------------------------


def git_env(tree: Path) -> dict[str, str]:
    """Return an environment in which git sees ``tree`` only and nobody's configuration."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env.update(
        # without the ceiling, a tree that lost its .git would be taken for a part of the repository around
        # it, where `git apply` skips every ignored path and still reports success
        GIT_CEILING_DIRECTORIES=str(tree.resolve().parent),
        GIT_CONFIG_NOSYSTEM="1",
        GIT_CONFIG_GLOBAL=os.devnull,
        GIT_ATTR_NOSYSTEM="1",
        GIT_AUTHOR_NAME=AUTHOR,
        GIT_AUTHOR_EMAIL=EMAIL,
        GIT_AUTHOR_DATE=DATE,
        GIT_COMMITTER_NAME=AUTHOR,
        GIT_COMMITTER_EMAIL=EMAIL,
        GIT_COMMITTER_DATE=DATE,
        GIT_TERMINAL_PROMPT="0",
        LC_ALL="C",
    )
    return env


def git(tree: Path, *args: str, stdin: bytes | None = None) -> bytes:
    """Run git in ``tree`` and return its standard output.

    Raises:
        PatchError: git failed; the message holds the command and what git said.
    """
    null = os.devnull
    command = ["git", "-c", f"core.attributesFile={null}", "-c", f"core.excludesFile={null}", *args]
    done = subprocess.run(command, cwd=tree, env=git_env(tree), input=stdin, capture_output=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise PatchError(f"git {' '.join(args)} failed in {tree}:\n{said}")
    return done.stdout


def init_tree(tree: Path) -> None:
    """Commit everything in ``tree`` as the pristine state of a new repository."""
    git(tree, "init", "--quiet", "--initial-branch=series")
    for key, value in (
        ("user.name", AUTHOR),
        ("user.email", EMAIL),
        ("commit.gpgSign", "false"),
        ("core.autocrlf", "false"),
        ("core.fileMode", "true"),
        ("core.hooksPath", os.devnull),
        ("gc.auto", "0"),
        ("rebase.autoSquash", "true"),
    ):
        git(tree, "config", key, value)
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--allow-empty", "--no-verify", "-m", "pristine")
    git(tree, "tag", BASE_TAG)


def commit_patch(tree: Path, patch: Patch) -> None:
    """Apply ``patch`` on top of the tree, all context matching, and commit it, its header as the message."""
    try:
        git(tree, "apply", "--index", "--whitespace=nowarn", "-", stdin=patch.diff)
    except PatchError as error:
        raise PatchError(
            f"{patch.name} does not apply on the pristine pin and the patches before it.\n{error}"
        ) from None
    if not git(tree, "diff", "--cached", "--name-only"):
        raise PatchError(f"{patch.name}: git apply reported success and changed nothing in {tree}")
    message = patch.to_message().encode()
    git(tree, "commit", "--quiet", "--no-verify", "--cleanup=verbatim", "-F", "-", stdin=message)


def read_tree(tree: Path, rev: str = "HEAD") -> list[Patch]:
    """Return the patches that the commits from the pristine one to ``rev`` stand for, in order."""
    commits = git(tree, "rev-list", "--reverse", "--first-parent", f"{BASE_TAG}..{rev}").decode().split()
    patches = []
    for commit in commits:
        message = git(tree, "log", "-1", "--format=%B", commit).decode()
        subject, _, body = message.strip("\n").partition("\n")
        if subject.startswith(("fixup!", "squash!", "amend!")):
            raise PatchError(
                f"{tree}: commit '{subject}' is not squashed yet; run"
                f" GIT_SEQUENCE_EDITOR=: git rebase -i --autosquash {BASE_TAG}"
            )
        header = parse_header(body.strip("\n").split("\n"), f"{tree}: commit '{subject}'")
        name = header.pop(FILE_FIELD, "")
        if not PATCH_NAME.fullmatch(name):
            raise PatchError(
                f"{tree}: commit '{subject}' has {FILE_FIELD} '{name}', expected"
                f" '{FILE_FIELD}: <topic>.patch' with a lower-case topic; amend the message"
            )
        header["Subject"] = subject
        diff = git(tree, "diff", *DIFF_OPTIONS, f"{commit}^", commit)
        patches.append(Patch(name, header, diff))
    names = [p.name for p in patches]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise PatchError(f"{tree}: two commits for {', '.join(twice)}; squash them")
    return patches


# --- files --------------------------------------------------------------------------------------------------


def parse_header(lines: Iterable[str], where: str) -> dict[str, str]:
    """Parse ``Field: text`` lines; a line that starts with two spaces continues the field before it.

    Raises:
        PatchError: a line is neither, or a field comes twice or is unknown.
    """
    header: dict[str, str] = {}
    last = ""
    for line in lines:
        match = FIELD_LINE.fullmatch(line.rstrip())
        if line.startswith("  ") and last:
            header[last] += "\n" + line.strip()
        elif match and match[1] in (*FIELDS, *OPTIONAL_FIELDS, FILE_FIELD):
            last = match[1]
            if last in header:
                raise PatchError(f"{where}: field {last} comes twice")
            header[last] = (match[2] or "").strip()
        elif line.strip():
            raise PatchError(
                f"{where}: '{line.strip()}' is not a header field; expected one of {', '.join(FIELDS)}"
                f" ({', '.join(OPTIONAL_FIELDS)} optional), continuation lines indented by two spaces"
            )
    return header


def read_patch(path: Path) -> Patch:
    """Read one patch file."""
    raw = path.read_bytes()
    start = 0 if raw.startswith(b"diff --git ") else raw.find(b"\ndiff --git ") + 1
    if start == 0 and not raw.startswith(b"diff --git "):
        raise PatchError(f"{path}: no 'diff --git' line; a patch without a change is not allowed")
    header = parse_header(raw[:start].decode().split("\n"), str(path))
    return Patch(path.name, header, raw[start:])


def read_series(patches_dir: Path) -> Series:
    """Read ``series``: one patch name a line, ``#`` comments, and the budget lines.

    Raises:
        PatchError: the file is missing, names a patch twice, or a budget line gives no number or no reason.
    """
    path = patches_dir / "series"
    if not path.is_file():
        raise PatchError(f"{path} is missing; it lists the patches in their order and the budget")
    lines = tuple(path.read_text().splitlines())
    names: list[str] = []
    raised: dict[str, int] = {}
    limits: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        budget = BUDGET_LINE.fullmatch(text)
        if budget and budget[1] in ("patch", "series"):
            limits[budget[1]] = int(budget[2])
        elif budget:
            if not budget[3].strip():
                raise PatchError(f"{path}:{number}: a raised budget needs a reason after the number")
            raised[budget[1]] = int(budget[2])
        elif text and not text.startswith("#"):
            if not PATCH_NAME.fullmatch(text):
                raise PatchError(f"{path}:{number}: '{text}' is not a patch name (<topic>.patch, lower case)")
            if text in names:
                raise PatchError(f"{path}:{number}: {text} is listed twice")
            names.append(text)
    for key in ("patch", "series"):
        if key not in limits:
            raise PatchError(f"{path}: no line '# budget: {key} <lines>'")
    unknown = sorted(set(raised) - set(names))
    if unknown:
        raise PatchError(f"{path}: budget for {', '.join(unknown)}, which the series does not list")
    return Series(tuple(names), limits["patch"], limits["series"], raised, lines)


def merged_series(lines: Sequence[str], base: Sequence[str], ours: Sequence[str]) -> list[str]:
    """Return the lines of ``series`` with the changes from ``base`` to ``ours`` made in them.

    New names go after the name that precedes them in ``ours``; names gone from ``ours`` are dropped; lines
    that someone else added meanwhile stay. When the order itself changed, the names we know are put in our
    order.
    """
    gone = set(base) - set(ours)
    out = [line for line in lines if line.strip() not in gone]
    present = {line.strip() for line in out}
    for i, name in enumerate(ours):
        if name in present:
            continue
        at = len(out) if i == 0 else [line.strip() for line in out].index(ours[i - 1]) + 1
        out.insert(at, name)
        present.add(name)
    known = set(ours)
    slots = [i for i, line in enumerate(out) if line.strip() in known]
    for slot, name in zip(slots, ours, strict=True):
        out[slot] = name
    return out


# --- facts about a patch ------------------------------------------------------------------------------------


def added_lines(patch: Patch) -> dict[str, int]:
    """Return the number of added lines for each upstream file that the patch changes."""
    with tempfile.TemporaryDirectory() as folder:
        out = git(Path(folder), "apply", "--numstat", "-z", "-", stdin=patch.diff).decode()
    counts = {}
    for row in out.split("\0"):
        if row:
            added, _, name = row.split("\t")
            if added == "-":
                raise PatchError(f"{patch.name}: binary change in {name}; a patch holds text hooks only")
            counts[name] = int(added)
    return counts


def header_problems(patch: Patch, pristine: Path) -> list[str]:
    """Return what is wrong with the header of ``patch``, one sentence each."""
    out = []
    for field in FIELDS:
        if not patch.header.get(field):
            out.append(f"{patch.name}: header field {field} is missing or empty")
    if FILE_FIELD in patch.header:
        out.append(f"{patch.name}: {FILE_FIELD} belongs into commit messages only")
    subject, kind = patch.header.get("Subject", ""), patch.header.get("Kind", "")
    upstream = patch.header.get("Upstream", "")
    if subject and not SUBJECT.fullmatch(subject):
        out.append(f"{patch.name}: Subject '{subject}' is not '<area>: <what>'")
    if kind and kind not in KINDS:
        out.append(f"{patch.name}: Kind '{kind}' is not one of {', '.join(KINDS)}")
    if kind == "backport" and not re.search(r"[0-9a-f]{7,40}", upstream):
        out.append(f"{patch.name}: a backport names the upstream commit in Upstream, found '{upstream}'")
    for field in ("Native", "Tests"):
        text = patch.header.get(field, "")
        if text == "none" and field == "Native":
            continue
        for item in re.split(r"[,\s]+", text):
            # a test of upstream's own, e.g. `upstream:tests/test-gguf.cpp`, is looked up in the pin
            base, name = (pristine, item[9:]) if item.startswith("upstream:") else (ROOT, item)
            if item and not (base / name).is_file():
                out.append(f"{patch.name}: {field} names {item}, which does not exist")
    return out


def structure_problems(patch: Patch, pristine: Path) -> list[str]:
    """Return what is wrong with the kind of change: new, removed, renamed or foreign files."""
    with tempfile.TemporaryDirectory() as folder:
        summary = git(Path(folder), "apply", "--summary", "-", stdin=patch.diff).decode().splitlines()
    out = [
        f"{patch.name}: {line.strip()}; a patch only changes the text of existing files" for line in summary
    ]
    for name in added_lines(patch):
        if not (pristine / name).is_file():
            out.append(f"{patch.name}: {name} is not a file of the pristine pin")
    return out


def internal_headers(pristine: Path) -> dict[str, list[str]]:
    """Return upstream's non-public headers that ``native/`` includes, each with the files that include it."""
    public = {p.name for d in ("include", "ggml/include") for p in (pristine / d).glob("*.h")}
    upstream = {p.name for d in ("src", "ggml/src", "common", "tools") for p in (pristine / d).rglob("*.h")}
    suffixes = (".h", ".c", ".cpp", ".cu", ".cuh")
    native = sorted(p for p in (ROOT / "native").rglob("*") if p.suffix in suffixes)
    own = {p.name for p in native}
    out: dict[str, list[str]] = {}
    for path in native:
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            base = name.rsplit("/", 1)[-1]
            if base in upstream and base not in public and base not in own:
                out.setdefault(base, []).append(path.relative_to(ROOT).as_posix())
    return out


# --- commands -----------------------------------------------------------------------------------------------


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy the named files of ``source`` into ``target``, keeping their modes."""
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def load(patches_dir: Path) -> tuple[Series, list[Patch]]:
    """Read the series and its patches; every listed file exists and every file is listed.

    Raises:
        PatchError: names and files differ, or a file cannot be parsed.
    """
    series = read_series(patches_dir)
    files = {p.name for p in patches_dir.glob("*.patch")}
    missing, extra = sorted(set(series.names) - files), sorted(files - set(series.names))
    if missing or extra:
        raise PatchError(
            f"{patches_dir / 'series'} and the files differ: listed without a file: {missing or 'none'};"
            f" files not listed: {extra or 'none'}"
        )
    return series, [read_patch(patches_dir / name) for name in series.names]


def has_work(tree: Path) -> bool:
    """Tell whether ``tree`` holds edits or commits that no export has written yet."""
    if git(tree, "status", "--porcelain"):
        return True
    return git(tree, "rev-parse", "HEAD") != git(tree, "rev-parse", START_REF)


def start(pristine: Path, patches_dir: Path, tree: Path, *, force: bool) -> int:
    """Build the scratch tree: the pristine pin as one commit, then one commit per patch.

    Raises:
        PatchError: the tree holds work that was not exported (without ``force``), or a patch does not apply.
    """
    _, patches = load(patches_dir)
    if tree.exists():
        if not (tree / ".git").is_dir():
            raise PatchError(f"{tree} exists and is not a scratch tree; remove it or give another --tree")
        if not force and has_work(tree):
            raise PatchError(f"{tree} holds work that was not exported; export it, or drop it with --force")
        shutil.rmtree(tree)
    tree.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(pristine, tree, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    init_tree(tree)
    for patch in patches:
        commit_patch(tree, patch)
    git(tree, "update-ref", START_REF, "HEAD")
    print(f"{tree}: pristine and {len(patches)} patches; edit, commit, then run: tools/patches.py export")
    return 0


def export(patches_dir: Path, tree: Path) -> int:
    """Write the commits of the scratch tree to ``patches_dir``; a file with the same bytes is not touched.

    A patch that somebody else changed since start is kept when we did not change it, so two people may work
    in two trees.

    Raises:
        PatchError: no tree, uncommitted edits, or both sides changed the same patch.
    """
    if not (tree / ".git").is_dir():
        raise PatchError(f"{tree} is not a scratch tree; run: tools/patches.py start")
    if git(tree, "status", "--porcelain"):
        raise PatchError(f"{tree} has uncommitted changes; commit them (--fixup=<commit>) and squash")
    base = {p.name: p.to_bytes() for p in read_tree(tree, START_REF)}
    ours = {p.name: p.to_bytes() for p in read_tree(tree)}
    disk = {p.name: p.read_bytes() for p in patches_dir.glob("*.patch")}
    changed = [n for n in sorted({*base, *ours}) if base.get(n) != ours.get(n)]
    conflicts = [n for n in changed if disk.get(n) not in (base.get(n), ours.get(n))]
    if conflicts:
        raise PatchError(
            f"changed here and in {patches_dir} since start: {', '.join(conflicts)}; keep your commits"
            " (git format-patch), run start --force, and apply them again"
        )
    series = read_series(patches_dir)
    for name in changed:
        if name in ours:
            (patches_dir / name).write_bytes(ours[name])
        else:
            (patches_dir / name).unlink(missing_ok=True)
        print(f"{'wrote' if name in ours else 'removed'} {patches_dir / name}")
    lines = merged_series(series.lines, list(base), list(ours))
    if tuple(lines) != series.lines:
        (patches_dir / "series").write_text("\n".join(lines) + "\n")
        print(f"wrote {patches_dir / 'series'}")
    git(tree, "update-ref", START_REF, "HEAD")
    return 0


@contextmanager
def verification_tree(pristine: Path, patches: Sequence[Patch]) -> Iterator[Path]:
    """Yield a temporary scratch tree with only the files that the patches touch, all patches applied."""
    with tempfile.TemporaryDirectory(prefix="patches-") as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        # attribute files steer the diff driver, and with it the function names in hunk headers
        attributes = [p.relative_to(pristine).as_posix() for p in pristine.rglob(".gitattributes")]
        copy_files(pristine, tree, {*attributes, *(name for p in patches for name in added_lines(p))})
        init_tree(tree)
        for patch in patches:
            commit_patch(tree, patch)
        yield tree


def problems(pristine: Path, patches_dir: Path) -> list[str]:
    """Return everything that is wrong with the series, one text each; an empty list means it is sound."""
    try:
        series, patches = load(patches_dir)
    except PatchError as error:
        return [str(error)]
    out: list[str] = []
    total = 0
    for patch in patches:
        out += header_problems(patch, pristine)
        out += structure_problems(patch, pristine)
        count = sum(added_lines(patch).values())
        total += count
        limit = series.raised.get(patch.name, series.per_patch)
        if count > limit:
            out.append(f"{patch.name}: {count} added lines, the budget is {limit}; move logic to native/")
    if total > series.total:
        out.append(f"{patches_dir / 'series'}: {total} added lines in all, the budget is {series.total}")
    try:
        with verification_tree(pristine, patches) as tree:
            again = read_tree(tree)
    except PatchError as error:
        return [*out, str(error)]
    for patch, other in zip(patches, again, strict=True):
        if (patches_dir / patch.name).read_bytes() != other.to_bytes():
            out.append(
                f"{patch.name}: export gives other bytes than the file has (edited by hand, or hunks moved);"
                " run start and export"
            )
    return out


def verify(pristine: Path, patches_dir: Path) -> int:
    """Check the series and the generated table; print every problem, return 1 if there is one."""
    found = problems(pristine, patches_dir)
    if not found:
        path = patches_dir / "README.md"
        if not path.is_file() or path.read_text() != readme_text(pristine, patches_dir):
            found.append(f"{path} is stale; run: tools/patches.py readme")
    for text in found:
        print(text, file=sys.stderr)
    if found:
        return 1
    _, patches = load(patches_dir)
    lines = sum(sum(added_lines(p).values()) for p in patches)
    print(f"{len(patches)} patches, {lines} added lines: ok")
    return 0


def readme_text(pristine: Path, patches_dir: Path) -> str:
    """Return the text of ``patches/README.md``: the headers as a table, and what to review at a pin bump."""
    series, patches = load(patches_dir)
    counts = {p.name: added_lines(p) for p in patches}
    out = [
        "# Patches on llama.cpp",
        "",
        "Generated by `tools/patches.py readme` from the headers of the patches. Hooks only: the work is in",
        "`native/`. How to change a patch is told by the first lines of `tools/patches.py`.",
        "",
        "| # | patch | kind | added lines | what | why it must be a patch | drop it when |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, patch in enumerate(patches, 1):
        cells = [patch.header[f].replace("\n", " ").replace("|", "\\|") for f in FIELDS]
        subject, purpose, kind, why, upstream, drop = cells[:6]
        if upstream != "none":
            kind += f" ({upstream})"
        added = sum(counts[patch.name].values())
        row = [str(i), f"`{patch.name}`", kind, str(added), f"{subject}. {purpose}", why, drop]
        out.append("| " + " | ".join(row) + " |")
    added = sum(sum(c.values()) for c in counts.values())
    budget = f"the budget is {series.per_patch} a patch and {series.total} in all"
    out += ["", f"{added} added lines in all; {budget}."]
    if series.raised:
        raised = ", ".join(f"`{n}` {v}" for n, v in series.raised.items())
        out += [f"Raised, with the reason in `series`: {raised}."]
    out += ["", "## Code and tests", "", "| patch | native | tests |", "|---|---|---|"]
    for patch in patches:
        native, tests = (
            ", ".join(f"`{i}`" if i != "none" else i for i in re.split(r"[,\s]+", patch.header[f]) if i)
            for f in ("Native", "Tests")
        )
        out.append(f"| `{patch.name}` | {native} | {tests} |")
    out += [
        "",
        "## Non-public upstream details we rely on",
        "",
        "Review upstream's diff of these at every change of the pin.",
        "",
        "| upstream file | changed by |",
        "|---|---|",
    ]
    for name in sorted({n for c in counts.values() for n in c}):
        out.append(f"| `{name}` | {', '.join(f'`{p.name}`' for p in patches if name in counts[p.name])} |")
    headers = internal_headers(pristine)
    if headers:
        out += ["", "| internal header | included by |", "|---|---|"]
        for name, users in sorted(headers.items()):
            out.append(f"| `{name}` | {', '.join(f'`{u}`' for u in users)} |")
    relies = [(p.name, line) for p in patches for line in p.header.get("Relies-on", "").split("\n") if line]
    if relies:
        out += ["", "| behaviour relied on | by |", "|---|---|"]
        out += [f"| {text} | `{name}` |" for name, text in relies]
    return "\n".join(out) + "\n"


def readme(pristine: Path, patches_dir: Path) -> int:
    """Write ``patches/README.md``."""
    (patches_dir / "README.md").write_text(readme_text(pristine, patches_dir))
    print(f"wrote {patches_dir / 'README.md'}")
    return 0


def pinned_source() -> Path:
    """Return the cached pristine extraction of the pin, fetching it if needed."""
    sys.path.insert(0, str(ROOT / "buildutils"))
    import vendor

    return Path(vendor.pristine())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 1 when a check fails."""
    parser = argparse.ArgumentParser(prog="tools/patches.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("start", "export", "verify", "readme"))
    parser.add_argument("--pristine", type=Path, help="an extracted, unpatched pin (default: the cached one)")
    parser.add_argument("--patches", type=Path, default=PATCHES, help="the folder of the series")
    parser.add_argument("--tree", type=Path, default=SCRATCH, help="scratch tree (default: build/patches)")
    parser.add_argument("--force", action="store_true", help="start: drop work that was not exported")
    args = parser.parse_args(argv)
    try:
        if args.command == "export":
            return export(args.patches, args.tree)
        pristine = args.pristine or pinned_source()
        if not (pristine / "ggml" / "include" / "ggml.h").is_file():
            raise PatchError(f"{pristine} holds no llama.cpp: ggml/include/ggml.h is missing")
        if args.command == "start":
            return start(pristine, args.patches, args.tree, force=args.force)
        return (verify if args.command == "verify" else readme)(pristine, args.patches)
    except PatchError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
