"""Compare docs/migration.md with llama-cpp-python's Llama and with ours: check_migration.py [ARCHIVE].

Both sources are parsed, none is imported. ARCHIVE is the pinned source archive; without it, the one that
buildutils/vendor.py keeps. Prints what is wrong, one line each, and exits with 1.
"""

from __future__ import annotations

import ast
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "migration.md"
PACKAGE = ROOT / "pyllama_dsv4"
# classes that make up Llama, and the keywords that its generating methods take as **options
LAYERS = {
    "LlamaBase": "llama_base.py",
    "Completions": "completion.py",
    "ChatCompletions": "chat_completion.py",
    "Llama": "llama.py",
}
OPTIONS = {"SamplingOptions": "sampler.py", "GenerationOptions": "generate.py"}
KINDS = ("same", "renamed", "not supported")


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__")


def functions(source: str, class_name: str) -> dict[str, list[str]]:
    """Return the public methods of a class with the names of their arguments, ``**`` included as such."""
    out: dict[str, list[str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
                    alias = item.targets[0].id
                    if isinstance(item.value, ast.Name) and item.value.id in out:
                        out[alias] = out[item.value.id]
                elif isinstance(item, ast.FunctionDef) and is_public(item.name):
                    args = item.args
                    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
                    names += [] if args.kwarg is None else [f"**{args.kwarg.arg}"]
                    out[item.name] = [n for n in names if n not in ("self", "cls")]
    return out


def fields(source: str, class_name: str) -> list[str]:
    """Return the annotated names of a class."""
    return [
        item.target.id
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]


def ours() -> dict[str, list[str]]:
    """Return our methods with their keywords."""
    options = {name: fields((PACKAGE / file).read_text("utf-8"), name) for name, file in OPTIONS.items()}
    sampling = options["SamplingOptions"]
    stands_for = {"**options": [*options["GenerationOptions"], *sampling], "**sampling": sampling}
    out: dict[str, list[str]] = {}
    for name, file in LAYERS.items():
        for method, names in functions((PACKAGE / file).read_text("utf-8"), name).items():
            out[method] = [k for n in names for k in stands_for.get(n, [n])]
    return out


def rows(page: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the page's tables: section -> name -> (kind, note)."""
    out: dict[str, dict[str, tuple[str, str]]] = {}
    section = ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = line[3:].strip("` ")
            out[section] = {}
        elif match := re.fullmatch(r"\| `([^`]+)` \| ([^|]+) \| (.*) \|", line):
            name, kind, note = (text.strip() for text in match.groups())
            if name in out[section]:
                raise ValueError(f"{section}: {name} stands there twice")
            out[section][name] = (kind, note)
    return out


def problems(page: str, peer: dict[str, list[str]], own: dict[str, list[str]]) -> Iterator[str]:
    """Yield what the page says wrongly or leaves out."""
    tables = rows(page)
    methods = tables.get("Methods", {})
    wanted = {"Constructor": peer["__init__"], "Methods": [m for m in peer if m != "__init__"]}
    for method, (kind, _) in methods.items():
        if kind == "same" and peer.get(method):
            wanted[method] = peer[method]
    for section, names in wanted.items():
        table = tables.get(section, {})
        yield from (f"{section}: '{n}' is missing" for n in names if n not in table)
        yield from (f"{section}: '{n}' does not exist there" for n in table if n not in names)
        here = (
            list(own)
            if section == "Methods"
            else own.get("__init__" if section == "Constructor" else section, [])
        )
        for name, (kind, note) in table.items():
            if kind not in KINDS:
                yield f"{section}: '{name}' is '{kind}'"
            if kind == "same" and name not in here:
                yield f"{section}: '{name}' is said to be the same, and we have none"
            if kind != "same" and section != "Methods" and name in here:
                yield f"{section}: '{name}' exists here, but is said to be {kind}"
            if kind != "same" and not note:
                yield f"{section}: '{name}' needs a note"
            if kind == "renamed":
                known = {k for names in own.values() for k in names} | set(own)
                if not any(re.match(r"\w+", word)[0] in known for word in re.findall(r"`(\w[^`]*)`", note)):  # type: ignore[index]
                    yield f"{section}: '{name}' is renamed to nothing that we have: {note}"


def peer_source(archive: Path) -> str:
    """Return the peer's llama.py out of its source archive."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(r"[^/]+/llama_cpp/llama\.py", member.name):
                file = tar.extractfile(member)
                assert file is not None  # a regular file
                return file.read().decode("utf-8")
    raise FileNotFoundError(f"{archive}: no llama_cpp/llama.py in it")


def find_archive() -> Path | None:
    """Return the pinned archive if it was fetched before."""
    sys.path.insert(0, str(ROOT / "buildutils"))
    import vendor

    found = sorted(vendor.cache_dir().glob("llama_cpp_python-*.tar.gz"))
    return found[-1] if found else None


def main() -> int:
    archive = Path(sys.argv[1]) if len(sys.argv) > 1 else find_archive()
    if archive is None:
        print("error: the pinned archive is not here; run python buildutils/vendor.py first", file=sys.stderr)
        return 2
    peer = functions(peer_source(archive), "Llama")
    found = list(problems(PAGE.read_text("utf-8"), peer, ours()))
    print("\n".join(found) or f"docs/migration.md covers {sum(map(len, peer.values()))} arguments")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
