"""The patch tool: one text format, exports that do not depend on the user, and every reason to refuse a series.

Works on a made-up upstream of three files; the real series is checked at the end, in full where the pin is at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import patches  # noqa: E402

GGML_H = "".join("\n" if i == 5 else f"line {i};\n" for i in range(40))  # with an empty line near the edits
HEADER = {
    "Subject": "ggml: change a line",
    "Purpose": "something works\nand this is how",
    "Kind": "hook",
    "Why-a-patch": "a closed table",
    "Upstream": "none",
    "Drop-when": "upstream opens the table",
    "Native": "none",
    "Tests": "upstream:tests/test-a.cpp",
}


class Bench:
    """A pristine tree, a folder of patches, and a scratch tree, with the commands bound to them."""

    def __init__(self, folder: Path) -> None:
        self.pristine = folder / "pristine"
        self.patches = folder / "patches"
        self.tree = folder / "build" / "tree"
        for name, text in (
            ("ggml/include/ggml.h", GGML_H),
            ("src/other.cpp", GGML_H),
            ("tests/test-a.cpp", "int main() {}\n"),
            (".gitignore", "*.h\n"),  # upstream ignores files that its archive holds
        ):
            (self.pristine / name).parent.mkdir(parents=True, exist_ok=True)
            (self.pristine / name).write_text(text)
        self.patches.mkdir()
        self.series("# budget: patch 30\n# budget: series 300\n")

    def series(self, text: str) -> None:
        (self.patches / "series").write_text(text)

    def start(self, *, force: bool = False, tree: Path | None = None) -> None:
        assert patches.start(self.pristine, self.patches, tree or self.tree, force=force) == 0

    def export(self, tree: Path | None = None) -> None:
        assert patches.export(self.patches, tree or self.tree) == 0

    def problems(self) -> str:
        return "\n".join(patches.problems(self.pristine, self.patches))

    def edit(self, name: str, old: str, new: str, tree: Path | None = None) -> None:
        path = (tree or self.tree) / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def commit(self, patch: str, tree: Path | None = None, **header: str | None) -> None:
        fields = {k: v for k, v in {**HEADER, **header}.items() if v is not None}
        message = patches.Patch(patch, fields, b"").to_message()
        patches.git(tree or self.tree, "commit", "-qam", message)

    def add(self, patch: str, old: str = "line 7;", new: str = "line seven;", **header: str | None) -> None:
        """Start, change one line of ggml.h, commit and export it as ``patch``."""
        self.start()
        self.edit("ggml/include/ggml.h", old + "\n", new + "\n")
        self.commit(patch, **header)
        self.export()

    def text(self, patch: str) -> str:
        return (self.patches / patch).read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- the format -------------------------------------------------------------------------------------


def test_export_writes_header_and_diff_in_the_documented_form(bench: Bench) -> None:
    bench.add("one.patch", new="line seven;\nline seven and a half;")
    header, _, diff = bench.text("one.patch").partition("\n\n")
    assert header.split("\n") == [
        "Subject: ggml: change a line",
        "Purpose: something works",
        "  and this is how",
        "Kind: hook",
        "Why-a-patch: a closed table",
        "Upstream: none",
        "Drop-when: upstream opens the table",
        "Native: none",
        "Tests: upstream:tests/test-a.cpp",
    ]
    lines = diff.split("\n")
    assert lines[0] == "diff --git a/ggml/include/ggml.h b/ggml/include/ggml.h"
    index = lines[1].split()
    assert index[0] == "index"
    assert len(index[1]) == 40 + 2 + 40
    assert lines[4].startswith("@@ -5,7 +5,8 @@")  # three lines of context on each side
    assert "Author" not in diff
    assert "\n-- \n" not in diff
    assert bench.text("series").endswith("\none.patch\n")
    assert bench.problems() == ""


def test_start_and_export_give_the_same_bytes(bench: Bench) -> None:
    bench.add("one.patch")
    bench.add("two.patch", old="line 30;", new="line thirty;", **{"Relies-on": "file: something"})
    before = {p.name: p.read_bytes() for p in bench.patches.iterdir()}
    bench.start()
    bench.export()
    assert {p.name: p.read_bytes() for p in bench.patches.iterdir()} == before


def test_user_settings_do_not_matter(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("one.patch")
    expected = bench.text("one.patch")
    home = tmp_path / "home"
    (home / ".config" / "git").mkdir(parents=True)
    (home / ".config" / "git" / "attributes").write_text("*.h binary\n")
    (home / ".config" / "git" / "ignore").write_text("*\n")
    (home / ".gitconfig").write_text(
        "[diff]\n noprefix = true\n context = 1\n algorithm = patience\n suppressBlankEmpty = true\n"
        "[core]\n autocrlf = true\n abbrev = 7\n[commit]\n gpgSign = true\n[color]\n ui = always\n"
        "[apply]\n whitespace = fix\n[user]\n useConfigOnly = true\n"
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    # as inside a git hook of the repository around us
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(ROOT))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    bench.start()
    assert [p.to_bytes().decode() for p in patches.read_tree(bench.tree)] == [expected]
    assert bench.problems() == ""
    # what the user ignores everywhere is still work here
    (bench.tree / "src" / "new.cpp").write_text("int x;\n")
    with pytest.raises(patches.PatchError, match="not exported"):
        bench.start()


def test_the_scratch_tree_keeps_files_that_upstream_ignores(bench: Bench) -> None:
    bench.start()
    assert "ggml/include/ggml.h" in patches.git(bench.tree, "ls-files").decode()


def test_a_patch_is_applied_inside_a_repository_that_ignores_the_folder(bench: Bench, tmp_path: Path) -> None:
    """`git apply` below another repository skips ignored paths and exits 0."""
    bench.add("one.patch")
    patches.git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("/build/\n")
    bench.start()
    assert "line seven;" in (bench.tree / "ggml/include/ggml.h").read_text()
    # and a tree that lost its own .git is not taken for a part of that repository
    with pytest.raises(patches.PatchError, match="not a git repository"):
        patches.git(tmp_path / "build", "status")


# --- editing ----------------------------------------------------------------------------------------


def test_fixup_must_be_squashed_before_export(bench: Bench) -> None:
    bench.add("one.patch")
    bench.start()
    bench.edit("ggml/include/ggml.h", "line seven;", "line VII;")
    patches.git(bench.tree, "commit", "-qa", "--fixup=:/ggml: change")
    with pytest.raises(patches.PatchError, match="not squashed"):
        bench.export()
    env = {**patches.git_env(bench.tree), "GIT_SEQUENCE_EDITOR": ":"}
    command = ["git", "rebase", "-qi", "--autosquash", "pristine"]
    subprocess.run(command, cwd=bench.tree, env=env, check=True)
    bench.export()
    assert "+line VII;" in bench.text("one.patch")
    assert bench.text("one.patch").startswith("Subject: ggml: change a line\nPurpose: something works\n  and")
    assert bench.problems() == ""


def test_uncommitted_work_is_not_exported_and_not_dropped(bench: Bench) -> None:
    bench.start()
    bench.edit("ggml/include/ggml.h", "line 7;", "line seven;")
    with pytest.raises(patches.PatchError, match="uncommitted"):
        bench.export()
    with pytest.raises(patches.PatchError, match="not exported"):
        bench.start()
    bench.commit("one.patch")
    with pytest.raises(patches.PatchError, match="not exported"):
        bench.start()
    bench.start(force=True)
    assert (bench.tree / "ggml/include/ggml.h").read_text() == GGML_H


def test_a_folder_that_is_no_scratch_tree_is_left_alone(bench: Bench) -> None:
    bench.tree.mkdir(parents=True)
    (bench.tree / "precious").write_text("x")
    with pytest.raises(patches.PatchError, match="not a scratch tree"):
        bench.start(force=True)
    assert (bench.tree / "precious").exists()


def test_a_commit_without_a_file_name_is_refused(bench: Bench) -> None:
    bench.start()
    bench.edit("ggml/include/ggml.h", "line 7;", "line seven;")
    patches.git(bench.tree, "commit", "-qam", "ggml: no fields\n\nKind: hook\n")
    with pytest.raises(patches.PatchError, match="Patch-File"):
        bench.export()


def test_a_dropped_commit_removes_its_patch(bench: Bench) -> None:
    bench.add("one.patch")
    bench.add("two.patch", old="line 30;", new="line thirty;")
    bench.start()
    patches.git(bench.tree, "reset", "-q", "--hard", "HEAD^")
    bench.export()
    assert not (bench.patches / "two.patch").exists()
    assert "two.patch" not in bench.text("series")
    assert bench.problems() == ""


def test_two_people_in_two_trees(bench: Bench, tmp_path: Path) -> None:
    bench.add("one.patch")
    other = tmp_path / "other"
    bench.start(tree=other)
    bench.start()
    bench.edit("src/other.cpp", "line 3;", "line three;", tree=other)
    bench.commit("theirs.patch", tree=other)
    bench.edit("ggml/include/ggml.h", "line seven;", "line VII;")
    patches.git(bench.tree, "commit", "-qa", "--amend", "--no-edit")
    bench.export(other)
    bench.export()
    assert "+line VII;" in bench.text("one.patch")
    assert bench.text("series").split("\n")[-3:] == ["one.patch", "theirs.patch", ""]
    assert bench.problems() == ""

    # the same patch changed on both sides is nobody's to overwrite
    bench.edit("ggml/include/ggml.h", "line seven;", "line 7.0;", tree=other)
    patches.git(other, "commit", "-qam", patches.Patch("one.patch", HEADER, b"").to_message())
    with pytest.raises(patches.PatchError, match=r"two commits for one\.patch"):
        bench.export(other)
    patches.git(other, "reset", "-q", "--hard", "pristine")
    bench.edit("ggml/include/ggml.h", "line 7;", "line 7.0;", tree=other)
    bench.commit("one.patch", tree=other)
    with pytest.raises(patches.PatchError, match=r"changed here and in .*: one\.patch"):
        bench.export(other)


@pytest.mark.parametrize(
    ("lines", "base", "ours", "expected"),
    [
        (["# c", "a"], ["a"], ["a", "b"], ["# c", "a", "b"]),
        (["a", "# about b", "b"], ["a", "b"], ["b"], ["# about b", "b"]),
        (["a", "theirs", "b"], ["a", "b"], ["a", "mine", "b"], ["a", "mine", "theirs", "b"]),
        (["a", "b", "theirs"], ["a", "b"], ["b", "a"], ["b", "a", "theirs"]),
        (["# c"], [], ["x", "y"], ["# c", "x", "y"]),
    ],
)
def test_changes_to_the_order_are_merged(
    lines: list[str], base: list[str], ours: list[str], expected: list[str]
) -> None:
    assert patches.merged_series(lines, base, ours) == expected


# --- what verify refuses ----------------------------------------------------------------------------


def test_context_must_match_exactly(bench: Bench) -> None:
    bench.add("one.patch")
    path = bench.patches / "one.patch"
    path.write_text(path.read_text().replace(" line 6;\n", " line six;\n"))
    assert "one.patch does not apply" in bench.problems()


def test_moved_hunks_are_found(bench: Bench) -> None:
    """A hunk at the wrong line applies with an offset; the exported bytes tell."""
    bench.add("one.patch")
    path = bench.patches / "one.patch"
    path.write_text(path.read_text().replace("@@ -5,7 +5,7 @@", "@@ -6,7 +6,7 @@"))
    assert "export gives other bytes" in bench.problems()


def test_edits_by_hand_are_found(bench: Bench) -> None:
    bench.add("one.patch")
    path = bench.patches / "one.patch"
    for old, new in (("+line seven;", "+line SEVEN;"), ("Kind: hook", "Kind:  hook"), ("\n\n", "\n\n\n")):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert "export gives other bytes" in bench.problems(), new
        path.write_text(text)
    assert bench.problems() == ""


@pytest.mark.parametrize("field", patches.FIELDS)
def test_every_header_field_is_required(bench: Bench, field: str) -> None:
    bench.add("one.patch")
    path = bench.patches / "one.patch"
    header, _, diff = path.read_text().partition("\n\n")
    kept = []
    skipping = False
    for line in header.split("\n"):
        skipping = line.startswith(field + ":") or (skipping and line.startswith("  "))
        kept += [] if skipping else [line]
    path.write_text("\n".join(kept) + "\n\n" + diff)
    assert f"one.patch: header field {field} is missing" in bench.problems()


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ({"Kind": "improvement"}, "Kind 'improvement' is not one of hook, backport, fix"),
        ({"Kind": "backport"}, "a backport names the upstream commit"),
        ({"Subject": "change a line"}, "is not '<area>: <what>'"),
        ({"Native": "native/ggml/no-such-file.c"}, "Native names native/ggml/no-such-file.c"),
        ({"Tests": "tests/unit/test_patches.py, native/tests/gone.cpp"}, "Tests names native/tests/gone.cpp"),
        ({"Tests": "upstream:tests/test-b.cpp"}, "Tests names upstream:tests/test-b.cpp"),
        ({"Tests": "none"}, "Tests names none"),
    ],
)
def test_header_values_are_checked(bench: Bench, header: dict[str, str], problem: str) -> None:
    bench.add("one.patch", **header)
    assert problem in bench.problems()


def test_good_header_values(bench: Bench) -> None:
    bench.add(
        "one.patch",
        Kind="backport",
        Upstream="0c1e57098bba43ac29e6e3b677cdceebdd22334f",
        Native="tools/patches.py, pyproject.toml",
        Tests="tests/unit/test_patches.py,\nupstream:tests/test-a.cpp",
    )
    assert bench.problems() == ""


def test_unknown_and_repeated_fields_are_refused(bench: Bench) -> None:
    bench.add("one.patch")
    path = bench.patches / "one.patch"
    text = path.read_text()
    path.write_text(text.replace("Kind: hook", "Kind: hook\nColour: blue"))
    assert "'Colour: blue' is not a header field" in bench.problems()
    path.write_text(text.replace("Kind: hook", "Kind: hook\nKind: fix"))
    assert "field Kind comes twice" in bench.problems()


def test_budgets(bench: Bench) -> None:
    bench.add("one.patch", new="line 7;" + "\nmore;" * 30)
    assert bench.problems() == ""
    bench.add("two.patch", old="line 30;", new="line 30;" + "\nmore;" * 31)
    assert "two.patch: 31 added lines, the budget is 30" in bench.problems()
    bench.series(
        "# budget: patch 30\n# budget: series 60\n# budget: two.patch 31 a table\none.patch\ntwo.patch\n"
    )
    assert "61 added lines in all, the budget is 60" in bench.problems()
    bench.series(
        "# budget: patch 30\n# budget: series 61\n# budget: two.patch 31 a table\none.patch\ntwo.patch\n"
    )
    assert bench.problems() == ""


@pytest.mark.parametrize(
    ("series", "problem"),
    [
        ("# budget: patch 30\n# budget: series 300\n", "files not listed: ['one.patch']"),
        ("# budget: patch 30\n# budget: series 300\none.patch\ntwo.patch\n", "without a file: ['two.patch']"),
        ("# budget: patch 30\n# budget: series 300\none.patch\none.patch\n", "listed twice"),
        ("# budget: patch 30\n# budget: series 300\n0001-One.patch\n", "not a patch name"),
        ("# budget: patch 30\none.patch\n", "no line '# budget: series"),
        ("# budget: patch 30\n# budget: series 300\n# budget: one.patch 40\none.patch\n", "needs a reason"),
        (
            "# budget: patch 30\n# budget: series 300\n# budget: b.patch 4 why\none.patch\n",
            "budget for b.patch",
        ),
    ],
)
def test_series_and_files_match(bench: Bench, series: str, problem: str) -> None:
    bench.add("one.patch")
    bench.series(series)
    assert problem in bench.problems()


def test_a_patch_changes_the_text_of_existing_files_only(bench: Bench) -> None:
    bench.start()
    (bench.tree / "src" / "new.cpp").write_text("int x;\n")
    patches.git(bench.tree, "add", "--all")
    bench.commit("one.patch")
    bench.export()
    assert "create mode 100644 src/new.cpp" in bench.problems()

    patches.git(bench.tree, "reset", "-q", "--hard", "pristine")
    (bench.tree / "src" / "other.cpp").chmod(0o755)
    bench.edit("ggml/include/ggml.h", "line 7;", "line seven;")
    bench.commit("one.patch")
    bench.export()
    assert "mode change 100644 => 100755 src/other.cpp" in bench.problems()


# --- the command ------------------------------------------------------------------------------------


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "patches.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})


def test_the_command_line(bench: Bench) -> None:
    where = ["--pristine", bench.pristine, "--patches", bench.patches, "--tree", bench.tree]
    bench.add("one.patch", **{"Relies-on": "ggml.h: line 7 is the seventh"})

    stale = run("verify", *where)
    assert stale.returncode == 1
    assert "README.md is stale" in stale.stderr

    assert run("readme", *where).returncode == 0
    good = run("verify", *where)
    assert (good.returncode, good.stdout) == (0, "1 patches, 1 added lines: ok\n")
    table = bench.text("README.md")
    assert "| 1 | `one.patch` | hook | 1 | ggml: change a line. something works and this is how |" in table
    assert "| `ggml/include/ggml.h` | `one.patch` |" in table
    assert "| ggml.h: line 7 is the seventh | `one.patch` |" in table

    assert run("start", *where).returncode == 0
    assert run("export", *where).returncode == 0
    bad = run("verify", "--pristine", bench.patches, "--patches", bench.patches)
    assert bad.returncode == 1
    assert "holds no llama.cpp" in bad.stderr
    assert run("frobnicate").returncode == 2


# --- the real series --------------------------------------------------------------------------------


def test_the_real_series_is_well_formed() -> None:
    series, found = patches.load(patches.PATCHES)
    assert found, "an empty series"
    total = 0
    for patch in found:
        assert patch.to_bytes() == (patches.PATCHES / patch.name).read_bytes(), patch.name
        added = sum(patches.added_lines(patch).values())
        assert added <= series.raised.get(patch.name, series.per_patch), patch.name
        total += added
    assert total <= series.total


def test_the_real_series_applies_to_the_pin() -> None:
    sys.path.insert(0, str(ROOT / "buildutils"))
    import vendor

    source = os.environ.get(vendor.ENV_SOURCE)
    if not source and not any(vendor.cache_dir().glob("*")):
        pytest.skip("the pinned archive is not in the cache; tests here do not download")
    assert patches.problems(vendor.pristine(), patches.PATCHES) == []
