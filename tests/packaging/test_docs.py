"""The pages build as a site without a warning, every link inside resolves, and their settings are accepted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

pytest.importorskip("pyllama_dsv4._llama", reason="the reference is made from the installed package")

from pyllama_dsv4 import cli
from pyllama_dsv4.cli import config

DOCS = Path(__file__).resolve().parents[2] / "docs"


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    args = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(out)]
    return subprocess.run(args, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in DOCS.glob("*.md")} <= pages
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("create_chat_completion", "WorkerError", "plan_file", "rpc_devices"):
        assert f"{name}</span>" in api
    # the question that everybody asks first, one click from the first page
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'href="memory.html[^>]*>', index)
    assert "64 GiB" in (tmp_path / "site" / "memory.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("link", ["[x](no-such-page.md)", "[x](memory.md#no-such-heading)"])
def test_a_link_that_leads_nowhere_fails(tmp_path: Path, link: str) -> None:
    copy = tmp_path / "docs"
    copy.mkdir()
    shutil.copy(DOCS / "conf.py", copy)
    shutil.copy(DOCS / "memory.md", copy)
    (copy / "index.md").write_text(f"# A\n\n{link}\n\n```{{toctree}}\nmemory\n```\n", encoding="utf-8")
    for name in re.findall(r"\]\((\w+)\.md", (copy / "memory.md").read_text(encoding="utf-8")):
        (copy / f"{name}.md").write_text(":orphan:\n\n# B\n", encoding="utf-8")
    done = build(copy, tmp_path / "site")
    assert done.returncode != 0
    assert "no-such" in done.stderr


def test_links_to_other_files_of_the_repository_resolve() -> None:
    root = DOCS.parent
    for page in (root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("start", ["README.md", "docs/index.md", "docs/quick-start.md"])
def test_what_a_machine_with_64_gb_can_do_is_within_two_clicks(start: str) -> None:
    """From the first pages, over links that a reader can click: the answer, with a speed."""
    answer = re.compile(r"^\| 64 GiB \|.*tokens/s \|$", re.MULTILINE)
    pages, n_clicks = {DOCS.parent / start}, 0
    while not any(answer.search(page.read_text(encoding="utf-8")) for page in pages):
        assert n_clicks < 2, f"not among {sorted(page.name for page in pages)}"
        n_clicks += 1
        pages = {
            target
            for page in pages
            for link in re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8"))
            if (target := (page.parent / link).resolve()).exists()
        }


def test_the_config_file_of_the_page_is_accepted(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"```toml\n(.*?)```", (DOCS / "command-line.md").read_text(encoding="utf-8"), re.DOTALL
    )
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    ctx = click.Context(cli._cli)
    names = cli._cli.list_commands(ctx)
    for name, expected in (("chat", {"temperature": 0.6, "n_ctx": 32768}), ("serve", {"port": 9000})):
        command = cli._cli.get_command(ctx, name)
        assert command is not None
        values = config.defaults(path, name, command, names, ctx)
        assert expected.items() <= values.items()
