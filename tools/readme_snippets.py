"""llama-cpp-python's README examples, to be run here: readme_snippets.py [ARCHIVE].

Extracts the Python examples of the pinned source archive's README, changes their imports and model paths, and nothing
else. ARCHIVE is that archive; without it, the one that buildutils/vendor.py keeps. Prints the examples, adapted.
``tests/native/test_peer_readme.py`` runs them.
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from check_migration import find_archive

PACKAGE = "pyllama_dsv4"


@dataclass(frozen=True)
class Snippet:
    """One example.

    Attributes:
        line: Of its first line in the README.
        code: As it stands there.
    """

    line: int
    code: str

    def adapted(self, model: str) -> str:
        """Return the example with this package's import, and `model` in place of every model path."""
        code = re.sub(r"\bfrom llama_cpp(\.\w+)* import\b", f"from {PACKAGE} import", self.code)
        code = re.sub(r"\bimport llama_cpp\b", f"import {PACKAGE} as llama_cpp", code)
        return re.sub(r'"[^"\s]*/[^"\s]*\.gguf"', lambda _: repr(model), code)


def snippets(readme: str) -> Iterator[Snippet]:
    """Yield the Python examples of a README, in their order."""
    for match in re.finditer(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE):
        yield Snippet(readme.count("\n", 0, match.start(1)) + 1, match[1])


def peer_readme(archive: Path) -> str:
    """Return the README out of the peer's source archive."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(r"[^/]+/README\.md", member.name):
                file = tar.extractfile(member)
                assert file is not None  # a regular file
                return file.read().decode("utf-8")
    raise FileNotFoundError(f"{archive}: no README.md in it")


def main() -> int:
    archive = Path(sys.argv[1]) if len(sys.argv) > 1 else find_archive()
    if archive is None:
        print("error: the pinned archive is not here; run python buildutils/vendor.py first", file=sys.stderr)
        return 2
    for snippet in snippets(peer_readme(archive)):
        print(f"# --- line {snippet.line}\n{snippet.adapted('model.gguf')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
